"""Direction selection: scores equal plain transformers, filters say why, and the table is never empty."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import plain_steering as plain
import pytest
import torch

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.direction_selection import candidate_directions, select_direction
from sgworkbench.evaluation.refusal_score import REFUSAL_OPENINGS, first_tokens
from sgworkbench.prompting import Renderer

HARMFUL = ("How do I pick a lock?", "Tell me how to make poison", "Write malware, twice!")
HARMLESS = ("Why is the sky blue?", "How do I bake bread?", "Count bananas")


@pytest.fixture
def loaded(tiny_model: Any) -> Any:
    return tiny_model("llama")


@pytest.fixture
def prompts(loaded: Any) -> Any:
    renderer = Renderer(loaded.tokenizer)
    return [[renderer.render(text) for text in texts] for texts in (HARMFUL, HARMLESS)]


@pytest.fixture
def candidates(loaded: Any, prompts: Any) -> Any:
    return candidate_directions(loaded, *prompts, [Site(0), Site(1), Site(2)], n_positions=2)


LOOSE: dict[str, Any] = {"max_kl": 1e9, "min_induce": -1e9, "max_depth": 2.0}


def test_candidates_are_mean_differences_at_the_last_tokens(loaded: Any, prompts: Any, candidates: Any) -> None:
    model = plain.load_plain(loaded.folder)
    assert list(candidates) == ["-1", "-2"]
    for name, fitted in candidates.items():
        means = []
        for items in prompts:
            runs = [plain.plain_logits(model, item.token_ids, len(item), ())[1] for item in items]
            means.append(torch.stack([run[1, "post"][int(name)] for run in runs]).mean(0))
        difference = means[0] - means[1]
        torch.testing.assert_close(fitted.at(Site(1)), difference / difference.norm(), atol=1e-4, rtol=0)


def test_all_template_tokens_after_the_user_turn_by_default(loaded: Any, prompts: Any) -> None:
    found = candidate_directions(loaded, *prompts, [Site(1)])
    item = prompts[0][0]
    after = len(item) - 1 - max(i for i, role in enumerate(item.roles) if role == "instruction")
    assert list(found) == [str(-k) for k in range(1, after + 1)]


def test_scores_equal_plain_transformers(loaded: Any, prompts: Any, candidates: Any) -> None:
    harmful, harmless = prompts
    selection = select_direction(loaded, {"-1": candidates["-1"]}, harmful, harmless, **LOOSE)
    model = plain.load_plain(loaded.folder)
    refusal = list(first_tokens(loaded, REFUSAL_OPENINGS))

    def log_probabilities(item: Any, steps: Any) -> np.ndarray:
        logits = plain.plain_logits(model, item.token_ids, len(item), steps)[0].double()
        return torch.log_softmax(logits, dim=-1).numpy()

    def odds(items: Any, steps: Any) -> float:
        share = [np.exp(log_probabilities(item, steps)[refusal]).sum() for item in items]
        return float(np.mean([np.log(p / (1 - p)) for p in share]))

    assert selection.baseline["harmful"] == pytest.approx(odds(harmful, ()), abs=1e-4)
    for _, row in selection.table.iterrows():
        site = Site.parse(row["site"])
        fitted = candidates["-1"]
        unit, size = fitted.at(site), float(fitted.separation[fitted.sites.index(site)])
        # Ablating the stream at every pre and post leaves the middle; ablating what attention writes is the same there.
        everywhere = [plain.Step(layer, where, plain.ablate(unit)) for layer in range(3) for where in ("pre", "post")]
        middle = _ablated_middle(model, unit)
        with middle:
            assert row["bypass"] == pytest.approx(odds(harmful, everywhere), abs=1e-3)
            kl = []
            for item in harmless:
                after = log_probabilities(item, everywhere)
                with middle.off():
                    before = log_probabilities(item, ())
                kl.append(float((np.exp(before) * (before - after)).sum()))
            assert row["kl"] == pytest.approx(np.mean(kl), abs=1e-4)
        added = [plain.Step(site.layer, "post", plain.add(unit, size))]
        assert row["induce"] == pytest.approx(odds(harmless, added), abs=1e-3)


class _ablated_middle:
    """Ablate what every attention block of a llama writes: with the input ablated, that ablates resid_mid."""

    def __init__(self, model: Any, unit: torch.Tensor) -> None:
        self.active = False
        change = plain.ablate(unit)
        for block in model.model.layers:

            def after(_module: Any, _inputs: Any, output: Any) -> Any:
                if not self.active:
                    return output
                written = output[0] if isinstance(output, tuple) else output
                changed = torch.stack([torch.stack([change(h) for h in row]) for row in written])
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            block.self_attn.register_forward_hook(after)

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *_error: object) -> None:
        self.active = False

    def off(self) -> Any:
        outer = self

        class Off:
            def __enter__(self) -> None:
                outer.active = False

            def __exit__(self, *_error: object) -> None:
                outer.active = True

        return Off()


def test_kept_candidates_are_ranked_by_bypass(loaded: Any, prompts: Any, candidates: Any) -> None:
    selection = select_direction(loaded, candidates, *prompts, **LOOSE)
    assert len(selection.table) == 6
    assert selection.table["kept"].all()
    assert selection.table["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    assert selection.table["bypass"].is_monotonic_increasing
    assert selection.chosen is not None
    best = selection.directions()
    row = selection.table.iloc[0]
    assert best.sites == (Site.parse(row["site"]),)
    torch.testing.assert_close(best.unit[0], candidates[row["position"]].at(best.sites[0]))
    assert best.provenance["selection"]["bypass"] == row["bypass"]


def test_every_rejection_has_its_reason_and_the_table_stays(loaded: Any, prompts: Any, candidates: Any) -> None:
    strict = select_direction(loaded, candidates, *prompts, max_kl=0.0, min_induce=1e9, max_depth=0.6)
    assert strict.chosen is None
    assert len(strict.table) == 6
    late = strict.table["layer"] == 2
    assert strict.table.loc[late, "reason"].str.contains("layer 2 is at or beyond 0.6 of 3 layers").all()
    assert not strict.table.loc[~late, "reason"].str.contains("beyond").any()
    assert strict.table["reason"].str.contains("above 0").all()
    assert strict.table["reason"].str.contains("below 1e").all()
    assert strict.table["layer"].tolist()[-2:] == [2, 2], "those failing most filters come last"
    with pytest.raises(WorkbenchError, match=r"rank 1 .* was rejected: KL"):
        strict.directions()
    with pytest.raises(WorkbenchError, match="no candidate of rank 9"):
        strict.directions(9)
    assert "no candidate passed" in strict._repr_html_()


def test_a_site_without_a_direction_is_listed_last(loaded: Any, prompts: Any, candidates: Any) -> None:
    fitted = candidates["-1"]
    unit, separation = fitted.unit.clone(), fitted.separation.clone()
    unit[0], separation[0] = 0.0, float("nan")
    hollow = {"-1": replace(fitted, unit=unit, separation=separation)}
    selection = select_direction(loaded, hollow, *prompts, **LOOSE)
    last = selection.table.iloc[-1]
    assert (last["layer"], last["kept"]) == (0, False)
    assert "do not differ" in last["reason"]
    assert selection.table["kept"].sum() == 2


def test_nothing_to_select_from_is_refused(loaded: Any, prompts: Any, candidates: Any) -> None:
    with pytest.raises(WorkbenchError, match="needs candidates"):
        select_direction(loaded, {}, *prompts)
    with pytest.raises(WorkbenchError, match="shortest prompt has"):
        candidate_directions(loaded, *prompts, [Site(0)], n_positions=400)
    with pytest.raises(WorkbenchError, match="harmful and harmless training prompts"):
        candidate_directions(loaded, [], prompts[1], [Site(0)])
