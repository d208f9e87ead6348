"""Choosing one refusal direction among candidates by what it does, after Arditi et al. 2024 (arXiv 2406.11717).

For the candidate of every (layer, position), on prompts it was not fitted on:

    bypass = mean refusal log-odds of harmful prompts while the direction is ablated everywhere (low is good),
    induce = mean refusal log-odds of harmless prompts while the mean difference is added at its site (high is good),
    KL     = mean KL(unsteered || ablated) of the first token of harmless prompts (low is good).

A candidate is kept when it induces refusal, changes harmless prompts little and is not among the last layers; the kept
one with the lowest bypass score is chosen. The table always lists every candidate with its scores, its rank and the
reason why it was rejected, so that "all rejected" still says which came closest. The paper ablates what each block
writes; here the stream itself is ablated at the input, the middle and the output of every block, which is the same
direction removed at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.capture import capture
from sgworkbench.analysis.directions import Directions, mean_difference_directions
from sgworkbench.analysis.site import SITE_KINDS, Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.refusal_score import REFUSAL_OPENINGS, first_token_logits, first_tokens, refusal_log_odds
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.steering import Ablate, Add, Intervention, steering

_COLUMNS = ["rank", "position", "site", "layer", "bypass", "induce", "kl", "kept", "reason"]


@dataclass(frozen=True)
class DirectionSelection:
    """Every candidate with its scores, best first, and the chosen one.

    Attributes:
        table: one row per candidate: rank (1 is best), position (name of the candidate's token), site, layer, bypass,
            induce, kl, kept, reason (empty for kept candidates). Kept candidates come first, by bypass; then rejected
            ones by how many filters they fail, then by bypass; those without a direction last.
        candidates: the directions by position.
        baseline: mean refusal log-odds without steering: "harmful" and "harmless".
    """

    table: pd.DataFrame
    candidates: Mapping[str, Directions]
    baseline: Mapping[str, float]

    @property
    def chosen(self) -> pd.Series | None:
        """The best kept candidate's row, or None when every candidate was rejected."""
        kept = self.table[self.table["kept"]]
        return None if kept.empty else kept.iloc[0]

    def directions(self, rank: int = 1) -> Directions:
        """Return the candidate of a rank as directions of its one site, with its scores in the provenance.

        Raises:
            WorkbenchError: no such rank, or a rejected candidate: its reason is named, and a rank that was kept.
        """
        found = self.table[self.table["rank"] == rank]
        if found.empty:
            raise WorkbenchError(f"There is no candidate of rank {rank}; the table has {len(self.table)}.")
        row = found.iloc[0]
        if not row["kept"]:
            raise WorkbenchError(
                f"The candidate of rank {rank} ({row['site']}, {row['position']}) was rejected: {row['reason']}; see "
                "the table, or loosen that filter."
            )
        return _at_site(self.candidates[str(row["position"])], Site.parse(str(row["site"]))).with_provenance(
            selection={name: float(row[name]) for name in ("bypass", "induce", "kl")}
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Return the ranked table."""
        return self.table.copy()

    def _repr_html_(self) -> str:
        best = self.chosen
        head = "no candidate passed the filters" if best is None else f"chosen: {best['site']}, {best['position']}"
        shown = self.table.head(10).to_html(index=False, float_format=lambda value: f"{value:.3g}")
        return f"<b>Direction selection</b>: {head}; {int(self.table['kept'].sum())} of {len(self.table)} kept{shown}"


def candidate_directions(
    loaded: LoadedModel,
    harmful: Sequence[RenderedPrompt],
    harmless: Sequence[RenderedPrompt],
    sites: Sequence[Site],
    *,
    n_positions: int | None = None,
    report: Reporter = silent,
) -> dict[str, Directions]:
    """Fit mean-difference candidates at the last prompt tokens, keyed "-1" (the last), "-2" and so on.

    Args:
        loaded: the model.
        harmful: training prompts.
        harmless: training prompts.
        sites: where to read.
        n_positions: how many tokens from the end; None takes all template tokens that follow the user turn in every
            prompt, as the paper does, and at least one.
        report: progress callback.

    Raises:
        WorkbenchError: no prompts, or fewer tokens in a prompt than positions asked for.
    """
    prompts = [*harmful, *harmless]
    if not harmful or not harmless:
        raise WorkbenchError("Candidate directions need harmful and harmless training prompts.")
    count = min(_trailing_template(item) for item in prompts) if n_positions is None else n_positions
    count = max(1, count)
    shortest = min(len(item) for item in prompts)
    if count > shortest:
        raise WorkbenchError(f"{count} positions were asked for, but the shortest prompt has {shortest} tokens.")
    where = [[len(item) - count + k for k in range(count)] for item in prompts]
    values = capture(loaded, prompts, list(sites), where, report=report).values
    by_prompt = values.reshape(len(prompts), count, len(sites), -1)
    return {
        str(k - count): mean_difference_directions(
            by_prompt[: len(harmful), k],
            by_prompt[len(harmful) :, k],
            concept="refusal",
            source="harmful minus harmless content, selected",
            read_at=f"token {k - count} from the end",
            sites=tuple(sites),
        )
        for k in reversed(range(count))
    }


def select_direction(
    loaded: LoadedModel,
    candidates: Mapping[str, Directions],
    harmful: Sequence[RenderedPrompt],
    harmless: Sequence[RenderedPrompt],
    *,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
    max_depth: float = 0.8,
    openings: Sequence[str] = REFUSAL_OPENINGS,
    report: Reporter = silent,
) -> DirectionSelection:
    """Score, filter and rank candidates.

    Args:
        loaded: the model.
        candidates: directions by the name of their token; every site of each is a candidate.
        harmful: held-out harmful prompts.
        harmless: held-out harmless prompts.
        max_kl: reject candidates whose ablation changes harmless prompts by more (nats).
        min_induce: reject candidates whose addition leaves the mean refusal log-odds below this.
        max_depth: reject candidates from this share of the layers on.
        openings: texts that open a refusal.
        report: progress callback.

    Raises:
        WorkbenchError: no candidates, no prompts, or directions of another model.
    """
    if not candidates or not harmful or not harmless:
        raise WorkbenchError("Selecting a direction needs candidates, and held-out harmful and harmless prompts.")
    tokens = first_tokens(loaded, openings)
    n_layers, n_harmful = loaded.identity.n_layers, len(harmful)
    both = [*harmful, *harmless]
    plain = first_token_logits(loaded, both)
    odds = refusal_log_odds(plain, tokens)
    baseline = {"harmful": float(odds[:n_harmful].mean()), "harmless": float(odds[n_harmful:].mean())}
    everywhere = [Site(layer, kind) for layer in range(n_layers) for kind in SITE_KINDS]
    pairs = [(name, fitted, site) for name, fitted in candidates.items() for site in fitted.sites]
    rows = []
    for index, (name, fitted, site) in enumerate(pairs):
        report("direction selection", index, len(pairs))
        unit, size = fitted.at(site), float(fitted.separation[fitted.sites.index(site)])
        bypass = induce = kl = float("nan")
        if size == size and bool(unit.any()):
            with steering(loaded, Intervention(Ablate(dict.fromkeys(everywhere, unit)))):
                ablated = first_token_logits(loaded, both)
            with steering(loaded, Intervention(Add({site: unit}, size))):
                added = first_token_logits(loaded, harmless)
            bypass = float(refusal_log_odds(ablated[:n_harmful], tokens).mean())
            induce = float(refusal_log_odds(added, tokens).mean())
            kl = _mean_kl(plain[n_harmful:], ablated[n_harmful:])
        reasons = _reasons(bypass, induce, kl, site, n_layers, max_kl, min_induce, max_depth)
        rows.append((name, str(site), site.layer, bypass, induce, kl, not reasons, "; ".join(reasons), len(reasons)))
    report("direction selection", len(pairs), len(pairs))
    table = pd.DataFrame(rows, columns=[*_COLUMNS[1:], "failed"])
    table["missing"] = table["bypass"].isna()
    table = table.sort_values(["missing", "failed", "bypass", "layer"], kind="stable").reset_index(drop=True)
    table.insert(0, "rank", range(1, len(table) + 1))
    return DirectionSelection(table[_COLUMNS], dict(candidates), baseline)


def _reasons(
    bypass: float,
    induce: float,
    kl: float,
    site: Site,
    n_layers: int,
    max_kl: float,
    min_induce: float,
    max_depth: float,
) -> list[str]:
    if bypass != bypass:
        return ["the classes do not differ here, so there is no direction"]
    reasons = []
    if site.layer >= max_depth * n_layers:
        reasons.append(f"layer {site.layer} is at or beyond {max_depth:g} of {n_layers} layers")
    if not kl <= max_kl:
        reasons.append(f"KL {kl:.3g} on harmless prompts is above {max_kl:g}")
    if not induce >= min_induce:
        reasons.append(f"adding it gives refusal log-odds {induce:.3g}, below {min_induce:g}")
    return reasons


def _mean_kl(before: Float[Tensor, "prompt d_vocab"], after: Float[Tensor, "prompt d_vocab"]) -> float:
    log_p, log_q = (torch.log_softmax(each.double(), dim=-1) for each in (before, after))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _trailing_template(item: RenderedPrompt) -> int:
    count = 0
    for role in reversed(item.roles):
        if role != "template":
            break
        count += 1
    return count


def _at_site(fitted: Directions, site: Site) -> Directions:
    index = fitted.sites.index(site)
    only = slice(index, index + 1)
    return replace(
        fitted,
        sites=(site,),
        unit=fitted.unit[only],
        origin=fitted.origin[only],
        separation=fitted.separation[only],
    )
