"""Multiple-choice items: a small built-in set, and files in the shapes of MMLU-Pro, GPQA and ARC."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.evaluation.costs.item_files import Row, field_of, rank_key, read_rows, sampled, text_of

BUILTIN_CHOICES = "builtin:general-knowledge"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FIELDS: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "Record ID"),
    "question": ("question", "Question", "prompt", "text"),
    "options": ("options", "choices", "Options"),
    "answer": ("answer_index", "answer", "Answer", "answerKey", "label"),
    "category": ("category", "subject", "High-level domain", "Subdomain"),
}
# GPQA keeps the right answer and three wrong ones in columns of their own.
_RIGHT, _WRONG = "Correct Answer", ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@dataclass(frozen=True)
class ChoiceItem:
    """One question with options, one of them right.

    Attributes:
        id: unique within its set.
        question: the question without its options.
        options: two to twenty-six texts.
        answer: 0-based index of the right one.
        category: topic, or an empty string.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    category: str = ""

    @property
    def letter(self) -> str:
        """Letter of the right option."""
        return LETTERS[self.answer]


def load_choice_items(
    source: str | Path, *, fields: Mapping[str, str] | None = None, n: int | None = None, seed: int = 0
) -> list[ChoiceItem]:
    """Read items.

    Args:
        source: `builtin:general-knowledge`, or a .jsonl, .json, .csv, .tsv or .parquet file. Options are a list, a list
            as JSON text, a mapping with a list under `text` (ARC), columns A, B, C ..., or GPQA's "Correct Answer" and
            "Incorrect Answer 1" to 3, whose order is then drawn from `seed` and the item's id.
        fields: maps id, question, options, answer and category to the file's names; `options` may name several columns,
            separated by commas.
        n: how many items to take, chosen by a hash of seed and id and kept in the file's order; None takes all.
        seed: of that choice and of GPQA's order of options.

    Raises:
        WorkbenchError: missing file or field, an answer outside the options, empty options, or an id that occurs twice.
    """
    mapping = dict(fields or {})
    for ours in mapping:
        if ours not in _FIELDS:
            raise unknown_name("item field", ours, _FIELDS)
    if str(source).startswith("builtin:"):
        if str(source) != BUILTIN_CHOICES:
            raise unknown_name("built-in item set", str(source), [BUILTIN_CHOICES])
        data = resources.files("sgworkbench.evaluation.costs").joinpath("data/general_knowledge.jsonl")
        rows: list[Row] = [
            (f"general knowledge, line {number}", json.loads(line))
            for number, line in enumerate(data.read_text("utf-8").splitlines(), start=1)
        ]
    else:
        rows = read_rows(source)
    items = [_item(row, number, mapping, seed) for number, row in enumerate(rows)]
    if len({item.id for item in items}) < len(items):
        raise WorkbenchError(f"An id occurs twice in {str(source)!r}; ids of items must differ.")
    return [items[index] for index in sampled([item.id for item in items], n, seed)]


def _item(row: Row, number: int, mapping: Mapping[str, str], seed: int) -> ChoiceItem:
    where, fields = row
    known = {ours: [name for name in names if name in fields] for ours, names in _FIELDS.items()}
    name = str(field_of(row, "id", _FIELDS["id"], mapping)) if "id" in mapping or known["id"] else str(number)
    has_category = "category" in mapping or known["category"]
    category = field_of(row, "category", _FIELDS["category"], mapping) if has_category else None
    question = text_of(field_of(row, "question", _FIELDS["question"], mapping), "question", where)
    if _RIGHT in fields and "options" not in mapping and "answer" not in mapping:
        options, answer = _gpqa(row, name, seed)
    else:
        options = _options(row, mapping)
        answer = _answer(field_of(row, "answer", _FIELDS["answer"], mapping), options, where)
    return ChoiceItem(name, question.strip(), options, answer, "" if category is None else str(category))


def _gpqa(row: Row, name: str, seed: int) -> tuple[tuple[str, ...], int]:
    texts = [text_of(field_of(row, field, (field,), {}), field, row[0]).strip() for field in (_RIGHT, *_WRONG)]
    order = sorted(range(len(texts)), key=lambda index: rank_key(seed, f"{name}:{index}"))
    return tuple(texts[index] for index in order), order.index(0)


def _options(row: Row, mapping: Mapping[str, str]) -> tuple[str, ...]:
    where, fields = row
    named = [name.strip() for name in mapping.get("options", "").split(",") if name.strip()]
    if len(named) > 1:
        value: Any = [field_of(row, "options", (name,), {}) for name in named]
    elif not named and not any(name in fields for name in _FIELDS["options"]) and "A" in fields and "B" in fields:
        value = [fields[letter] for letter in LETTERS if fields.get(letter) not in (None, "")]
    else:
        value = field_of(row, "options", _FIELDS["options"], mapping)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise WorkbenchError(f"{where}: the options must be a list (or a list as JSON text).") from None
    if isinstance(value, Mapping):
        value = value.get("text")
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(LETTERS):
        found = f"{len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
        raise WorkbenchError(f"{where}: expected a list of 2 to {len(LETTERS)} options, found {found}.")
    return tuple(text_of(option, f"option {LETTERS[index]}", where).strip() for index, option in enumerate(value))


def _answer(value: Any, options: Sequence[str], where: str) -> int:
    """Return the 0-based index an answer stands for: an index, a letter, or the right option word for word."""
    known = f"the options are A to {LETTERS[len(options) - 1]} (or 0 to {len(options) - 1})"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
        index = int(value)
    else:
        text = str(value or "").strip()
        bare = text.strip("().: ").upper()
        if len(bare) == 1 and bare in LETTERS:
            index = LETTERS.index(bare)
        elif text.isdigit():
            index = int(text)
        elif text in options:
            index = options.index(text)
        else:
            raise WorkbenchError(f"{where}: the answer {value!r} is no letter, index or option; {known}.")
    if not 0 <= index < len(options):
        raise WorkbenchError(f"{where}: the answer {value!r} is outside the options; {known}.")
    return index
