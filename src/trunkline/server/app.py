"""The server process: engine core, HTTP, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from trunkline.config.model_spec import ModelError, ModelSpec, load_model_spec
from trunkline.config.resolve import Resolved
from trunkline.config.schema import EngineConfig
from trunkline.engine.client import EngineClient
from trunkline.engine.fields import SAMPLING_FIELDS, read_fields
from trunkline.engine.frontend import Frontend
from trunkline.metrics.prometheus import Metrics
from trunkline.server.call import ServedModel
from trunkline.server.gate import Gate
from trunkline.server.routes import build_app
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

DRAIN_TIME = 30  # seconds that requests in progress get after SIGTERM or SIGINT
SEND_TIME = 5  # seconds more that clients get to read the rest of their answers
KEEP_ALIVE = 75  # seconds that an idle connection stays open

_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

log = logging.getLogger(__name__)


def run_server(resolved: Resolved) -> None:
    """Serve until SIGTERM or SIGINT; requests in progress then get DRAIN_TIME to finish.

    Raises RequestError when the server can't start, or when its engine died and stays dead.
    """
    config = resolved.config
    logging.basicConfig(
        level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    started = time.monotonic()
    with contextlib.closing(_listen(config.server.host, config.server.port)) as listener:
        try:
            uvloop.run(_serve(config, listener, started))
        except asyncio.CancelledError:
            log.info("stopped while starting")


async def _serve(config: EngineConfig, listener: socket.socket, started: float) -> None:
    with _cancelled_by_signals():
        client, model = await _start(config)
    try:
        frontend = Frontend(client, model.tokenizer, config)
        server = _DrainingServer(build_app(frontend, model, Metrics(model.name)), client)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        seconds = time.monotonic() - started
        print(
            f"Trunkline is ready: http://{shown}:{port}/v1 serves {model.name} ({seconds:.1f} s)", flush=True
        )
        watch = asyncio.create_task(_stop_when_dead(client, server))
        _make_signals_harmless()
        await server.serve(sockets=[listener])
        watch.cancel()
        if client.fatal.is_set():
            raise RequestError(client.health.reason, code="engine_dead", status=503)
    finally:
        await client.close()


async def _start(config: EngineConfig) -> tuple[EngineClient, ServedModel]:
    """The engine loads its weights while the text layer loads here; what fails first ends both."""
    engine = asyncio.create_task(EngineClient.launch(config))
    for _ in range(2):  # its own turn and that of the task it makes, which starts the process
        await asyncio.sleep(0)
    try:
        model = await asyncio.to_thread(load_served_model, config)
        return await engine, model
    except BaseException:
        engine.cancel()
        with contextlib.suppress(asyncio.CancelledError, RequestError):
            await (await engine).close()
        raise


class _DrainingServer(uvicorn.Server):
    """Requests that still run DRAIN_TIME after the signal end with what they have, as aborted ones do."""

    def __init__(self, app: Gate, client: EngineClient) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=DRAIN_TIME + SEND_TIME,
            )
        )
        self._client = client

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        deadline.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(DRAIN_TIME)
        await self._client.abort_all()


async def _stop_when_dead(client: EngineClient, server: uvicorn.Server) -> None:
    await client.fatal.wait()
    server.should_exit = True


def load_served_model(config: EngineConfig) -> ServedModel:
    """Tokeniser, chat template and sampling defaults of the model. Raises ModelError."""
    spec = load_model_spec(config.model.path, revision=config.model.revision)
    folder = config.model.tokenizer_path or spec.path
    tokenizer = Tokenizer.load(folder)
    return ServedModel(
        name=config.model.served_model_name,
        path=config.model.path,
        architecture=spec.architecture,
        tokenizer=tokenizer,
        template=ChatTemplate.load(folder, tokenizer.special_tokens, config.server.chat_template),
        defaults=_sampling_defaults(spec) if config.server.sampling_defaults == "model" else {},
        weight_version=config.model.weight_version,
    )


def _sampling_defaults(spec: ModelSpec) -> dict[str, Any]:
    """Those of generation_config.json that are parameters here. Raises ModelError when out of bounds."""
    given = {name: value for name, value in spec.generation_defaults.items() if name in _MODEL_DEFAULTS}
    if given.get("top_k") == 0:
        given["top_k"] = -1  # "off" as transformers writes it
    try:
        return read_fields(SAMPLING_FIELDS, given)
    except RequestError as error:
        raise ModelError(f"{spec.path}: generation_config.json: {error.message}", "bad_config") from error


def _listen(host: str, port: int) -> socket.socket:
    """Raises RequestError when the address can't be used."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise RequestError(
            f"can't listen on {host} port {port}: {error.strerror}", code="port_in_use", param="--port"
        ) from error
    return listener


@contextlib.contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """A signal ends the start: the task is cancelled, so that all that was started is undone."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _make_signals_harmless() -> None:
    """The HTTP server has handlers of its own while it serves. When it has stopped it raises the signal that
    stopped it once more, for what was installed before: here that is a normal end, and so are repetitions."""

    def note(number: int, frame: FrameType | None) -> None:
        log.info("stopping after %s", signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
