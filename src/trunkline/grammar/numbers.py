"""Numbers of JSON as regular languages: bounds and multiples, on the decimal digits.

Values are exact decimals. A number with bounds is written without an exponent and with at most as many digits
as a double tells apart (15), so that whoever reads it as a double finds it within its bounds too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction

from trunkline.grammar.regex import (
    DIGIT,
    EMPTY,
    NOTHING,
    Node,
    both,
    chars,
    concat,
    literal,
    negate,
    repeat,
    union,
)

DOUBLE_DIGITS = 15
MAX_LISTED = 500  # multiples in a range up to which they are listed

_DIGITS = repeat(DIGIT, 0, None)
_NATURAL = union([literal("0"), concat([chars(("1", "9")), _DIGITS])])
_MINUS = repeat(literal("-"), 0, 1)
_SIGN = repeat(chars(("+", "+"), ("-", "-")), 0, 1)
_POINT = literal(".")
INTEGER = union([literal("0"), concat([_MINUS, chars(("1", "9")), _DIGITS])])
NUMBER = concat(
    [
        _MINUS,
        _NATURAL,
        repeat(concat([_POINT, repeat(DIGIT, 1, None)]), 0, 1),
        # Two digits: what a double can't hold as a finite number can't be written.
        repeat(concat([chars(("e", "e"), ("E", "E")), _SIGN, repeat(DIGIT, 1, 2)]), 0, 1),
    ]
)


@dataclass(frozen=True)
class NumberRange:
    """Numbers that are integral, or not, or both, within bounds, multiples of `multiple`."""

    integral: bool = True
    fractional: bool = True
    low: Decimal | None = None
    low_open: bool = False
    high: Decimal | None = None
    high_open: bool = False
    multiple: Decimal | None = None

    def above(self, value: Decimal, *, is_open: bool) -> NumberRange:
        if self.low is None or value > self.low or (value == self.low and is_open):
            return replace(self, low=value, low_open=is_open)
        return self

    def below(self, value: Decimal, *, is_open: bool) -> NumberRange:
        if self.high is None or value < self.high or (value == self.high and is_open):
            return replace(self, high=value, high_open=is_open)
        return self

    def times(self, value: Decimal) -> NumberRange:
        """Multiples of `value` too."""
        if self.multiple is None:
            return replace(self, multiple=value)
        scale = 10 ** max(_places(value), _places(self.multiple))
        return replace(
            self, multiple=Decimal(math.lcm(int(value * scale), int(self.multiple * scale))) / scale
        )

    @property
    def is_empty(self) -> bool:
        if not (self.integral or self.fractional):
            return True
        if self.low is not None and self.high is not None:
            if self.low > self.high or (self.low == self.high and (self.low_open or self.high_open)):
                return True
        return not self.fractional and self.multiple is None and self._integer_node() == NOTHING

    # ------------------------------------------------------------------ languages
    def node(self, *, exponents: bool = True) -> Node | None:
        """None for multiples that no short regex describes: see `step`. `exponents`: numbers without bounds
        may be written with one."""
        if self.multiple is not None:
            return self._multiples()
        if not self.fractional:
            return self._integer_node()
        if exponents and self.integral and self.low is None and self.high is None:
            return NUMBER
        decimals = self._decimals()
        if self.integral:
            return decimals
        whole = concat([_MINUS, _DIGITS, repeat(concat([_POINT, repeat(literal("0"), 1, None)]), 0, 1)])
        return both([decimals, negate(whole)])

    def integers(self) -> tuple[int | None, int | None]:
        """Smallest and greatest integer within the bounds."""
        low = high = None
        if self.low is not None:
            low = int(self.low.to_integral_value(ROUND_CEILING))
            low += self.low_open and low == self.low
        if self.high is not None:
            high = int(self.high.to_integral_value(ROUND_FLOOR))
            high -= self.high_open and high == self.high
        return low, high

    def step(self) -> Decimal:
        """The number of which all these are multiples; an integer if only integers are asked for."""
        assert self.multiple is not None
        step = self.multiple if self.fractional else self.times(Decimal(1)).multiple
        assert step is not None
        return step.normalize()

    def _integer_node(self) -> Node:
        low, high = self.integers()
        if low is None and high is None:
            return INTEGER
        positive = _naturals(max(low or 0, 0), high) if high is None or high >= 0 else NOTHING
        if low is not None and low >= 0:
            return positive
        negative = _naturals(max(1, -high) if high is not None else 1, None if low is None else -low)
        return union([positive, concat([literal("-"), negative])])

    def _decimals(self) -> Node:
        short = union([_NATURAL, *(_with_point(size) for size in range(1, DOUBLE_DIGITS))])
        sides = []
        if self.high is None or self.high >= 0:
            low = (self.low, self.low_open) if self.low is not None and self.low >= 0 else None
            high = (self.high, self.high_open) if self.high is not None else None
            sides.append(both([short, *_between(low, high)]))
        if self.low is None or self.low < 0:
            low = (-self.high, self.high_open) if self.high is not None and self.high <= 0 else None
            high = (-self.low, self.low_open) if self.low is not None else None
            sides.append(concat([literal("-"), both([short, *_between(low, high)])]))
        return union(sides)

    def _multiples(self) -> Node | None:
        step = self.step()
        low, high = self._factors(step)
        if low is not None and high is not None and high - low < MAX_LISTED:
            found = [factor * step for factor in range(low, high + 1)]
            return union(literal(plain_text(value)) for value in found if self._has_kind(value))
        places = _places(step)
        scaled = int(step * 10**places)
        size = next((n for n in range(max(places, 1), 5) if 10**n % scaled == 0), None)
        if size is None or (places and not self.integral):
            return None
        bounded = replace(self, multiple=None).node()
        assert bounded is not None
        return both([_ending_in(range(0, 10**size, scaled), size, places), bounded])

    def _factors(self, step: Decimal) -> tuple[int | None, int | None]:
        """Smallest and greatest k with k * step within the bounds."""
        low = high = None
        if self.low is not None:
            ratio = Fraction(self.low) / Fraction(step)
            low = math.ceil(ratio) + (self.low_open and ratio.denominator == 1)
        if self.high is not None:
            ratio = Fraction(self.high) / Fraction(step)
            high = math.floor(ratio) - (self.high_open and ratio.denominator == 1)
        return low, high

    def _has_kind(self, value: Decimal) -> bool:
        return self.integral if value == value.to_integral_value() else self.fractional


def _with_point(size: int) -> Node:
    """`size` digits before the point, and as many after it as a double can tell apart."""
    whole = DIGIT if size == 1 else concat([chars(("1", "9")), repeat(DIGIT, size - 1, size - 1)])
    return concat([whole, _POINT, repeat(DIGIT, 1, DOUBLE_DIGITS - size)])


def spellings(value: Decimal) -> Node:
    """All ways to write a number without an exponent."""
    whole, _, fraction = plain_text(abs(value)).partition(".")
    zeros = repeat(literal("0"), 0, None)
    if fraction:
        tail = concat([_POINT, literal(fraction), zeros])
    else:
        tail = repeat(concat([_POINT, literal("0"), zeros]), 0, 1)
    sign = _MINUS if value == 0 else literal("-" if value < 0 else "")
    return concat([sign, literal(whole), tail])


def plain_text(value: Decimal) -> str:
    """Canonical decimal digits, without an exponent."""
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def _places(value: Decimal) -> int:
    exponent = value.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _naturals(low: int, high: int | None) -> Node:
    """Digits of the integers from `low` to `high`, without leading zeros."""
    if high is not None and high < low:
        return NOTHING
    options = []
    size = len(str(low))
    while high is None or size <= len(str(high)):
        first = str(low) if size == len(str(low)) else "1" + "0" * (size - 1)
        if high is None and size > len(str(low)):
            options.append(concat([chars(("1", "9")), repeat(DIGIT, size - 1, None)]))
            break
        last = str(high) if high is not None and size == len(str(high)) else "9" * size
        options.append(_same_length(first, last))
        size += 1
    return union(options)


def _same_length(low: str, high: str) -> Node:
    """Digit strings between two of their length."""
    if not low:
        return EMPTY
    rest = len(low) - 1
    if set(low) == {"0"} and set(high) == {"9"}:
        return repeat(DIGIT, len(low), len(low))
    if low[0] == high[0]:
        return concat([literal(low[0]), _same_length(low[1:], high[1:])])
    options = [
        concat([literal(low[0]), _same_length(low[1:], "9" * rest)]),
        concat([literal(high[0]), _same_length("0" * rest, high[1:])]),
    ]
    if ord(high[0]) - ord(low[0]) > 1:
        inner = chars((chr(ord(low[0]) + 1), chr(ord(high[0]) - 1)))
        options.append(concat([inner, repeat(DIGIT, rest, rest)]))
    return union(options)


def _between(low: tuple[Decimal, bool] | None, high: tuple[Decimal, bool] | None) -> list[Node]:
    """Languages whose intersection is the decimals, not negative, within bounds (value, is open)."""
    anything = repeat(concat([_POINT, _DIGITS]), 0, 1)
    found = []
    if low is not None:
        whole, fraction = _split(low[0])
        equal = concat([literal(str(whole)), _fraction_above(fraction, low[1])])
        found.append(union([equal, concat([_naturals(whole + 1, None), anything])]))
    if high is not None:
        whole, fraction = _split(high[0])
        equal = concat([literal(str(whole)), _fraction_below(fraction, high[1])])
        found.append(union([equal, concat([_naturals(0, whole - 1), anything])]))
    return found


def _split(value: Decimal) -> tuple[int, str]:
    whole, _, fraction = plain_text(value).partition(".")
    return int(whole), fraction


def _fraction_above(digits: str, is_open: bool) -> Node:
    some = concat([_DIGITS, chars(("1", "9")), _DIGITS])
    if not digits:
        return concat([_POINT, some]) if is_open else repeat(concat([_POINT, _DIGITS]), 0, 1)
    after: Node = some if is_open else _DIGITS
    for digit in reversed(digits):
        options = [concat([literal(digit), after])]
        if digit < "9":
            options.append(concat([chars((chr(ord(digit) + 1), "9")), _DIGITS]))
        after = union(options)
    return concat([_POINT, after])


def _fraction_below(digits: str, is_open: bool) -> Node:
    zeros = repeat(literal("0"), 0, None)
    if not digits:
        return NOTHING if is_open else repeat(concat([_POINT, zeros]), 0, 1)
    after: Node = NOTHING if is_open else zeros
    for index, digit in enumerate(reversed(digits)):
        # A text that ends before the bound's last digit is below it.
        options = [concat([literal(digit), after if index == 0 else union([EMPTY, after])])]
        if digit > "0":
            options.append(concat([chars(("0", chr(ord(digit) - 1))), _DIGITS]))
        after = union(options)
    return union([EMPTY, concat([_POINT, after])])


def _ending_in(endings: range, size: int, places: int) -> Node:
    """Decimals whose last `size` digits, the last `places` of them after the point, are one of `endings`."""
    by_whole: dict[str, list[Node]] = {}
    for ending in endings:
        digits = f"{ending:0{size}d}"
        whole, fraction = digits[: size - places], digits[size - places :]
        kept = fraction.rstrip("0")
        zeros = repeat(literal("0"), 0, places - len(kept)) if places else EMPTY
        tail = concat([_POINT, literal(kept), zeros]) if kept else EMPTY
        if not kept and places:
            tail = repeat(concat([_POINT, repeat(literal("0"), 1, places)]), 0, 1)
        by_whole.setdefault(whole, []).append(tail)
    options = []
    for whole, tails in by_whole.items():
        tail = union(tails)
        long = concat([chars(("1", "9")), _DIGITS, literal(whole)])
        options.append(concat([union([literal(whole.lstrip("0") or "0"), long]), tail]))
    return concat([_MINUS, union(options)])
