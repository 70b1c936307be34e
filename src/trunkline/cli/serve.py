"""`trunkline serve`: check the port, resolve the configuration, say what will run, run the server."""

from __future__ import annotations

import errno
import socket
import sys

from trunkline.config.cli import help_text, parse, wants_help
from trunkline.config.flags import Args
from trunkline.types import RequestError

ABOUT = "Serve a model over HTTP with the OpenAI API. Without flags: the bundled model on 127.0.0.1:30000."


def run(words: list[str]) -> int:
    if wants_help(words):
        sys.stdout.write(help_text("trunkline serve [FLAGS]", ABOUT, Args))
        return 0
    args = parse(words, Args)
    if args.uds is None:
        check_port(args.host, args.port)
    from trunkline.config.resolve import load_config

    resolved = load_config(args)
    if args.log_level in ("debug", "info"):
        for word in args.accepted:
            print(f"  {word}: {resolved.reasons[word.split()[0]]}")
        print(f"{resolved.summary()}\n{resolved.memory.table()}", flush=True)
    if args.tokenizer_worker_num > 1:
        from trunkline.server.supervisor import run_processes

        run_processes(resolved)
    else:
        from trunkline.server.app import run_server

        run_server(resolved)
    return 0


def check_port(host: str, port: int) -> None:
    """Find out before anything is loaded whether the server will be able to listen.

    Raises RequestError code `port_in_use` (with the process that listens, if it can be known), `bad_host`.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror as error:
        raise RequestError(
            f"--host {host} is not a known address: {error.strerror}", code="bad_host", param="--host"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RequestError(
                f"port {port} of {host} is in use{_by_whom(port)}; stop that, or choose another with --port",
                code="port_in_use",
                param="--port",
            ) from None
        if error.errno == errno.EACCES:
            raise RequestError(
                f"port {port} may not be opened by this user; ports from 1024 may",
                code="port_forbidden",
                param="--port",
            ) from None
        raise RequestError(
            f"cannot listen on {host}: {error.strerror}", code="bad_host", param="--host"
        ) from None


def _by_whom(port: int) -> str:
    import psutil  # type: ignore[import-untyped]

    try:
        found = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for connection in found:
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1] == port and connection.pid:
            try:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
            except psutil.Error:
                return f" by process {connection.pid}"
    return ""
