r"""Questions whose generated answers can be checked: files of known benchmarks, each with its request and its rules.

A request says in which form to answer and is appended to every question, in every arm alike. The first extraction rule
is that form.

| benchmark | file fields | asked for | checked by |
|---|---|---|---|
| gsm8k | question, answer (number after ####) | Answer: NUMBER | same number |
| math | problem, answer (or solution with \boxed) | \boxed{} | same words or value |
| aime | problem, answer | \boxed{} | same number |
| mmlu-pro | question, options, answer or answer_index | Answer: LETTER | same letter |
| gpqa | Question, Correct Answer, Incorrect Answer 1-3 | Answer: LETTER | same letter |
| humaneval | prompt, entry_point, task_id | a code fence | never executed: form only |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.evaluation.costs.choice_items import LETTERS, load_choice_items
from sgworkbench.evaluation.costs.equality import same_answer, same_number
from sgworkbench.evaluation.costs.extraction import last_boxed, last_number
from sgworkbench.evaluation.costs.item_files import Row, field_of, read_rows, sampled, text_of

_NUMBER_REQUEST = "\n\nThink step by step, and end with the line 'Answer: NUMBER'."
_LETTER_REQUEST = "\n\nEnd with the line 'Answer: LETTER', the letter of the right option."
_BOXED_REQUEST = "\n\nThink step by step, and put the final answer into \\boxed{}."
_CODE_REQUEST = "Complete the Python function below. Give the whole function in one fenced code block.\n\n"
_NUMBER_RULES = ("number on answer line", "hash", "number in box", "last number")
_LETTER_RULES = ("letter on answer line", "letter in box", "lone letter")


@dataclass(frozen=True)
class Question:
    """A question with its right answer.

    Attributes:
        id: unique within its set.
        text: what the user asks, the request for a form included.
        answer: the right answer; for code the name of the function to define.
        is_right: whether an extracted answer is right; None where that is not decided here (code).
    """

    id: str
    text: str
    answer: str
    is_right: Callable[[str], bool] | None


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one benchmark.

    Attributes:
        name: as tables call it.
        questions: the questions, in the file's order.
        rules: extraction rules, the form asked for first; empty for code.
    """

    name: str
    questions: tuple[Question, ...]
    rules: tuple[str, ...]

    @property
    def is_code(self) -> bool:
        """Whether answers are code, of which only the form is looked at."""
        return not self.rules


def load_questions(
    benchmark: str,
    source: str | Path,
    *,
    fields: Mapping[str, str] | None = None,
    n: int | None = None,
    seed: int = 0,
) -> QuestionSet:
    """Read the file of a benchmark (.jsonl, .json, .csv, .tsv, .parquet).

    Args:
        benchmark: a name of `BENCHMARKS`.
        source: the file.
        fields: maps question, answer and id (for choices also options) to the file's names.
        n: how many questions, chosen by a hash of seed and id; None takes all.
        seed: of that choice.

    Raises:
        WorkbenchError: unknown benchmark, missing file or field, or an answer that cannot be one.
    """
    if benchmark not in BENCHMARKS:
        raise unknown_name("benchmark", benchmark, BENCHMARKS)
    mapping = dict(fields or {})
    if benchmark in ("mmlu-pro", "gpqa"):
        return _choices(benchmark, source, mapping, n, seed)
    for ours in mapping:
        if ours not in ("id", "question", "answer"):
            raise unknown_name("question field", ours, ("id", "question", "answer"))
    questions = [_question(benchmark, row, number, mapping) for number, row in enumerate(read_rows(source))]
    if len({question.id for question in questions}) < len(questions):
        raise WorkbenchError(f"An id occurs twice in {str(source)!r}; ids of questions must differ.")
    kept = sampled([question.id for question in questions], n, seed)
    return QuestionSet(benchmark, tuple(questions[index] for index in kept), BENCHMARKS[benchmark])


BENCHMARKS: dict[str, tuple[str, ...]] = {
    "gsm8k": _NUMBER_RULES,
    "math": ("boxed", "answer line", "last number"),
    "aime": ("number in box", "number on answer line", "last number"),
    "mmlu-pro": _LETTER_RULES,
    "gpqa": _LETTER_RULES,
    "humaneval": (),
}
"""Extraction rules by benchmark, the form asked for first."""


def _choices(benchmark: str, source: str | Path, mapping: Mapping[str, str], n: int | None, seed: int) -> QuestionSet:
    questions = []
    for item in load_choice_items(source, fields=mapping, n=n, seed=seed):
        options = "\n".join(f"{LETTERS[index]}. {option}" for index, option in enumerate(item.options))
        text = f"{item.question}\n\n{options}{_LETTER_REQUEST}"
        questions.append(Question(item.id, text, item.letter, item.letter.__eq__))
    return QuestionSet(benchmark, tuple(questions), BENCHMARKS[benchmark])


def _question(benchmark: str, row: Row, number: int, mapping: Mapping[str, str]) -> Question:
    where, fields = row
    ids = ("id", "task_id", "unique_id", "ID")
    found = next((name for name in ids if name in fields), None)
    name = str(field_of(row, "id", ids, mapping)) if "id" in mapping or found else str(number)
    if benchmark == "humaneval":
        stub = text_of(field_of(row, "question", ("prompt",), mapping), "prompt", where)
        entry_point = text_of(field_of(row, "answer", ("entry_point",), mapping), "entry point", where)
        return Question(name, f"{_CODE_REQUEST}```python\n{stub.strip()}\n```", entry_point, None)
    names = ("question", "problem", "Problem", "Question")
    text = text_of(field_of(row, "question", names, mapping), "question", where).strip()
    if benchmark == "math":
        given = text_of(field_of(row, "answer", ("answer", "solution"), mapping), "answer", where)
        answer = last_boxed(given) or given.strip()
        return Question(name, text + _BOXED_REQUEST, answer, lambda said: same_answer(said, answer))
    given = text_of(field_of(row, "answer", ("answer", "Answer"), mapping), "answer", where)
    right = last_number(given.rsplit("####", 1)[-1])
    if right is None:
        raise WorkbenchError(f"{where}: the answer of a {benchmark} question must hold a number, found {given[:40]!r}.")
    request = _NUMBER_REQUEST if benchmark == "gsm8k" else _BOXED_REQUEST
    return Question(name, text + request, right, lambda said: same_number(said, right))
