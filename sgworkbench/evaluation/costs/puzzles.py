"""reasoning-gym's seeded puzzle generators as an offline source of questions, with the package's own verifiers.

Some of its verifiers hand the answer to `eval` or to sympy's parser, which evaluates it. What a model has written is
never executed here, so these generators are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.evaluation.costs.question_sets import Question, QuestionSet

RULES = ("after answer", "boxed", "last line")
NUMBER_RULES = ("after answer", "boxed", "last number")
"""Used where every answer is a number: verifiers want the number alone, not the line it ends."""
REQUEST = "\n\nEnd with the line 'Answer:' followed by the answer alone."
EVALUATING = frozenset(
    {
        "binary_matrix", "codeio", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
        "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
    }
)  # fmt: skip
"""Generators whose verifier, or whose making, evaluates text as code (reasoning-gym 0.1.25)."""


def puzzle_names() -> tuple[str, ...]:
    """Return the generators that can be used.

    Raises:
        WorkbenchError: the package is not installed.
    """
    return tuple(sorted(set(_package().factory.DATASETS) - EVALUATING))


def load_puzzles(
    generator: str, *, n: int = 50, seed: int = 0, options: Mapping[str, Any] | None = None
) -> QuestionSet:
    """Generate questions; the same generator, size, seed and options give the same ones.

    Args:
        generator: name of a generator, such as `basic_arithmetic`.
        n: how many.
        seed: of the generator.
        options: the generator's own settings, such as {"max_terms": 3}.

    Raises:
        WorkbenchError: the package is not installed, an unknown generator, one that would execute answers, or options
            the generator does not take.
    """
    package = _package()
    names = puzzle_names()
    if generator in EVALUATING:
        raise WorkbenchError(
            f"The verifier of {generator!r} evaluates answers as code, which is never done here; choose another "
            f"generator, for example {names[0]} or basic_arithmetic."
        )
    if generator not in names:
        raise unknown_name("puzzle generator", generator, names)
    if n < 1:
        raise WorkbenchError(f"At least one puzzle is needed; found a request for {n}.")
    try:
        made = package.create_dataset(generator, size=n, seed=seed, **dict(options or {}))
        entries = [made[index] for index in range(n)]
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise WorkbenchError(f"The generator {generator!r} does not take these options: {reason}.") from None
    questions = tuple(
        Question(f"{generator}-{index}", entry["question"] + REQUEST, str(entry["answer"]), _verifier(made, entry))
        for index, entry in enumerate(entries)
    )
    are_numbers = all(re.fullmatch(r"-?\d+(?:\.\d+)?", question.answer) for question in questions)
    return QuestionSet(generator, questions, NUMBER_RULES if are_numbers else RULES)


def _verifier(made: Any, entry: Any) -> Any:
    def is_right(answer: str) -> bool:
        try:
            return float(made.score_answer(answer, entry)) >= 1.0
        except Exception:  # verifiers are written for well-formed answers and raise anything on others
            return False

    return is_right


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise WorkbenchError(
            "Puzzles need the reasoning-gym package: pip install 'sgworkbench[utility]', or give a benchmark file."
        ) from None
    return reasoning_gym
