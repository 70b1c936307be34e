"""The server process: engine core, HTTP, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Protocol

import uvicorn
import uvloop
from starlette.types import ASGIApp

from trunkline.config.model_spec import ModelError, ModelSpec, load_model_spec
from trunkline.config.resolve import Resolved
from trunkline.config.schema import EngineConfig
from trunkline.engine.client import EngineClient
from trunkline.engine.fields import SAMPLING_FIELDS, read_fields
from trunkline.engine.frontend import Frontend
from trunkline.engine.logs import set_up_logging
from trunkline.metrics.prometheus import Metrics
from trunkline.server.call import ServedModel
from trunkline.server.endpoint import Job
from trunkline.server.listen import listening, shown_address, tls_context, warn_if_exposed
from trunkline.server.routes import build_app
from trunkline.server.stall import StallWatch
from trunkline.server.tools.formats import tool_format
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.reasoning import reasoning_format
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

SEND_TIME = 5  # seconds more that clients get to read the rest of their answers
KEEP_ALIVE = 75  # seconds that an idle connection stays open
GOODBYE = 0.5  # seconds that a client has to end TLS in good order; uvloop gives 30

_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

log = logging.getLogger(__name__)


Launch = Callable[[EngineConfig], Coroutine[Any, Any, EngineClient]]


class Supervision(Protocol):
    """What a server process needs to know of its supervisor, where it is one of several."""

    @property
    def number(self) -> int: ...
    @property
    def folder(self) -> str: ...
    @property
    def command(self) -> str: ...
    def serving(self, server: DrainingServer) -> None:
        """The process serves now; the supervisor says when `server` is to drain."""
        ...


def run_server(resolved: Resolved, launch: Launch = EngineClient.launch) -> None:
    """Serve until SIGTERM or SIGINT; requests in progress then get --drain-timeout to finish. A second signal
    ends at once.

    Raises RequestError when the server can't start, or when its engine died and stays dead.
    """
    config = resolved.config
    set_up_logging(config.server.log_level, config.observe.log_format)
    started = time.monotonic()
    tls = tls_context(config.server)
    with listening(config.server) as listener:
        warn_if_exposed(config.server, listener)
        try:
            uvloop.run(serve(config, listener, tls, started, launch))
        except asyncio.CancelledError:
            log.info("stopped while starting")


async def serve(
    config: EngineConfig,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    started: float,
    launch: Launch,
    supervision: Supervision | None = None,
) -> None:
    """Serve until a signal comes, or with `supervision` until the supervisor says so."""
    with _cancelled_by_signals() if supervision is None else contextlib.nullcontext():
        client, model = await _start(config, launch)
    server, jobs = None, list[asyncio.Task[None]]()
    try:
        frontend = Frontend(client, model.tokenizer, config)
        shared = None if supervision is None else supervision.folder
        app = build_app(frontend, model, Metrics(model.name, config.observe, shared))
        client.on_death, client.on_abort = app.dumper.crashed, frontend.abort_own
        jobs = [asyncio.create_task(_lasting(job)) for job in app.jobs]
        server = DrainingServer(app.with_cors(), frontend, tls, takes_signals=supervision is None)
        app.startup["seconds"] = round(time.monotonic() - started, 3)
        if supervision is None:
            print(ready_line(config, listener, started), flush=True)
        else:
            app.startup |= {"command": supervision.command, "process": supervision.number}
            supervision.serving(server)
        watch = asyncio.create_task(_stop_when_dead(client, server))
        stalls = StallWatch(asyncio.get_running_loop(), config.server.watchdog_timeout)
        try:
            await server.serve(sockets=[listener])
        except Exception as error:
            app.dumper.crashed(f"the server failed: {error!r}")
            raise
        finally:
            stalls.stop()
        watch.cancel()
        app.dumper.flush()
        if client.fatal.is_set():
            raise RequestError(client.health.reason, code="engine_dead", status=503)
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await client.close(at_once=server is not None and server.force_exit)


def ready_line(config: EngineConfig, listener: socket.socket, started: float) -> str:
    address, seconds = shown_address(config.server, listener), time.monotonic() - started
    return f"Trunkline is ready: {address} serves {config.model.served_model_name} ({seconds:.1f} s)"


async def _lasting(job: Job) -> None:
    """A job must not end before the server does; if it fails, the log says so."""
    try:
        await job()
    except Exception:
        log.exception("a job of the server ended")


async def _start(config: EngineConfig, launch: Launch) -> tuple[EngineClient, ServedModel]:
    """The engine loads its weights while the text layer loads here; what fails first ends both."""
    engine = asyncio.create_task(launch(config))
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


class DrainingServer(uvicorn.Server):
    """Requests that still run --drain-timeout after a signal end with what they have, like aborted ones."""

    def __init__(
        self, app: ASGIApp, frontend: Frontend, tls: ssl.SSLContext | None, *, takes_signals: bool = True
    ) -> None:
        self._takes_signals = takes_signals
        self._drain_time = frontend.config.server.drain_timeout
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
                timeout_graceful_shutdown=math.ceil(self._drain_time) + SEND_TIME,
            )
        )
        self.config.load()
        self.config.ssl = tls
        self._frontend = frontend

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A signal starts the drain, the next one ends it. They stay ignored until the process has ended."""

        def note(number: int, frame: FrameType | None) -> None:
            self.drain(signal.Signals(number).name)

        if self._takes_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, note)
        yield

    def drain(self, why: str) -> None:
        """End when all is answered; told again, at once."""
        log.info("%s: %s", why, "ending at once" if self.should_exit else "draining")
        self.force_exit = self.should_exit
        self.should_exit = self._frontend.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but that the end waits less for clients that leave TLS's goodbye unanswered."""
        loop, config = asyncio.get_running_loop(), self.config
        goodbye = None if config.ssl is None else GOODBYE

        def protocol() -> asyncio.Protocol:
            make: Any = config.http_protocol_class
            made: asyncio.Protocol = make(config=config, server_state=self.server_state, app_state={})
            return made

        self.servers = [
            await loop.create_server(
                protocol, sock=listener, backlog=config.backlog, ssl=config.ssl, ssl_shutdown_timeout=goodbye
            )
            for listener in sockets or ()
        ]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        deadline.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._drain_time)
        await self._frontend.client.abort_all()


async def _stop_when_dead(client: EngineClient, server: uvicorn.Server) -> None:
    await client.fatal.wait()
    server.should_exit = True


def load_served_model(config: EngineConfig) -> ServedModel:
    """Tokeniser, chat template and sampling defaults of the model. Raises ModelError."""
    spec = load_model_spec(config.model.path, revision=config.model.revision)
    folder = config.model.tokenizer_path or spec.path
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer.special_tokens, config.server.chat_template)
    source = "" if template is None else template.source
    return ServedModel(
        name=config.model.served_model_name,
        path=config.model.path,
        architecture=spec.architecture,
        tokenizer=tokenizer,
        template=template,
        defaults=_sampling_defaults(spec) if config.server.sampling_defaults == "model" else {},
        weight_version=config.model.weight_version,
        reasoning=reasoning_format(config.server.reasoning_parser, source),
        tools=tool_format(config.server.tool_call_parser, source),
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
