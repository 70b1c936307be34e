"""`python -m tests.fuzz --calls 20000`: random calls against an application over a fake core, or --url."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import httpx

from tests.fuzz.runner import application, fuzz
from tests.server.conftest import REPLY, byte_level_tokenizer, make_app
from tests.server.fake_client import FakeClient
from trunkline.config.schema import EngineConfig, ModelConfig
from trunkline.text.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a running server")
    args = parser.parse_args()
    started = time.monotonic()
    if args.url:
        client = httpx.Client(base_url=args.url, timeout=120)
        document = client.get("/openapi.json").json()

        def send(**request: Any) -> httpx.Response:
            url = httpx.URL(request.pop("url"))
            return client.request(url=str(url.copy_with(scheme=None, host=None)), **request)
    else:
        tokenizer = Tokenizer(byte_level_tokenizer(), {"eos_token": "<|im_end|>"})
        reply = tokenizer.encode(REPLY)
        fake = FakeClient(lambda request: reply, eos=2, vocab_size=tokenizer.num_tokens)
        config = EngineConfig(model=ModelConfig(path=str(Path("/models/tiny")), served_model_name="tiny"))
        loop = asyncio.new_event_loop()
        send = application(make_app(fake, tokenizer, config), loop)
        document = send(method="GET", url="/openapi.json").json()
    seen = fuzz(document, send, args.calls, args.seed)
    told = ", ".join(f"{status}: {count}" for status, count in sorted(seen.items()))
    print(f"{seen.total()} calls in {time.monotonic() - started:.0f} s, no server error ({told})")


if __name__ == "__main__":
    main()
