"""`trunkline version`."""

from __future__ import annotations

import trunkline
from trunkline.types import RequestError


def run(words: list[str]) -> int:
    if words:
        raise RequestError(f"unexpected argument {words[0]!r}", code="unknown_flag", param=words[0])
    print(trunkline.__version__)
    return 0
