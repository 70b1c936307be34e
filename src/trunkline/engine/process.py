"""Builds an engine core from a configuration and drives its loop, in a thread or as a process of its own.

The process is `python -m trunkline.engine.process SOCKET`: the configuration comes as one JSON line on
standard input, which then stays open as a lifeline. When it closes, the parent is gone and so is this
process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

import zmq

from trunkline.cache import PrefixCache
from trunkline.config.model_spec import ModelSpec, load_model_spec
from trunkline.config.schema import EngineConfig
from trunkline.engine.core import EngineCore
from trunkline.engine.guidance import Compiler, Guidance, LateCompiler
from trunkline.engine.leftovers import remove_dead_socket
from trunkline.engine.logs import set_up_logging
from trunkline.engine.owners import Owners
from trunkline.messages import (
    AbortAnywhere,
    Failed,
    FromCore,
    Gone,
    Heartbeat,
    Hello,
    Ready,
    ToCore,
    decode_to_core,
    encode,
)
from trunkline.scheduler.scheduler import Scheduler
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

log = logging.getLogger(__name__)

BEAT_INTERVAL = 0.5  # seconds between heartbeats
WARM_AFTER = 4  # idle beats after the start: then what the first grammar needs is loaded


class Channel(Protocol):
    """The core's end of the line to its frontends, which have numbers. Number 0 is the process that started
    the core."""

    def receive(self, timeout: float) -> list[tuple[int, ToCore]]:
        """Return all messages that are there; wait up to `timeout` seconds for a first one."""
        ...

    def send(self, message: FromCore, to: int) -> None: ...

    def wake(self) -> None:
        """End a wait in `receive`, now or the next. Called from any thread."""
        ...


def build_core(config: EngineConfig) -> tuple[EngineCore, Ready]:
    """Load the model and put the parts together. Raises RequestError for what can't be loaded."""
    began = time.monotonic()
    from trunkline.worker.runner import ModelWorker  # loads torch

    started = time.monotonic()
    spec = load_model_spec(config.model.path, revision=config.model.revision)
    worker = ModelWorker(config, spec)
    cache = PrefixCache(config.cache.num_pages, config.cache.page_size, config.cache.prefix_cache)
    scheduler = Scheduler(
        config.scheduler,
        cache,
        spec.eos_token_ids,
        spec.vocab_size,
        jump_forward=config.grammar.jump_forward,
    )
    ready = Ready(
        max_context=config.scheduler.max_context,
        num_pages=config.cache.num_pages,
        page_size=config.cache.page_size,
        max_running=config.scheduler.max_running,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        info={
            "pid": os.getpid(),
            "import_s": round(started - began, 3),
            "map_s": round(worker.model.map_s, 3),
            "pack_s": round(worker.model.pack_s, 3),
            "load_s": round(time.monotonic() - started, 3),
            **worker.memory_report(),
        },
    )
    return EngineCore(scheduler, worker, config.scheduler.depth, _guidance(config, spec)), ready


def _guidance(config: EngineConfig, spec: ModelSpec) -> Guidance:
    def compiler() -> Compiler:
        from trunkline.grammar.compiler import backend_compiler  # not every server needs the library

        tokenizer = Tokenizer.load(config.model.tokenizer_path or config.model.path)
        return backend_compiler(config.grammar.backend, tokenizer, spec.eos_token_ids)

    wanted = config.grammar.backend != "none" and bool(spec.eos_token_ids)
    cores = len(os.sched_getaffinity(0))
    beside = config.model.device == "cuda" or config.model.threads < cores
    return Guidance(LateCompiler(compiler) if wanted else None, spec.eos_token_ids, spec.vocab_size, beside)


