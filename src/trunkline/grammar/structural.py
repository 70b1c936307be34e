"""Structural tags: free text in which certain marks start a constrained segment, for example a tool call.

Read are SGLang's form ({"structures": [{begin, schema, end}], "triggers": [...]}) and of xgrammar's
({"format": {"type": ...}}) the types in FORMATS. Free text runs up to the first mark that may follow it, and
holds none of the marks; what can only end with the whole text can't have anything after it.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from trunkline.grammar.json_text import Layout
from trunkline.grammar.protocol import GrammarError
from trunkline.grammar.regex import EVERYTHING, both, concat, literal, match_language, negate, union
from trunkline.grammar.rules import GrammarText
from trunkline.grammar.schema import add_schema

FORMATS = frozenset(
    "const_string json_schema regex any_text sequence or optional tag triggered_tags "
    "tags_with_separator".split()
)
MAX_DEPTH = 30
_NUMERIC = frozenset("0123456789.eE+-")


def structural_grammar(grammar: GrammarText, source: str, layout: Layout, *, ordered: bool = False) -> None:
    """Write a tag's rules. `ordered`: members of objects come in the order of their schema.
    Raises GrammarError with a pointer into the tag."""
    try:
        tag = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the structural tag is no JSON: {error}", code="invalid_grammar") from error
    if not isinstance(tag, dict) or tag.get("type", "structural_tag") != "structural_tag":
        _invalid("", 'expected an object of type "structural_tag"')
    writer = _Writer(grammar, layout, ordered)
    if "format" in tag:
        written = writer.element(tag["format"], "/format", "", 0)
    else:
        try:
            written = writer.element(_from_structures(tag), "", "", 0)
        except GrammarError as error:
            place = re.sub("^/tags/([0-9]+)(/content/json_schema)?", _as_structure, error.pointer)
            raise GrammarError(error.message, code=error.code, pointer=place) from error
    grammar.define("start", [written])


def _as_structure(place: re.Match[str]) -> str:
    return f"/structures/{place[1]}" + ("/schema" if place[2] else "")


def _from_structures(tag: dict[str, Any]) -> dict[str, Any]:
    structures = tag.get("structures")
    if not isinstance(structures, list) or not structures:
        _invalid("/structures", "expected a list of structures")
    tags = []
    for index, one in enumerate(structures):
        if not isinstance(one, dict):
            _invalid(f"/structures/{index}", "expected an object")
        content = {"type": "json_schema", "json_schema": one.get("schema", {"type": "object"})}
        tags.append({"begin": one.get("begin"), "content": content, "end": one.get("end", "")})
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


def _invalid(pointer: str, why: str) -> NoReturn:
    raise GrammarError(
        f"{why}, at {pointer or 'the root'} of the structural tag", code="invalid_grammar", pointer=pointer
    )


def _refuse(pointer: str, why: str) -> NoReturn:
    raise GrammarError(
        f"{why}, at {pointer or 'the root'} of the structural tag",
        code="unsupported_grammar",
        pointer=pointer,
    )


def _text(value: Any, pointer: str) -> str:
    if not isinstance(value, str):
        _invalid(pointer, "expected a text")
    return value


class _Writer:
    def __init__(self, grammar: GrammarText, layout: Layout, ordered: bool) -> None:
        self.grammar = grammar
        self._layout = layout
        self._ordered = ordered

    def element(self, format_: Any, pointer: str, end: str, depth: int) -> str:
        """Right side for a format that is followed by the text `end`, which it takes with it; "": by nothing
        that is known here."""
        if not isinstance(format_, dict) or not isinstance(format_.get("type"), str):
            _invalid(pointer, "expected an object with a type")
        if depth > MAX_DEPTH:
            raise GrammarError("the tag is nested too deep", code="grammar_too_complex", pointer=pointer)
        match format_["type"]:
            case "const_string":
                return self._after(self._literal(_text(format_.get("value"), f"{pointer}/value")), end)
            case "json_schema":
                return self._schema(format_.get("json_schema"), f"{pointer}/json_schema", end)
            case "regex":
                pattern = _text(format_.get("pattern"), f"{pointer}/pattern")
                node = match_language(pattern)
                if self.grammar.special_at(end) == 0:  # no text goes on into it
                    return f"{self.grammar.terminal(node)} {self.grammar.text(end)}"
                if end:  # one terminal: the pattern might go on into what ends it
                    node = concat([both([node, self._without([end])]), literal(end)])
                return self.grammar.terminal(node)
            case "any_text":
                return self._any_text(format_, pointer, end)
            case "sequence":
                return self._sequence(format_.get("elements"), pointer, end, depth)
            case "or":
                return self._or(format_.get("elements"), pointer, end, depth)
            case "optional":
                return self._optional(format_.get("content"), pointer, end, depth)
            case "tag":
                return self._tag(format_, pointer, end, depth)
            case "tags_with_separator":
                return self._separated(format_, pointer, end, depth)
            case "triggered_tags":
                return self._triggered(format_, pointer, end, depth)
        _refuse(f"{pointer}/type", f"the format {format_['type'][:40]!r} is not supported")

    def _literal(self, text: str) -> str:
        return self.grammar.text(text) if text else '""'

    def _joined(self, *parts: str) -> str:
        return " ".join(part for part in parts if part)

    def _after(self, written: str, end: str) -> str:
        return f"{written} {self.grammar.text(end)}" if end else written

    def _schema(self, schema: Any, pointer: str, end: str) -> str:
        if end[:1] in _NUMERIC and end:
            _refuse(pointer, "a value that is followed by a text that could belong to a number")
        try:
            rule = add_schema(self.grammar, json.dumps(schema), self._layout, ordered=self._ordered)
        except GrammarError as error:
            place = pointer + error.pointer
            raise GrammarError(error.message, code=error.code, pointer=place) from error
        return self._after(rule, end)

    @staticmethod
    def _without(marks: list[str]) -> Any:
        return negate(union([concat([EVERYTHING, literal(mark), EVERYTHING]) for mark in marks]))

    def _until(self, mark: str) -> str:
        """A rule for free text up to and with the first `mark`."""
        special = self.grammar.special_at(mark)
        if special == 0:  # which free text has none of
            return f"{self.grammar.terminal(EVERYTHING)} {self.grammar.text(mark)}"
        if special > 0:
            _refuse("", f"free text before {mark[:40]!r}, which holds a special token behind other text")
        rule = self.grammar.new_rule()
        self.grammar.define_until(rule, mark)
        return rule

    def _any_text(self, format_: dict[str, Any], pointer: str, end: str) -> str:
        if format_.get("excludes"):
            _refuse(f"{pointer}/excludes", "excluded texts are not supported")
        return self._until(end) if end else self.grammar.terminal(EVERYTHING)

    def _elements(self, elements: Any, pointer: str) -> list[Any]:
        if not isinstance(elements, list) or not elements:
            _invalid(f"{pointer}/elements", "expected a list of formats")
        return elements

    def _sequence(self, elements: Any, pointer: str, end: str, depth: int) -> str:
        found = self._elements(elements, pointer)
        written = []
        for index, one in enumerate(found):
            last = index == len(found) - 1
            place = f"{pointer}/elements/{index}"
            if not last and _is_open(one):
                _refuse(place, "text without an end of its own, followed by something else")
            written.append(self.element(one, place, end if last else "", depth + 1))
        return " ".join(written)

    def _or(self, elements: Any, pointer: str, end: str, depth: int) -> str:
        found = self._elements(elements, pointer)
        if len(found) > 1 and any(map(_is_open, found)):
            _refuse(pointer, "a choice between free text and something else")
        options = [
            self.element(one, f"{pointer}/elements/{index}", end, depth + 1)
            for index, one in enumerate(found)
        ]
        return f"({' | '.join(options)})"

    def _tag(self, format_: dict[str, Any], pointer: str, end: str, depth: int, begun: str = "") -> str:
        """`begun`: how much of its beginning is written already."""
        begin = _text(format_.get("begin"), f"{pointer}/begin")[len(begun) :]
        own_end = format_.get("end", "")
        if isinstance(own_end, list):
            if len(own_end) != 1:
                _refuse(f"{pointer}/end", "several ends")
            own_end = own_end[0]
        own_end = _text(own_end, f"{pointer}/end")
        content = format_.get("content")
        if not own_end and (end == "" or not _is_open(content)):
            inner = self.element(content, f"{pointer}/content", end, depth + 1)
            return self._joined(self._literal(begin) if begin else "", inner)
        inner = self.element(content, f"{pointer}/content", own_end, depth + 1)
        return self._after(self._joined(self._literal(begin) if begin else "", inner), end)

    def _optional(self, content: Any, pointer: str, end: str, depth: int) -> str:
        if _is_open(content):
            _refuse(pointer, "text without an end of its own that may be left out")
        return self._after(f"({self.element(content, f'{pointer}/content', '', depth + 1)})?", end)

    def _separated(self, format_: dict[str, Any], pointer: str, end: str, depth: int) -> str:
        """Tags with a text between them, and nothing else."""
        for word in format_:
            if word not in ("type", "tags", "separator", "at_least_one", "stop_after_first"):
                _refuse(f"{pointer}/{word}", "an option that is not supported")
        tags = format_.get("tags")
        if not isinstance(tags, list) or not tags:
            _invalid(f"{pointer}/tags", "expected a list of tags")
        separator = _text(format_.get("separator", ""), f"{pointer}/separator")
        options = []
        for index, tag in enumerate(tags):
            place = f"{pointer}/tags/{index}"
            if not isinstance(tag, dict) or tag.get("type") != "tag":
                _invalid(place, "expected a tag")
            if _is_open(tag):
                _refuse(place, "a tag without an end, followed by another")
            options.append(self.element(tag, place, "", depth + 1))
        one = self.grammar.new_rule()
        self.grammar.define(one, options)
        more = self._joined(self.grammar.text(separator) if separator else "", one)
        written = one if format_.get("stop_after_first") else f"{one} ({more})*"
        if not format_.get("at_least_one"):
            written = f"({written})?"
        return self._after(written, end)

    def _triggered(self, format_: dict[str, Any], pointer: str, end: str, depth: int) -> str:
        triggers, tags = format_.get("triggers"), format_.get("tags")
        if (
            not isinstance(triggers, list)
            or not triggers
            or not all(isinstance(t, str) and t for t in triggers)
        ):
            _invalid(f"{pointer}/triggers", "expected a list of texts that are not empty")
        if not isinstance(tags, list) or not tags or not all(isinstance(tag, dict) for tag in tags):
            _invalid(f"{pointer}/tags", "expected a list of tags")
        for word in format_:
            if word not in ("type", "triggers", "tags", "at_least_one", "stop_after_first"):
                _refuse(f"{pointer}/{word}", "an option that is not supported")
        marks = [*dict.fromkeys(triggers), *([end] if end else [])]
        for one in marks:
            for other in marks:
                if one != other and one in other:
                    _refuse(f"{pointer}/triggers", f"mark {one[:40]!r} is a part of mark {other[:40]!r}")
        segment = self.grammar.new_rule()
        self.grammar.define(segment, self._segments(triggers, tags, pointer, depth))
        return self._repeated(format_, segment, marks, end)

    def _segments(self, triggers: list[str], tags: list[Any], pointer: str, depth: int) -> list[str]:
        """For each trigger: free text up to it, then one of the tags that it starts."""
        options = []
        unused = dict(enumerate(tags))
        for trigger in dict.fromkeys(triggers):
            rests: list[str] = []
            written = []
            for index, tag in enumerate(tags):
                place = f"{pointer}/tags/{index}"
                begin = _text(tag.get("begin"), f"{place}/begin")
                if not begin.startswith(trigger):
                    continue
                unused.pop(index, None)
                if any(
                    rest != begin and (rest.startswith(begin) or begin.startswith(rest)) for rest in rests
                ):
                    _refuse(f"{place}/begin", "a beginning that goes on where another one ends")
                rests.append(begin)
                written.append(self._tag(tag, place, "", depth + 1, begun=trigger))
            if written:
                options.append(f"{self._until(trigger)} ({' | '.join(written)})")
        for index in unused:
            _invalid(f"{pointer}/tags/{index}/begin", "starts with none of the triggers")
        return options

    def _repeated(self, format_: dict[str, Any], segment: str, marks: list[str], end: str) -> str:
        spelled = [mark for mark in marks if self.grammar.special_at(mark) != 0]
        free = self._without(spelled) if spelled else EVERYTHING
        tail = self._until(end) if end else self.grammar.terminal(free)
        if format_.get("stop_after_first"):
            done = self._after(segment, end)
            return done if format_.get("at_least_one") else f"({done} | {tail})"
        return f"{segment}{'+' if format_.get('at_least_one') else '*'} {tail}"


def _is_open(format_: Any) -> bool:
    """Does it end only where something else, or the text, ends it?"""
    if not isinstance(format_, dict):
        return False
    match format_.get("type"):
        case "any_text" | "regex":
            return True
        case "triggered_tags":
            return not (format_.get("stop_after_first") and format_.get("at_least_one"))
        case "sequence" | "or":
            elements = format_.get("elements")
            return isinstance(elements, list) and any(map(_is_open, elements))
        case "optional":
            return _is_open(format_.get("content"))
        case "tag":
            return not format_.get("end") and _is_open(format_.get("content"))
    return False
