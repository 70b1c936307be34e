"""Rules for the members of an object: in any order, each name once, as many as are asked for.

The rule carries a state: a bit for each property with a name, and a count of the other members.
Conditions are chosen so that from every state that can be reached the object can still be finished.
"""

from __future__ import annotations

from typing import Protocol

from trunkline.grammar.document import refuse, too_complex
from trunkline.grammar.facts import Goal
from trunkline.grammar.json_text import Layout, constant, quoted
from trunkline.grammar.rules import GrammarText, conjunction, disjunction
from trunkline.grammar.shapes import ObjectShape, Property

MAX_BITS = 48  # properties that a rule's state follows; more come in the order in which they are listed
OTHERS = "[48:56]"  # count of members without names of their own
MAX_EXTRA = 250
MAX_CHOICE = 450  # properties in a row that may be left out: the parser takes no more at once


class Writer(Protocol):
    """What the objects' rules need of the schema's writer."""

    layout: Layout
    ordered: bool
    grammar: GrammarText
    comma: str
    productive: set[Goal]

    def rule(self, goal: Goal) -> str: ...


class ObjectWriter:
    """One shape, with the goals that are known to have values."""

    def __init__(self, writer: Writer, shape: ObjectShape) -> None:
        self._writer = writer
        self._colon = writer.grammar.terminal(writer.layout.after(":"))
        self._shape = shape
        self._classes = [one for one in shape.classes if one.goal in writer.productive]
        self._depends: set[tuple[str, str]] = set()
        self.has_value = True
        self._properties = self._possible()
        required = sum(one.required for one in self._properties)
        self._low = max(shape.low - required, 0)
        self._high = None if shape.high is None else shape.high - required
        self._optional = len(self._properties) - required
        if self._high is not None and (self._high < 0 or self._low > self._high):
            self.has_value = False
        if not self._classes:
            if self._low > self._optional:
                self.has_value = False
            if self._high is not None and self._high >= self._optional:
                self._high = None

    def _possible(self) -> list[Property]:
        """Properties that there can be, and those that others make required."""
        found = {one.name: one for one in self._shape.properties if one.goal in self._writer.productive}
        if any(one.required and one.name not in found for one in self._shape.properties):
            self.has_value = False
        self._depends = _closure(set(self._shape.depends))
        for name, needed in sorted(self._depends):
            if needed not in found:
                if name in found and found[name].required:
                    self.has_value = False
                found.pop(name, None)
        for name, needed in sorted(self._depends):
            if name in found and found[name].required and not found[needed].required:
                found[needed] = Property(needed, found[needed].goal, True)
        self._depends = {
            (name, needed) for name, needed in self._depends if name in found and not found[needed].required
        }
        return list(found.values())

    # ------------------------------------------------------------------ writing
    def write(self) -> str:
        """The option for these objects, braces and all."""
        grammar = self._writer.grammar
        if self._classes and self._low > 1:
            refuse(self._shape.pointer, "minProperties counts properties whose names may be equal")
        if max(self._low, self._high or 0) > MAX_EXTRA:
            too_complex(self._shape.pointer, f"counts over {MAX_EXTRA} properties")
        if self._depends and self._high is not None:
            refuse(self._shape.pointer, "maxProperties beside dependentRequired")
        plain = not self._depends and not self._low and self._high is None
        if not self._properties:
            body = self._map()
        elif len(self._properties) <= MAX_BITS and (
            grammar.has_states or not (plain and self._writer.ordered)
        ):
            body = self._stateful()
        elif plain and self._longest_choice() <= MAX_CHOICE:
            body = self._chain()
        else:
            why = f"over {MAX_CHOICE} optional properties, or conditions between over {MAX_BITS}"
            too_complex(self._shape.pointer, why)
        return f"{grammar.text('{')} {body} {grammar.text('}')}"

    def _member(self, name: str, goal: Goal) -> str:
        writer = self._writer
        key = writer.grammar.terminal(constant(name, writer.layout))
        return f"{key} {self._colon} {writer.rule(goal)}"

    def _others(self) -> list[str]:
        writer = self._writer
        return [
            f"{writer.grammar.terminal(quoted(one.names))} {self._colon} {writer.rule(one.goal)}"
            for one in self._classes
        ]

    def _map(self) -> str:
        """No property has a name of its own."""
        if not self._classes or self._high == 0:
            return ""
        grammar, comma = self._writer.grammar, self._writer.comma
        member, rule = grammar.new_rule(), grammar.new_rule()
        grammar.define(member, self._others())
        most = "" if self._high is None else self._high - 1
        options = [member if self._high == 1 else f"{member} ({comma} {member}){{0,{most}}}"]
        grammar.define(rule, [*options, *(['""'] if self._low == 0 else [])])
        return rule

    def _stateful(self) -> str:
        grammar, comma = self._writer.grammar, self._writer.comma
        first, rest, other = (grammar.new_rule() for _ in range(3))
        if self._classes:
            grammar.define(other, self._others())
        for rule, mark in ((first, ""), (rest, f"{comma} ")):
            options = [f'"" %if {conjunction(self._done())}']
            for place, one in enumerate(self._properties):
                open_ = conjunction(self._may_follow(place, one))
                member = self._member(one.name, one.goal)
                options.append(f"{mark}{member} {rest}::set_bit({self._bit(one.name)}) %if {open_}")
            if self._classes:
                after = f"{rest}::incr({OTHERS})"
                if self._high is None:  # at most whether there is one matters
                    after = f"{rest}::set_bit(48)" if self._low or self._writer.ordered else f"{rest}::_"
                options.append(f"{mark}{other} {after} %if {conjunction(self._others_may_follow())}")
            grammar.define(rule, options, parametric=True)
        return f"{first}::0x0"

    def _bit(self, name: str) -> int:
        """Required properties first, so that the others can be counted."""
        ordered = sorted(self._properties, key=lambda one: not one.required)
        return next(bit for bit, one in enumerate(ordered) if one.name == name)

    def _optional_bits(self) -> str:
        count = len(self._properties)
        return f"[{count - self._optional}:{count}]"

    def _done(self) -> list[str]:
        conditions = [f"bit_set({self._bit(one.name)})" for one in self._properties if one.required]
        conditions += [self._kept(name, needed) for name, needed in sorted(self._depends)]
        return conditions + self._at_least(self._low)

    def _at_least(self, count: int) -> list[str]:
        """At least so many members that are not required, of which one may be without a name of its own."""
        if count <= 0:
            return []
        options = [f"bit_count_ge({self._optional_bits()}, {count})"] if self._optional >= count else []
        return [disjunction([*options, *([f"ge({OTHERS}, 1)"] if self._classes else [])])]

    def _kept(self, name: str, needed: str) -> str:
        return f"or(bit_clear({self._bit(name)}), bit_set({self._bit(needed)}))"

    def _room(self) -> list[str]:
        """Is one more member that is not required still allowed?"""
        if self._high is None:
            return []
        if not self._optional:
            return [f"lt({OTHERS}, {self._high})"]
        bits = self._optional_bits()
        if not self._classes:
            return [f"bit_count_lt({bits}, {self._high})"]
        named = range(min(self._optional + 1, self._high))
        return [
            disjunction([f"and(bit_count_eq({bits}, {n}), lt({OTHERS}, {self._high - n}))" for n in named])
        ]

    def _may_follow(self, place: int, one: Property) -> list[str]:
        conditions = [f"bit_clear({self._bit(one.name)})"]
        if not one.required:
            conditions += self._room()
        if self._writer.ordered:
            before, after = self._properties[:place], self._properties[place + 1 :]
            conditions += [f"bit_clear({self._bit(p.name)})" for p in after]
            conditions += [f"bit_set({self._bit(p.name)})" for p in before if p.required]
            if self._classes:
                conditions.append(f"is_zeros({OTHERS})")
            earlier = {p.name for p in before}
            for name, needed in sorted(self._depends):
                if needed in earlier:
                    met = f"bit_set({self._bit(needed)})" if name == one.name else self._kept(name, needed)
                    conditions.append(met)
            left = sum(not p.required for p in after) + (not one.required)
            if not self._classes:
                conditions += self._at_least(self._low - left)
        return conditions

    def _others_may_follow(self) -> list[str]:
        conditions = self._room()
        if self._writer.ordered:
            conditions += [f"bit_set({self._bit(one.name)})" for one in self._properties if one.required]
            conditions += [self._kept(name, needed) for name, needed in sorted(self._depends)]
        return conditions

    def _longest_choice(self) -> int:
        longest = run = 0
        for one in self._properties:
            run = 0 if one.required else run + 1
            longest = max(longest, run)
        return longest

    def _chain(self) -> str:
        """Many properties, in the order in which they are listed: a rule for what may follow each."""
        grammar, comma = self._writer.grammar, self._writer.comma
        later, first = grammar.new_rule(), grammar.new_rule()
        others = grammar.new_rule()
        if self._classes:
            grammar.define(others, self._others())
            grammar.define(later, [f"({comma} {others})*"])
            grammar.define(first, [f"{others} ({comma} {others})*", '""'])
        else:
            grammar.define(later, ['""'])
            grammar.define(first, ['""'])
        for one in reversed(self._properties):
            member = grammar.new_rule()
            grammar.define(member, [self._member(one.name, one.goal)])
            new_later, new_first = grammar.new_rule(), grammar.new_rule()
            grammar.define(new_later, [f"{comma} {member} {later}", *([] if one.required else [later])])
            grammar.define(new_first, [f"{member} {later}", *([] if one.required else [first])])
            later, first = new_later, new_first
        return first


def _closure(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """What each property needs, directly or not."""
    while True:
        more = {(a, d) for a, b in pairs for c, d in pairs if b == c and a != d} - pairs
        if not more:
            return {(a, b) for a, b in pairs if a != b}
        pairs = pairs | more
