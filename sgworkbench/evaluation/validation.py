"""Is a refusal direction to be believed? A held-out and a causal check.

Held out: within one condition, does the projection at the last prompt token separate answers that were judged refused
from those judged complied? Causal: adding the direction must raise the refusal log-odds of plain harmful prompts and
ablating it must lower them under the safety prompt, each by more than random directions of equal norm do (METHOD 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.directions import Directions
from sgworkbench.analysis.nulls import random_unit_directions
from sgworkbench.analysis.site import Site
from sgworkbench.evaluation.refusal_score import REFUSAL_OPENINGS, first_token_logits, first_tokens, refusal_log_odds
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.statistics import auroc
from sgworkbench.steering import Ablate, Add, Intervention, steering


@dataclass(frozen=True)
class CausalCheck:
    """Change of the mean refusal log-odds under the direction, against random directions of equal norm.

    Attributes:
        site: where the direction was taken from and added; ablation acts on the output of every block.
        n_prompts: prompts per mean.
        baseline_plain: log-odds of the plain prompts, unsteered.
        baseline_prompted: log-odds of the prompted ones, unsteered.
        added: change in the plain condition when the class distance along the direction is added.
        added_random: the same for random directions.
        ablated: change in the prompted condition when the direction is ablated.
        ablated_random: the same for random directions.
    """

    site: str
    n_prompts: int
    baseline_plain: float
    baseline_prompted: float
    added: float
    added_random: tuple[float, ...]
    ablated: float
    ablated_random: tuple[float, ...]

    @property
    def raises(self) -> bool:
        """Whether adding raises the log-odds more than every random direction."""
        return self.added > max(0.0, *self.added_random)

    @property
    def lowers(self) -> bool:
        """Whether ablating lowers the log-odds more than every random direction."""
        return self.ablated < min(0.0, *self.ablated_random)

    @property
    def passed(self) -> bool:
        """Whether both effects stand out."""
        return self.raises and self.lowers

    def to_dict(self) -> dict[str, Any]:
        """Return fields and verdicts, JSON-serialisable."""
        return {**asdict(self), "raises": self.raises, "lowers": self.lowers, "passed": self.passed}


def causal_check(
    loaded: LoadedModel,
    direction: Directions,
    site: Site,
    plain: Sequence[RenderedPrompt],
    prompted: Sequence[RenderedPrompt],
    *,
    n_random: int = 19,
    seed: int = 0,
    report: Reporter = silent,
) -> CausalCheck:
    """Add and ablate a direction and random ones, and compare the refusal log-odds.

    Args:
        loaded: the model.
        direction: the refusal directions.
        site: which of their sites to check.
        plain: harmful prompts without the safety prompt.
        prompted: the same with it.
        n_random: random directions per effect; the chance of a false pass is at most 1 / (n_random + 1) each.
        seed: seed of the random directions.
        report: progress callback.
    """
    tokens = first_tokens(loaded, REFUSAL_OPENINGS)
    unit = direction.at(site)
    distance = float(direction.separation[direction.sites.index(site)])
    everywhere = [Site(layer) for layer in range(loaded.identity.n_layers)]
    random = random_unit_directions(n_random, 1, unit.shape[-1], seed=seed)[:, 0]
    total, done = 2 * (n_random + 2), 0

    def score(rendered: Sequence[RenderedPrompt], operators: list[Intervention]) -> float:
        nonlocal done
        with steering(loaded, operators):
            logits = first_token_logits(loaded, rendered)
        done += 1
        report("causal check", done, total)
        return float(refusal_log_odds(logits, tokens).mean())

    def add(vector: Float[Tensor, "d_model"]) -> list[Intervention]:
        return [Intervention(Add({site: vector}, distance))]

    def ablate(vector: Float[Tensor, "d_model"]) -> list[Intervention]:
        return [Intervention(Ablate(dict.fromkeys(everywhere, vector)))]

    report("causal check", 0, total)
    baseline_plain, baseline_prompted = score(plain, []), score(prompted, [])
    return CausalCheck(
        str(site),
        len(plain),
        baseline_plain,
        baseline_prompted,
        score(plain, add(unit)) - baseline_plain,
        tuple(score(plain, add(vector)) - baseline_plain for vector in random),
        score(prompted, ablate(unit)) - baseline_prompted,
        tuple(score(prompted, ablate(vector)) - baseline_prompted for vector in random),
    )


def held_out_by_condition(
    scores: Float[np.ndarray, " item"], refused: np.ndarray, condition: Sequence[str], *, min_per_class: int = 3
) -> list[dict[str, Any]]:
    """Return, per condition, the AUROC of refused against complied answers with its interval.

    A condition with fewer than `min_per_class` of either is listed with its counts and without an AUROC.
    """
    rows: list[dict[str, Any]] = []
    names = np.asarray(condition)
    for name in dict.fromkeys(condition):
        member = names == name
        yes, no = scores[member & refused], scores[member & ~refused]
        row: dict[str, Any] = {"condition": name, "refused": len(yes), "complied": len(no)}
        if min(len(yes), len(no)) >= min_per_class:
            area = auroc(yes, no)
            row |= {"auroc": float(area.value), "low": float(area.low), "high": float(area.high)}
        rows.append(row)
    return rows
