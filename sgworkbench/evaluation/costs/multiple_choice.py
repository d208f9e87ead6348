"""Multiple-choice accuracy from the log-probabilities of the options; nothing is generated.

Three readings, all reported, because they disagree on small models:

- `letter`: the question with its lettered options is asked, and the likeliest letter wins. Letters are of equal length,
  so normalising by length changes nothing.
- `option`: the question alone is asked, and the option with the highest summed log-probability wins.
- `option_normalised`: the same, divided by the option's length in bytes, which does not favour short options.

The chat template ends the prompt, so a continuation is the beginning of the model's answer; under a condition with a
prefill it follows the prefill. For reasoning models render with thinking off. `letter_mass` says how much probability
the letters hold together: where it is tiny, the model would not have answered with a letter at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.evaluation.behaviour import ArmSpec
from sgworkbench.evaluation.costs.arms import may_reuse_prompts, steered_by
from sgworkbench.evaluation.costs.choice_items import LETTERS, ChoiceItem
from sgworkbench.evaluation.costs.forced import forced_streams, token_log_probabilities
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import Renderer
from sgworkbench.prompting.prompt_set import Prompt
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.statistics import PairedComparison, Rate, compare_paired, rate

Reading = Literal["letter", "option", "option_normalised"]
READINGS: tuple[Reading, ...] = get_args(Reading)
LETTER_REQUEST = "Answer with the letter of the right option only."


@dataclass(frozen=True)
class MultipleChoice:
    """One arm's choices.

    Attributes:
        table: one row per item: arm, item_id, category, n_options, answer (0-based), letter_mass, and for each reading
            its choice (`letter_choice` ...) and whether it is right (`letter_right` ...).
    """

    table: pd.DataFrame

    def accuracy(self, reading: Reading = "letter") -> Rate:
        """Return the share of right choices with its Wilson interval."""
        right = self._right(reading)
        return rate(sum(right), len(right))

    def against(self, vanilla: MultipleChoice, reading: Reading = "letter") -> PairedComparison:
        """Compare with vanilla item by item: exact McNemar, and Newcombe's interval of the difference.

        Raises:
            WorkbenchError: the arms answered other items.
        """
        if self.table["item_id"].tolist() != vanilla.table["item_id"].tolist():
            raise WorkbenchError("Two arms can be compared only on the same items; measure both on one item set.")
        return compare_paired(vanilla._right(reading), self._right(reading))

    @property
    def chance(self) -> float:
        """Accuracy expected of guessing."""
        return float((1.0 / self.table["n_options"]).mean())

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per item."""
        return self.table.copy()

    def _right(self, reading: Reading) -> list[bool]:
        if reading not in READINGS:
            raise unknown_name("reading", str(reading), READINGS)
        return [bool(value) for value in self.table[f"{reading}_right"]]

    def _repr_html_(self) -> str:
        lines = "<br>".join(f"{reading}: {self.accuracy(reading)}" for reading in READINGS)
        return f"<b>Multiple choice</b>, {self.table['arm'].iloc[0]} (chance {100 * self.chance:.0f} %)<br>{lines}"


def letter_question(item: ChoiceItem) -> str:
    """Return the question with its lettered options and the request for a letter."""
    options = "\n".join(f"{LETTERS[index]}. {option}" for index, option in enumerate(item.options))
    return f"{item.question}\n\n{options}\n\n{LETTER_REQUEST}"


@torch.inference_mode()
def multiple_choice(
    loaded: LoadedModel,
    renderer: Renderer,
    items: Sequence[ChoiceItem],
    arm: ArmSpec,
    *,
    max_batch_tokens: int = 4096,
    report: Reporter = silent,
) -> MultipleChoice:
    """Let an arm choose.

    Args:
        loaded: the model, without active steering.
        renderer: renders the questions.
        items: questions and options.
        arm: condition and interventions.
        max_batch_tokens: bound on the padded tokens of a batch.
        report: progress callback.

    Raises:
        WorkbenchError: no items, a question that does not fit the context, or logits that are not numbers.
    """
    if not items:
        raise WorkbenchError("Multiple choice needs at least one item; found none.")
    lettered = _scores(
        loaded,
        [renderer.render(Prompt(letter_question(item), item.id), arm.condition) for item in items],
        [list(LETTERS[: len(item.options)]) for item in items],
        arm,
        max_batch_tokens,
        report,
        f"choices by letter, {arm.name}",
    )
    spelled = _scores(
        loaded,
        [renderer.render(Prompt(item.question, item.id), arm.condition) for item in items],
        [list(item.options) for item in items],
        arm,
        max_batch_tokens,
        report,
        f"choices by option, {arm.name}",
    )
    rows = []
    for item, letters, options in zip(items, lettered, spelled, strict=True):
        sizes = np.array([len(option.encode()) for option in item.options])
        row: dict[str, object] = {
            "arm": arm.name,
            "item_id": item.id,
            "category": item.category,
            "n_options": len(item.options),
            "answer": item.answer,
            "letter_mass": float(np.exp(letters).sum()),
        }
        for reading, scores in (("letter", letters), ("option", options), ("option_normalised", options / sizes)):
            choice = int(np.argmax(scores))
            row |= {f"{reading}_choice": choice, f"{reading}_right": choice == item.answer}
        rows.append(row)
    return MultipleChoice(pd.DataFrame(rows))


def _scores(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    options: Sequence[Sequence[str]],
    arm: ArmSpec,
    max_batch_tokens: int,
    report: Reporter,
    task: str,
) -> list[np.ndarray]:
    """Return the summed log-probability of each option after its prompt, in nats."""
    ids = [
        [continuation_ids(loaded, item, text) for text in texts] for item, texts in zip(rendered, options, strict=True)
    ]
    found: dict[int, np.ndarray] = {}
    report(task, 0, len(rendered))
    with steered_by(loaded, arm):
        for row, streams in forced_streams(
            loaded, rendered, ids, reuse_prompts=may_reuse_prompts(arm), max_batch_tokens=max_batch_tokens
        ):
            what = f"item {rendered[row].prompt.id!r} in arm {arm.name!r}"
            values = token_log_probabilities(loaded, streams, ids[row], what)
            found[row] = np.array([float(each.sum()) for each in values])
            report(task, len(found), len(rendered))
    return [found[row] for row in range(len(rendered))]


def continuation_ids(loaded: LoadedModel, item: RenderedPrompt, text: str) -> list[int]:
    """Return the tokens of a text that continues a rendered prompt.

    A space is put between them where the prompt does not end in white space. Text and prompt are tokenized together, as
    they would be read; where the tokenizer merges across the seam, the text's own tokens are taken, because the
    prompt's are fixed.
    """
    joined = text if item.text[-1:].isspace() else f" {text}"
    whole = loaded.tokenizer(item.text + joined, add_special_tokens=False)["input_ids"]
    n = len(item)
    if tuple(whole[:n]) == item.token_ids and len(whole) > n:
        return [int(token) for token in whole[n:]]
    return [int(token) for token in loaded.tokenizer(joined, add_special_tokens=False)["input_ids"]]
