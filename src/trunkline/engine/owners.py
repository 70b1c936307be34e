"""Which frontend each request of a core belongs to: several processes may share one core."""

from __future__ import annotations

from collections.abc import Iterable

from trunkline.engine.core import EngineCore
from trunkline.messages import Abort, AddRequest, FromCore, Gone, Outputs, ToCore, TokensOut


class Owners:
    """Passes messages to a core and says to which frontend each answer goes. A request's outputs go to the
    one that it came from, which alone may abort it by its id."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._owner: dict[str, int] = {}  # live requests
        self._gone: set[int] = set()  # frontends that have died; numbers are not used again

    def handle(self, origin: int, message: ToCore) -> list[tuple[int, FromCore]]:
        match message:
            case AddRequest():
                if origin in self._gone:
                    return []  # its last words came on another line than the news of its death
                refusals = self._core.handle(message)
                if not refusals:
                    self._owner[message.rid] = origin
                return [(origin, refusal) for refusal in refusals]
            case Gone():
                self._gone.add(message.frontend)
                for rid in [rid for rid, owner in self._owner.items() if owner == message.frontend]:
                    self._core.handle(Abort(rid))
                    del self._owner[rid]
                return []
            case Abort(all=False):
                if self._owner.get(message.rid) != origin:
                    return []  # it has ended, and somebody else may have its id now
                del self._owner[message.rid]
        answers: list[tuple[int, FromCore]] = []
        for answer in self._core.handle(message):
            if isinstance(answer, Outputs):
                answers += self.sort(answer.items)
            else:
                answers.append((origin, answer))
        return answers

    def sort(self, items: Iterable[TokensOut]) -> list[tuple[int, FromCore]]:
        """Outputs by frontend, in their order."""
        found: dict[int, list[TokensOut]] = {}
        for item in items:
            owner = self._owner[item.rid] if item.finish is None else self._owner.pop(item.rid)
            found.setdefault(owner, []).append(item)
        return [(owner, Outputs(outputs)) for owner, outputs in found.items()]
