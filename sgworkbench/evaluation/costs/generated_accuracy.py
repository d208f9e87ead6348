"""Accuracy of generated answers, with the rule that found each answer, so that lost form and lost knowledge differ.

For questions with an answer:
- `accuracy`: right under any of the benchmark's rules; an answer no rule finds is not right, and is also counted as
  unparsed;
- `strict_accuracy`: right in the form that was asked for (the first rule);
- `form`: given in the form that was asked for, right or wrong.

For code, which is never executed: `fenced`, `found` (with or without a fence), `parses` (valid Python) and `defines`
(the function asked for is defined at the top level).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.evaluation.behaviour import ArmSpec
from sgworkbench.evaluation.coherence import split_reasoning
from sgworkbench.evaluation.costs.arms import steered_by
from sgworkbench.evaluation.costs.code_answers import find_code
from sgworkbench.evaluation.costs.extraction import extract
from sgworkbench.evaluation.costs.question_sets import Question, QuestionSet
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import Renderer
from sgworkbench.prompting.prompt_set import Prompt
from sgworkbench.statistics import PairedComparison, Rate, compare_paired, rate
from sgworkbench.steering import GenerationSettings, generate
from sgworkbench.steering.roles import RoleTracker

ANSWER_MEASURES = ("accuracy", "strict_accuracy", "form")
CODE_MEASURES = ("fenced", "found", "parses", "defines")


@dataclass(frozen=True)
class GeneratedAccuracy:
    """One arm's answers to one question set.

    Attributes:
        table: one row per question: arm, benchmark, item_id, text, n_tokens, finished, extracted (the answer found, or
            the code), rule (which found it, "fence" or "bare" for code, missing when none did), and one true-or-false
            column per measure.
    """

    table: pd.DataFrame

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures of this kind of questions."""
        return CODE_MEASURES if "fenced" in self.table else ANSWER_MEASURES

    @property
    def unparsed(self) -> int:
        """Questions in whose answer no rule found anything."""
        return int(self.table["rule"].isna().sum())

    def rate(self, measure: str = "accuracy") -> Rate:
        """Return one measure over all questions with its Wilson interval.

        `n` counts every question; those without an extracted answer count as not right and are `unparsed` besides.
        """
        outcomes = self._outcomes(measure)
        return rate(sum(outcomes), len(outcomes), unparsed=self.unparsed)

    def against(self, vanilla: GeneratedAccuracy, measure: str = "accuracy") -> PairedComparison:
        """Compare with vanilla question by question: exact McNemar, and Newcombe's interval of the difference.

        Raises:
            WorkbenchError: the arms answered other questions.
        """
        if self.table["item_id"].tolist() != vanilla.table["item_id"].tolist():
            raise WorkbenchError("Two arms can be compared only on the same questions; measure both on one set.")
        return compare_paired(vanilla._outcomes(measure), self._outcomes(measure))

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per question."""
        return self.table.copy()

    def _outcomes(self, measure: str) -> list[bool]:
        if measure not in self.measures:
            raise unknown_name("measure", measure, self.measures)
        return [bool(value) for value in self.table[measure]]

    def _repr_html_(self) -> str:
        lines = "<br>".join(f"{measure}: {self.rate(measure)}" for measure in self.measures)
        return f"<b>{self.table['benchmark'].iloc[0]}</b>, {self.table['arm'].iloc[0]}<br>{lines}"


def generated_accuracy(
    loaded: LoadedModel,
    renderer: Renderer,
    questions: QuestionSet,
    arm: ArmSpec,
    settings: GenerationSettings | None = None,
    *,
    report: Reporter = silent,
) -> GeneratedAccuracy:
    """Let an arm answer and check what it says.

    Args:
        loaded: the model, without active steering.
        renderer: renders the questions.
        questions: questions with their rules.
        arm: condition and interventions.
        settings: how to decode; greedy, 256 tokens by default.
        report: progress callback.

    Raises:
        WorkbenchError: no questions, or a question that does not fit the context with its answer.
    """
    if not questions.questions:
        raise WorkbenchError(f"The question set {questions.name!r} is empty; at least one question is needed.")
    rendered = [renderer.render(Prompt(question.text, question.id), arm.condition) for question in questions.questions]
    with steered_by(loaded, arm):
        answers = generate(
            loaded,
            rendered,
            settings or GenerationSettings(max_new_tokens=256),
            report=report,
            task=f"{questions.name}, {arm.name}",
        )
    rows = []
    for question, item, answer in zip(questions.questions, rendered, answers, strict=True):
        opened = RoleTracker(loaded.tokenizer, item).reasoned
        row = {
            "arm": arm.name,
            "benchmark": questions.name,
            "item_id": question.id,
            "text": answer.text,
            "n_tokens": len(answer.token_ids),
            "finished": answer.finished,
        }
        rows.append(row | grade(question, answer.text, questions.rules, reasoning_opened=opened))
    table = pd.DataFrame(rows)
    return GeneratedAccuracy(table.astype({"extracted": "string", "rule": "string"}))


def grade(question: Question, text: str, rules: Sequence[str], *, reasoning_opened: bool = False) -> dict[str, object]:
    """Return extracted answer, rule and measures of one completion.

    Args:
        question: what was asked.
        text: the completion; its reasoning is not searched, and reasoning that never closes leaves no answer.
        rules: extraction rules, the form asked for first; none for code.
        reasoning_opened: whether the prompt had opened the reasoning already.
    """
    answer = split_reasoning(text, reasoning_opened or None).answer
    if question.is_right is None:
        code = find_code(answer, question.answer)
        rule = None if code.code is None else "fence" if code.fenced else "bare"
        found = {"fenced": code.fenced, "found": code.code is not None, "parses": code.parses, "defines": code.defines}
        return {"extracted": code.code, "rule": rule, **found}
    extraction = extract(answer, rules)
    right = extraction.answer is not None and question.is_right(extraction.answer)
    in_form = extraction.rule == rules[0]
    return {
        "extracted": extraction.answer,
        "rule": extraction.rule,
        "accuracy": right,
        "strict_accuracy": right and in_form,
        "form": in_form,
    }
