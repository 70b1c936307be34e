"""`python -m` this module MODULE WORDS: runs MODULE as a program that ends when standard input does.

Standard input is a pipe whose other end the parent holds and never writes to, so it ends with the parent,
however that ends. A signal asked for at the parent's death would come when the starting *thread* ends.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time

from trunkline.config.cli import shift_argv

GRACE = 10.0  # seconds between the wish to end and the end by force


def _watch(lifeline: int) -> None:
    while os.read(lifeline, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def main() -> None:
    lifeline = os.dup(0)  # not inherited, unlike standard input, which is nobody else's business
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_watch, args=(lifeline,), name="lifeline", daemon=True).start()
    runpy.run_module(shift_argv(), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
