r"""Whether two mathematical answers are the same, without running anything a model has written.

Text is normalised first (spacing commands, \left and \right, units in \text, degree, dollar and per cent signs). Equal
words are equal. Otherwise both are read by a small grammar (numbers, letters, + - * / ^, \frac, \sqrt, \pi, brackets,
products without a sign) and evaluated, at three fixed points where letters occur; values that agree to 1e-9 are equal.
Lists, tuples and sets compare member by member. What the grammar cannot read counts as words only.

Caveat: agreement at three points is no proof, and functions beyond roots are not read.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Mapping

_LONGEST = 300
_LARGEST_EXPONENT = 200.0
_POINTS = (0.7310585, 1.6180339, -2.2360679)
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|!|,|;|:|quad|qquad|\$|%|mathrm|mathbf|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])|\^\s*\{?\\circ\}?|[$%]"
)
_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|[A-Za-z]|[-+*/^()\[\]{}])")
_SPELLINGS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "\\dfrac": "\\frac", "\\tfrac": "\\frac"}


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same words or the same value."""
    first, second = _normalised(one), _normalised(other)
    if first.replace(" ", "") == second.replace(" ", ""):
        return True
    return any(_same_members(a, b) for a in _readings(first) for b in _readings(second))


def same_number(one: str, other: str) -> bool:
    """Whether two texts are the same number (fractions and decimals compare by value)."""
    values = [_value(_normalised(text), {}) for text in (one, other)]
    return values[0] is not None and values[1] is not None and _close(values[0], values[1])


def _normalised(text: str) -> str:
    text = text.strip().replace("−", "-").replace("\\{", "{ ").removesuffix(".")
    # A unit or a remark stands behind the value; a word alone is the answer itself.
    named = re.sub(r"\\text(?:bf|rm|it)?\{([^{}]*)\}", r"\1", text) if re.match(r"\\text", text) else None
    text = named if named is not None else re.sub(r"\\(?:text|mbox)(?:bf|rm|it)?\{[^{}]*\}", "", text)
    text = _DROPPED.sub("", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return " ".join(text.split())


def _readings(text: str) -> list[str]:
    """The text itself, and what stands behind "x =" or "x \\in"."""
    found = re.match(r"^[A-Za-z](?:\([A-Za-z]\))?\s*(?:=|\\in)\s*(.+)$", text)
    return [text, found[1]] if found else [text]


def _same_members(one: str, other: str) -> bool:
    first, second = _members(one), _members(other)
    if len(first) != len(second):
        return False
    if len(first) > 1:
        unordered = one.startswith("{") and other.startswith("{")
        if not unordered and one[:1] in "([" and other[:1] in "([" and (one[0], one[-1]) != (other[0], other[-1]):
            return False
        if unordered:
            left = list(second)
            for member in first:
                match = next((index for index, each in enumerate(left) if _same_value(member, each)), None)
                if match is None:
                    return False
                left.pop(match)
            return True
    return all(_same_value(a, b) for a, b in zip(first, second, strict=True))


def _members(text: str) -> list[str]:
    """Split at commas outside brackets, after dropping one pair of brackets around a list."""
    parts, depth, start = [], 0, 0
    bracketed = text[:1] in ("(", "[", "{") and text[-1:] in (")", "]", "}") and "," in text
    inner = text[1:-1].removesuffix("\\") if bracketed else text
    for index, character in enumerate(inner):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(inner[start:index])
            start = index + 1
    parts.append(inner[start:])
    return [part.strip() for part in parts]


def _same_value(one: str, other: str) -> bool:
    if one.replace(" ", "") == other.replace(" ", ""):
        return True
    letters = sorted(set(re.findall(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", f"{one} {other}")))
    for point in _POINTS:
        values = {letter: point + 0.37 * index for index, letter in enumerate(letters)}
        first, second = _value(one, values), _value(other, values)
        if first is None or second is None or not _close(first, second):
            return False
    return True


def _close(one: complex, other: complex) -> bool:
    return abs(one - other) <= 1e-9 * max(1.0, abs(one), abs(other))


def _value(text: str, letters: Mapping[str, float]) -> complex | None:
    """Return the value of an expression; None where it is outside the grammar or not finite."""
    try:
        value = _Parser(text, letters).whole()
    except (_Unreadable, ZeroDivisionError, OverflowError, ValueError, RecursionError):
        return None
    return value if cmath.isfinite(value) else None


class _Unreadable(Exception):
    """The text is outside the grammar."""


class _Parser:
    """Recursive descent over one expression, evaluating as it reads."""

    def __init__(self, text: str, letters: Mapping[str, float]) -> None:
        if len(text) > _LONGEST:
            raise _Unreadable
        self._tokens: list[str] = []
        self._letters = letters
        self._at = 0
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None:
                raise _Unreadable
            self._tokens.append(_SPELLINGS.get(match[1], match[1]))
            position = match.end()

    def whole(self) -> complex:
        value = self._sum()
        if self._at < len(self._tokens):
            raise _Unreadable
        return value

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *expected: str) -> str:
        token = self._peek()
        if not token or (expected and token not in expected):
            raise _Unreadable
        self._at += 1
        return token

    def _sum(self) -> complex:
        value = self._product()
        while self._peek() in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> complex:
        value = self._signed()
        while True:
            token = self._peek()
            if token == "*":
                self._take()
                value *= self._signed()
            elif token == "/":
                self._take()
                value /= self._signed()
            elif token and (token in "([{" or token[0].isalnum() or token[0] in "\\."):
                value *= self._power()
            else:
                return value

    def _signed(self) -> complex:
        if self._peek() in ("+", "-"):
            return self._signed() if self._take() == "+" else -self._signed()
        return self._power()

    def _power(self) -> complex:
        base = self._atom()
        if self._peek() != "^":
            return base
        self._take()
        exponent = self._signed() if self._peek() == "-" else self._atom()
        if abs(exponent) > _LARGEST_EXPONENT:
            raise _Unreadable
        return base**exponent

    def _atom(self) -> complex:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            return complex(float(token))
        if token in ("(", "[", "{"):
            value = self._sum()
            self._take({"(": ")", "[": "]", "{": "}"}[token])
            return value
        if token == "\\frac":
            above = self._argument()
            return above / self._argument()
        if token == "\\sqrt":
            degree = complex(2.0)
            if self._peek() == "[":
                degree = self._atom()
            return self._argument() ** (1.0 / degree)
        if token in ("\\pi", "π"):
            return complex(math.pi)
        if token in self._letters:
            return complex(self._letters[token])
        raise _Unreadable

    def _argument(self) -> complex:
        r"""The argument of a command: in braces, or a single digit or letter (\frac12)."""
        token = self._peek()
        if token and token[0].isdigit() and len(token) > 1 and "." not in token:
            self._tokens[self._at : self._at + 1] = list(token)
        return self._atom()
