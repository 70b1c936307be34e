"""The socket that the server accepts on, and TLS on top of it."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Iterator

from trunkline.config.schema import ServerConfig
from trunkline.engine.leftovers import remove_dead_socket
from trunkline.types import RequestError

BACKLOG = 2048  # connections that may wait to be accepted
UNIX_MODE = 0o660  # of the Unix socket: its owner and group may connect

log = logging.getLogger(__name__)


@contextlib.contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """A bound, listening socket; a Unix socket's file is removed at the end.

    Raises RequestError when the address can't be used.
    """
    with _listen_unix(config.uds) if config.uds else _listen(config.host, config.port) as listener:
        inode = os.stat(config.uds).st_ino if config.uds else 0
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if config.uds and os.stat(config.uds).st_ino == inode:  # not one that came in its place
                    os.unlink(config.uds)


def shown_address(config: ServerConfig, listener: socket.socket) -> str:
    """Where clients find the server."""
    if config.uds:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if config.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{config.root_path}/v1"


def warn_if_exposed(config: ServerConfig, listener: socket.socket) -> None:
    if is_exposed(config):
        log.warning(
            "other machines can reach %s and no key is asked for: set --api-key, or --host 127.0.0.1",
            shown_address(config, listener),
        )


def is_exposed(config: ServerConfig) -> bool:
    """Whether other machines can reach the server, and it asks them for nothing."""
    if config.uds or config.api_key or config.ssl_ca_certs:
        return False
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(config.host, config.port)}
    except OSError:
        return True
    return not all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in addresses)


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not remove_dead_socket(path):
            raise RequestError(f"a server listens on {path} already", code="port_in_use", param="--uds")
        before = os.umask(0o777 & ~UNIX_MODE)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise RequestError(
            f"can't listen on {path}: {error.strerror or error}", code="bad_socket", param="--uds"
        ) from None
    except RequestError:
        listener.close()
        raise
    return listener


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise RequestError(
            f"can't listen on {host} port {port}: {error.strerror}", code="port_in_use", param="--port"
        ) from error
    return listener


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises RequestError for files that are not what they should be."""
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(
            config.ssl_certfile, config.ssl_keyfile, lambda: config.ssl_keyfile_password or ""
        )
    except (OSError, ValueError) as error:
        raise RequestError(
            f"the certificate {config.ssl_certfile} and its key can't be used: {error}",
            code="bad_certificate",
            param="--ssl-certfile",
        ) from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (OSError, ValueError) as error:
            raise RequestError(
                f"--ssl-ca-certs {config.ssl_ca_certs} can't be used: {error}",
                code="bad_certificate",
                param="--ssl-ca-certs",
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context
