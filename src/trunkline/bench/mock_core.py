"""An engine core that computes nothing: each request gets its tokens at once, one a step.

What is measured with it is everything else: `python -m trunkline.bench.mock_core SOCKET` stands in for
`python -m trunkline.engine.process SOCKET`.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from trunkline.config.schema import EngineConfig
from trunkline.engine.process import BEAT_INTERVAL, SocketChannel
from trunkline.messages import (
    Abort,
    AddRequest,
    GetStats,
    Heartbeat,
    Outputs,
    Ready,
    Shutdown,
    Stats,
    TokensOut,
)
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import FinishReason, Timing

SAID = "The quick brown fox jumps over the lazy dog while the train waits at the station. "


class MockCore:
    """Live requests, and how many tokens each still gets."""

    def __init__(self, channel: SocketChannel, tokens: list[int]) -> None:
        self._channel = channel
        self._tokens = tokens
        self._left: dict[str, int] = {}
        self._new: dict[str, float] = {}
        self._generated = 0

    def run(self) -> None:
        last_beat = 0.0
        while True:
            for _, message in self._channel.receive(0.0 if self._left else BEAT_INTERVAL):
                match message:
                    case AddRequest():
                        self._left[message.rid] = message.params.max_new_tokens or 1
                        self._new[message.rid] = time.monotonic()
                    case Abort():
                        self._left.pop(message.rid, None)
                    case GetStats():
                        counters = {"generated_tokens": float(self._generated)}
                        self._channel.send(Stats(call=message.call, gauges={}, counters=counters), 0)
                    case Shutdown():
                        return
            if self._left:
                self._channel.send(Outputs(self._step()), 0)
            now = time.monotonic()
            if now - last_beat >= BEAT_INTERVAL:
                self._channel.send(Heartbeat(self._generated, bool(self._left)), 0)
                last_beat = now

    def _step(self) -> list[TokensOut]:
        outputs = []
        for rid, left in list(self._left.items()):
            token = self._tokens[left % len(self._tokens)]
            began = self._new.pop(rid, None)
            timing = None if began is None else Timing(began, began, began, time.monotonic())
            finish = FinishReason("length") if left == 1 else None
            outputs.append(TokensOut(rid=rid, token_ids=[token], timing=timing, finish=finish))
            if left == 1:
                del self._left[rid]
            else:
                self._left[rid] = left - 1
        self._generated += len(outputs)
        return outputs


def main(path: str) -> int:
    config = EngineConfig.from_json(sys.stdin.buffer.readline())
    tokenizer = Tokenizer.load(config.model.tokenizer_path or config.model.path)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    channel = SocketChannel(path)
    ready = Ready(
        max_context=config.scheduler.max_context,
        num_pages=config.cache.num_pages,
        page_size=config.cache.page_size,
        max_running=config.scheduler.max_running,
        vocab_size=tokenizer.num_tokens,
    )
    channel.send(ready, 0)
    MockCore(channel, tokenizer.encode(SAID, add_special_tokens=False)).run()
    channel.close()
    return 0


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