def run_loop(core: EngineCore, channel: Channel, ready: Ready) -> None:
    """Serve until told to stop. Heartbeats come from this loop itself, so they stop when it does (P10)."""
    last_beat, checked, idle_beats = 0.0, True, 0
    owners, frontends = Owners(core), set[int]()
    core.guidance.wake = channel.wake
    while not core.stopping:
        messages = channel.receive(0.0 if core.can_step else BEAT_INTERVAL)
        for origin, message in messages:
            if isinstance(message, Hello):
                frontends.add(origin)
                channel.send(ready, origin)
            elif isinstance(message, AbortAnywhere):
                for to in frontends - {origin}:
                    channel.send(message, to)
                continue
            elif isinstance(message, Gone):
                frontends.discard(message.frontend)
            for to, reply in owners.handle(origin, message):
                channel.send(reply, to)
        idle_beats = 0 if messages or core.can_step else idle_beats + 1
        if idle_beats == WARM_AFTER:
            core.guidance.warm()
        outputs = core.expire()
        if core.can_step:
            checked = False
            outputs += core.step()
        elif not checked and not messages:
            core.scheduler.check()  # idle for a while: the accounting must add up
            checked = True
        for to, news in owners.sort(outputs):
            channel.send(news, to)
        now = time.monotonic()
        if now - last_beat >= BEAT_INTERVAL:
            for to in frontends:
                channel.send(Heartbeat(core.steps, core.has_work, core.paused), to)
            last_beat = now


def serve(config: EngineConfig, channel: Channel, *, own_process: bool = False) -> bool:
    """Build a core and serve until stopped. Tells the frontend of a fault; returns whether all went well."""
    try:
        if own_process:
            gc.disable()  # imports and loading make hundreds of thousands of objects, all of which stay
        core, ready = build_core(config)
        if own_process:
            gc.freeze()
            gc.enable()
    except RequestError as error:
        channel.send(Failed(error.message, error.code), 0)
        return False
    except Exception as error:
        log.exception("the engine core could not start")
        channel.send(Failed(f"the engine core could not start: {error!r}", "start_failed"), 0)
        return False
    try:
        run_loop(core, channel, ready)
    except Exception as error:
        log.exception("the engine core failed")
        channel.send(Failed(f"the engine core failed: {error!r}", "core_failed"), 0)
        return False
    finally:
        core.profiler.close()
        core.guidance.close()
    return True


class SocketChannel:
    """A ZeroMQ router socket; messages are msgpack, and a frontend's number is its identity in decimal."""

    def __init__(self, path: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a frontend that came again has its old number
        self._socket.bind(f"ipc://{path}")
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._event, zmq.POLLIN)
        self._known = False  # whether number 0 has come: before, nothing can be sent to it
        self._early: list[tuple[int, ToCore]] = []

    def receive(self, timeout: float) -> list[tuple[int, ToCore]]:
        messages, self._early = self._early, []
        ready = dict(self._poller.poll(0 if messages else int(timeout * 1000)))
        if self._event in ready:
            os.eventfd_read(self._event)
        if self._socket in ready:
            try:
                while True:
                    origin, data = self._socket.recv_multipart(zmq.NOBLOCK)
                    messages.append((int(origin), decode_to_core(data)))
            except zmq.Again:
                pass
        self._known = self._known or any(origin == 0 for origin, _ in messages)
        return messages

    def send(self, message: FromCore, to: int) -> None:
        while not self._known:  # what it says of a failed start must not be lost
            self._early += self.receive(1.0)
        self._socket.send_multipart((b"%d" % to, encode(message)))

    def wake(self) -> None:
        os.eventfd_write(self._event, 1)

    def close(self) -> None:
        self._socket.close()
        zmq.Context.instance().term()


def _end_with_parent(folder: Path, uds: str | None) -> None:
    """Wait for the end of standard input, then leave nothing behind (P12)."""
    while os.read(0, 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for _ in range(20):  # the kernel takes a dead process's files away one by one
            if uds is None or remove_dead_socket(uds):
                break
            time.sleep(0.05)
    os._exit(1)


def main(path: str) -> int:
    config = EngineConfig.from_json(sys.stdin.buffer.readline())
    set_up_logging(config.server.log_level, config.observe.log_format)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the frontend drains first, then says when
    faulthandler.register(signal.SIGUSR1)  # the watchdog's wish, before it kills
    threading.Thread(
        target=_end_with_parent, args=(Path(path).parent, config.server.uds), daemon=True
    ).start()
    channel = SocketChannel(path)
    good = serve(config, channel, own_process=True)
    channel.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
