"""Clients with all kinds of requests, some of which leave or abort at random, and what must hold: the answer
that each request gets alone, no error, and nothing held when they are gone.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.soak.cases import SCRIPTS, Case, cases, essence, extended, one_of
from tests.soak.processes import Watch, server_processes

PATIENCE = 900.0  # seconds for one answer: whoever stops the server and us with SIGSTOP is no fault
SAMPLE_EVERY = 1.0
LAST = ("message_stop", "response.completed", "response.incomplete")  # events that end a stream


@dataclass
class Tally:
    """What the clients saw."""

    sent: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)  # disconnected or aborted
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Client:
    """One connection pool's requests, and what they must answer."""

    def __init__(self, http: httpx.AsyncClient, all_cases: list[Case]) -> None:
        self.http, self.cases, self.tally = http, all_cases, Tally()
        self.expected: list[Any] = []

    async def learn(self) -> None:
        """Each answer when nothing else runs."""
        self.expected = [await self.answer(case) for case in self.cases]

    async def changed(self) -> list[int]:
        """The cases that are answered differently now."""
        now = [await self.answer(case) for case in self.cases]
        return [index for index, answer in enumerate(now) if answer != self.expected[index]]

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Raises RuntimeError for anything but success."""
        return await self.call("POST", path, json=body)

    async def call(self, method: str, path: str, **content: Any) -> Any:
        response = await self.http.request(method, path, **content)
        if response.status_code != 200:
            raise RuntimeError(f"{path}: status {response.status_code}: {response.text[:300]}")
        return response.json()

    async def answer(self, case: Case) -> Any:
        if case.kind in SCRIPTS:
            return await getattr(self, case.kind)(case)
        if case.streams:
            return (await self.stream(case, None))[0]
        return essence(await self.post(case.path, case.body))

    async def session(self, case: Case) -> list[Any]:
        """Three turns that go on from each other."""
        session = await self.post("/open_session", {"capacity_of_str_len": 1000})
        turns, where = [], {"id": session}
        for _ in range(3):
            turn = await self.post(case.path, {**case.body, "session_params": where})
            turns.append(essence(turn))
            where = {"id": session, "rid": turn["meta_info"]["id"]}
        await self.post("/close_session", {"session_id": session})
        return turns

    async def conversation(self, case: Case) -> list[Any]:
        """Two stored responses, the second one behind the first; both are as they were, then forgotten."""
        first = await self.post(case.path, case.body)
        second = await self.post(case.path, {**case.body, "previous_response_id": first["id"]})
        for told in (first, second):
            kept = (await self.http.get(f"{case.path}/{told['id']}")).json()
            if kept != told:
                raise RuntimeError(f"stored otherwise: {kept} instead of {told}")
            await self.call("DELETE", f"{case.path}/{told['id']}")
        return [essence(first), essence(second)]

    async def background(self, case: Case) -> Any:
        return essence(await self.later(case))

    async def later(self, case: Case, cancel_after: float | None = None) -> Any:
        """A response that runs by itself, when it has ended."""
        key = (await self.post(case.path, case.body))["id"]
        if cancel_after is not None:
            await asyncio.sleep(cancel_after)
            answer = await self.http.post(f"{case.path}/{key}/cancel")
            if answer.status_code != 200 and answer.json()["error"]["code"] != "not_cancellable":
                raise RuntimeError(f"cancel: {answer.text[:300]}")
        while (told := await self.call("GET", f"{case.path}/{key}"))["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.05)
        await self.call("DELETE", f"{case.path}/{key}")
        return told

    async def cancel(self, case: Case) -> Any:
        """A cancelled response says nothing but a part of what it would have; shown as the whole."""
        whole = essence(await self.post(case.path, {**case.body, "background": False}))
        told = essence(await self.later(case, cancel_after=random.random() * 0.3))
        texts = [
            [part["text"] for item in one["output"] for part in item["content"]] for one in (whole, told)
        ]
        if not "".join(texts[0]).startswith("".join(texts[1])):
            raise RuntimeError(f"cancelled: {texts[1]} is no beginning of {texts[0]}")
        return whole

    async def batch(self, case: Case) -> Any:
        """The answers of a batch, in the order of its lines; its files are deleted."""
        body = dict(case.body)
        lines = body.pop("lines")
        asked = [
            json.dumps({"custom_id": str(i), "method": "POST", "url": body["endpoint"], "body": line})
            for i, line in enumerate(lines)
        ]
        form = {"files": {"file": ("in.jsonl", "\n".join(asked).encode())}, "data": {"purpose": "batch"}}
        file = (await self.call("POST", "/v1/files", **form))["id"]
        key = (await self.post(case.path, {**body, "input_file_id": file}))["id"]
        while (told := await self.call("GET", f"{case.path}/{key}"))["status"] != "completed":
            if told["status"] in ("failed", "expired", "cancelled"):
                raise RuntimeError(f"the batch ended so: {told}")
            await asyncio.sleep(0.1)
        text = (await self.http.get(f"/v1/files/{told['output_file_id']}/content")).text
        for name in (file, told["output_file_id"]):
            await self.call("DELETE", f"/v1/files/{name}")
        results = {row["custom_id"]: row["response"]["body"] for row in map(json.loads, text.splitlines())}
        return [essence(results[str(i)]) for i in range(len(lines))]

    async def stream(self, case: Case, leave_after: int | None) -> tuple[str, bool]:
        """The text, and whether all of it came before `leave_after` events had."""
        text, count = "", 0
        async with self.http.stream("POST", case.path, json=case.body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:300]!r}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return text, True
                if line.startswith(("data: ", "{")):
                    event = json.loads(line.removeprefix("data: "))
                    text = extended(text, event)
                    count += 1
                    if event.get("done") or event.get("type") in LAST:
                        return text, True
                if leave_after is not None and count > leave_after:
                    return text, False
        raise RuntimeError("the stream ended without its last event")

    async def one(self, index: int, rng: random.Random) -> None:
        """Ask one case; leave about a third of the streams, and some of the others, at a random point."""
        case, expected = one_of(self.cases[index], self.tally.sent), self.expected[index]
        self.tally.sent += 1
        if case.streams:
            text, whole = await self.stream(case, rng.randrange(12) if rng.random() < 0.35 else None)
            right = text == expected if whole else expected.startswith(text)
        elif case.kind == "abort":
            text, whole = await self.abort(case, f"soak-{self.tally.sent}", rng.random() * 0.5)
            right = text == expected["text"] if whole else expected["text"].startswith(text)
        elif rng.random() < 0.15 and case.kind not in SCRIPTS:  # what is left there is kept, as it should be
            whole = right = True
            try:
                async with asyncio.timeout(rng.random() * 0.2):
                    text = right = await self.answer(case) == expected
            except TimeoutError:
                whole = False
        else:
            text, whole = await self.answer(case), True
            right = text == expected
        (self.tally.finished if whole else self.tally.left)[case.kind] += 1
        if not right:
            self.tally.wrong.append(f"{case}: {text!r} instead of {expected!r}")

    async def abort(self, case: Case, rid: str, after: float) -> tuple[str, bool]:
        """The text, and whether it was complete before the abort."""
        asked = asyncio.create_task(self.post(case.path, {**case.body, "rid": rid}))
        await asyncio.wait([asked], timeout=after)
        await self.post("/abort_request", {"rid": rid})
        answer = await asked
        return answer["text"], answer["meta_info"]["finish_reason"]["type"] != "abort"

    async def run(self, number: int, until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            index = rng.randrange(len(self.cases))
            try:
                await self.one(index, rng)
            except (RuntimeError, httpx.HTTPError) as error:
                self.tally.errors.append(f"{self.cases[index].kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.1)


async def gauges(http: httpx.AsyncClient) -> dict[str, float]:
    """Values of the metrics with one label at most, without their prefix."""
    text = (await http.get("/metrics")).text
    found = re.findall(r"^trunkline:(\w+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def wait_until_idle(http: httpx.AsyncClient, seconds: float = 10.0) -> dict[str, float]:
    """Poll until nothing runs and no page is held, or the time is up; return the last gauges."""
    end = time.monotonic() + seconds
    while True:
        now = await gauges(http)
        held = now["num_running_reqs"] + now["num_queue_reqs"] + now["num_used_tokens"]
        if held == 0 or time.monotonic() > end:
            return now
        await asyncio.sleep(0.1)


def progress_of(tally: Tally, watch: Watch) -> dict[str, Any]:
    return {
        "seconds": round(watch.times[-1], 1),
        "finished": dict(sorted(tally.finished.items())),
        "left": dict(sorted(tally.left.items())),
        "errors": len(tally.errors),
        "wrong_answers": len(tally.wrong),
        "processes": watch.figures(),
        "first_errors": tally.errors[:3] + tally.wrong[:3],
    }


async def storm(
    url: str,
    clients: int,
    seconds: float,
    seed: int = 0,
    *,
    report: Callable[[dict[str, Any]], None] = lambda figures: None,
    every: float = 30.0,
) -> dict[str, Any]:
    """Learn every case's answer alone, then let the clients loose. Returns the figures of the run."""
    limits = httpx.Limits(max_connections=2 * clients + 4, max_keepalive_connections=clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as http:
        client, watch = Client(http, cases(seed)), Watch(server_processes(url))
        await client.learn()
        begin, told = time.monotonic(), 0.0
        running = [asyncio.create_task(client.run(number, begin + seconds)) for number in range(clients)]
        while left := [task for task in running if not task.done()]:
            watch.sample(time.monotonic() - begin)
            if watch.times[-1] - told >= every:
                told = watch.times[-1]
                report(progress_of(client.tally, watch))
            await asyncio.wait(left, timeout=SAMPLE_EVERY)
        await asyncio.gather(*running)
        idle = await wait_until_idle(http)
        await http.post("/flush_cache")
        empty = await wait_until_idle(http)
        changed = await client.changed()
    return {
        "clients": clients,
        **progress_of(client.tally, watch),
        "answers_changed_afterwards": len(changed),
        "running_at_end": idle["num_running_reqs"],
        "waiting_at_end": idle["num_queue_reqs"],
        "tokens_held_at_end": idle["num_used_tokens"],
        "tokens_held_after_flush": empty["num_used_tokens"] + empty["num_cached_tokens"],
    }


def is_clean(figures: dict[str, Any]) -> bool:
    bad = (
        "errors",
        "wrong_answers",
        "answers_changed_afterwards",
        "running_at_end",
        "waiting_at_end",
        "tokens_held_at_end",
        "tokens_held_after_flush",
    )
    grows = any(series["grows"] for series in figures["processes"].values())
    return bool(figures["finished"]) and not grows and not any(figures[name] for name in bad)
