r"""Rules that find the final answer in a completion. They are part of a metric, and every result names the one used.

A rule reads the answer without its reasoning and returns the answer's words, or None. Benchmarks list their rules in
order; the first one is the form that was asked for ("strict"), the others rescue answers given in another form. An arm
that loses accuracy under the first rule only has lost its form, not its knowledge.

- `answer line`: what follows the last "Answer:" (or "answer is") up to the end of its line.
- `after answer`: what follows the last line that begins with "Answer:", to the end of the text.
- `hash`: what follows the last "####" on its line (GSM8K's own form).
- `boxed`: the content of the last \boxed{...}, braces balanced.
- `number on answer line`, `number in box`: the last number in what these rules find.
- `last number`: the last number of the text; commas between digits are dropped.
- `letter on answer line`, `letter in box`: a single capital letter, brackets and a full stop aside.
- `lone letter`: the last line that is nothing but a letter such as "B", "(B)" or "B." or begins like "B. ...".
- `last line`: the last line that is not empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sgworkbench.errors import unknown_name

_NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[-−]?\.\d+")
_ANSWER = re.compile(r"(?i)\b(?:final\s+)?answer\s*(?:\*\*)?\s*(?::|\bis\b)\s*(?:\*\*)?[ \t]*:?[ \t]*(?P<rest>[^\n]*)")
_AFTER = re.compile(r"(?im)^\W{0,4}(?:final\s+)?answer\s*(?:\*\*)?\s*:\s*(?:\*\*)?")
_LETTER = re.compile(r"^\W*(?:option\s+|\\text\{)?([A-Z])(?:\W|$)")
_LONE_LETTER = re.compile(r"^\W*([A-Z])(?:\W*$|[.):]\s)")


@dataclass(frozen=True)
class Extraction:
    """What was found.

    Attributes:
        answer: the answer's words; None when no rule found any.
        rule: the rule that found it, or None.
    """

    answer: str | None
    rule: str | None


def extract(text: str, rules: Sequence[str]) -> Extraction:
    """Apply rules in order and return what the first one finds.

    Raises:
        WorkbenchError: an unknown rule.
    """
    for rule in rules:
        if rule not in RULES:
            raise unknown_name("extraction rule", rule, RULES)
        found = RULES[rule](text)
        if found:
            return Extraction(found, rule)
    return Extraction(None, None)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} whose braces are closed."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for index in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start:index].strip()
    return None


def last_number(text: str | None) -> str | None:
    """Return the last number, without the commas between its digits."""
    found = _NUMBER.findall(text or "")
    return found[-1].replace(",", "").replace("−", "-") if found else None


def _answer_line(text: str) -> str | None:
    found = [match["rest"].strip() for match in _ANSWER.finditer(text)]
    found = [rest.strip("* \t").removesuffix(".") for rest in found if rest.strip("* \t.")]
    return found[-1] if found else None


def _after_answer(text: str) -> str | None:
    found = list(_AFTER.finditer(text))
    return text[found[-1].end() :].strip() or None if found else None


def _hash(text: str) -> str | None:
    found = re.findall(r"####[ \t]*([^\n]+)", text)
    return found[-1].strip() if found else None


def _letter(text: str | None) -> str | None:
    match = _LETTER.match(text or "")
    return match[1] if match else None


def _lone_letter(text: str) -> str | None:
    found = [match[1] for line in text.splitlines() if (match := _LONE_LETTER.match(line.strip()))]
    return found[-1] if found else None


def _last_line(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


RULES: dict[str, Callable[[str], str | None]] = {
    "answer line": _answer_line,
    "after answer": _after_answer,
    "hash": lambda text: last_number(_hash(text)),
    "boxed": last_boxed,
    "number on answer line": lambda text: last_number(_answer_line(text)),
    "number in box": lambda text: last_number(last_boxed(text)),
    "last number": last_number,
    "letter on answer line": lambda text: _letter(_answer_line(text)),
    "letter in box": lambda text: _letter(last_boxed(text)),
    "lone letter": _lone_letter,
    "last line": _last_line,
}
