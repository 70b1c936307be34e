"""A profile of the core's steps by torch's profiler, written as a Chrome trace."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from trunkline.messages import ProfileDone, StartProfile, StopProfile

log = logging.getLogger(__name__)


class Profiler:
    """At most one profile at a time. `stepped` is called behind each step, in the thread that steps."""

    def __init__(self) -> None:
        self._profile: Any = None
        self._path = Path()
        self._left: int | None = None  # steps until it stops by itself

    def handle(self, message: StartProfile | StopProfile) -> ProfileDone:
        try:
            if isinstance(message, StartProfile):
                return ProfileDone(message.call, *self._start(message))
            return ProfileDone(message.call, *self._stop())
        except Exception as error:  # of the profiler: no request is to suffer
            log.exception("profiling failed")
            self._profile = None
            return ProfileDone(message.call, False, f"profiling failed: {type(error).__name__}")

    def stepped(self) -> None:
        if self._profile is None or self._left is None:
            return
        self._left -= 1
        if self._left <= 0:
            done = self.handle(StopProfile(""))
            log.info("the profile has all its steps: %s", done.message)

    def close(self) -> None:
        """End a profile that nobody will read: one that runs when its thread ends brings down the process."""
        if self._profile is not None:
            profile, self._profile = self._profile, None
            profile.stop()

    def _start(self, message: StartProfile) -> tuple[bool, str]:
        if self._profile is not None:
            return False, "a profile is running: stop it first"
        import torch

        kinds = {"CPU": torch.profiler.ProfilerActivity.CPU, "GPU": torch.profiler.ProfilerActivity.CUDA}
        if "GPU" in message.activities and not torch.cuda.is_available():
            return False, "activities: there is no GPU to profile"
        folder = Path(message.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{message.name}-{time.strftime('%Y%m%d-%H%M%S')}.trace.json"
        self._left = message.num_steps
        self._profile = torch.profiler.profile(
            activities=[kinds[name] for name in message.activities],
            with_stack=message.with_stack,
            record_shapes=message.record_shapes,
        )
        self._profile.start()
        return True, str(self._path)

    def _stop(self) -> tuple[bool, str]:
        if self._profile is None:
            return False, "no profile is running"
        profile, self._profile = self._profile, None
        profile.stop()
        profile.export_chrome_trace(str(self._path))
        return True, str(self._path)
