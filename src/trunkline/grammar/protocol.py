"""What the engine knows of a grammar: spec -> backend -> compiled grammar -> one matcher for each request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trunkline.types import GrammarKind as GrammarKind
from trunkline.types import GrammarSpec as GrammarSpec
from trunkline.types import RequestError

MaskRow = npt.NDArray[np.int32]


class GrammarError(RequestError):
    """A constraint that can't be honoured exactly. `pointer` is a JSON pointer into a schema or structural
    tag; "" is the whole of it.

    Codes: `invalid_grammar` (malformed, or nothing matches), `unsupported_grammar` (well-formed, but nothing
    here enforces it exactly), `grammar_too_complex` (over its budget of time, memory or work),
    `grammar_unavailable` (the fault is here; status 500).
    """

    def __init__(self, message: str, *, code: str, param: str | None = None, pointer: str = "") -> None:
        status = 500 if code == "grammar_unavailable" else 400
        super().__init__(message, code=code, param=param, status=status)
        self.pointer = pointer

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_error, (self.message, self.code, self.param, self.pointer)


def _rebuild_error(message: str, code: str, param: str | None, pointer: str) -> GrammarError:
    return GrammarError(message, code=code, param=param, pointer=pointer)


class Matcher(Protocol):
    """Where one request stands in its grammar. Used by one thread at a time; matchers of several requests may
    be used by several threads at once (masks are computed with the interpreter lock released)."""

    def fill_mask(self, row: MaskRow) -> None:
        """Overwrite `row`, int32 [words >= ceil(vocabulary / 32)], contiguous: bit (t & 31) of word t >> 5
        is 1 where token t may come next. EOS tokens are set where the grammar may end here; other special
        tokens and ids that are no token never are. At least one bit is set.

        Raises GrammarError (`grammar_too_complex`) when the grammar exceeds its work limit here: the request
        ends, its matcher is of no more use.
        """

    def prepare(self, matchers: Sequence[Matcher]) -> None:
        """Compute the masks of these, which have the same backend, in parallel, for `fill_mask` to copy: as
        long as the slowest takes; what fails says so in `fill_mask`. Nothing but time depends on it."""

    def accept(self, token_id: int) -> bool:
        """Take one token; EOS too, where the grammar may end. False, and nothing changed, if not allowed."""

    def rollback(self, count: int) -> None:
        """Undo the last `count` accepted tokens. Raises ValueError for more than were accepted."""

    def forced(self) -> list[int]:
        """Tokens that must come next and that the tokenizer itself puts there; not accepted by this call.

        Appending them (after `accept` of each) leaves a token sequence that the tokenizer itself produces
        for the text: see docs/decisions/0009-jump-forward.md. Never holds EOS. Often empty.
        """

    def fork(self) -> Matcher:
        """An independent matcher in the same state."""

    @property
    def finished(self) -> bool:
        """Nothing but EOS may follow, or EOS was taken."""


class Grammar(Protocol):
    """A compiled grammar: immutable, shared by the matchers of many requests and threads."""

    @property
    def num_bytes(self) -> int:
        """Estimate of what it holds in memory, for the cache's bound."""

    def matcher(self) -> Matcher:
        """A matcher at the start; cheap."""


class Vocabulary(Protocol):
    """What a backend asks of the tokenizer: `trunkline.text.tokenizer.Tokenizer` is one."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def piece(self, token_id: int) -> bytes:
        """Bytes of one token; empty for an id that is no token."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def encode_words(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, without those that are put around a text, and for each the number of its word: a stretch
        of text that is encoded without regard to what stands around it."""
