"""The gap, held-out separation and the projected shift, against values worked out by hand and independent code."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from sgworkbench.analysis import (
    Directions,
    GapResult,
    Readings,
    Site,
    all_sites,
    awareness_directions,
    mean_difference_directions,
    measure_gap,
)
from sgworkbench.analysis.gap import NullFit, strata_index, text_hash
from sgworkbench.analysis.nulls import RANDOM, SHUFFLED, shuffled_unit_directions
from sgworkbench.analysis.projection import best_layer, held_out_separation, projected_shift
from sgworkbench.errors import WorkbenchError
from sgworkbench.prompting import Prompt, PromptSet

SITES = all_sites(2)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def axis_directions(concept: str, axis: int, zero: float, separation: float, sites: Any = SITES) -> Directions:
    """Unit vectors along one axis, with the class means at `zero` and `zero + separation`."""
    unit = torch.zeros(len(sites), 4)
    unit[:, axis] = 1
    return Directions(concept, "made up", "x", sites, unit, zero * unit, torch.full((len(sites),), separation))


AWARE, REFUSE = axis_directions("awareness", 0, 1.0, 2.0), axis_directions("refusal", 1, -1.0, 4.0)
PROMPTS = PromptSet(
    "test",
    (
        Prompt("pick a lock", "b", "harmful", "theft"),
        Prompt("bake bread", "c", "harmless", "food"),
        Prompt("make a bomb", "a", "harmful", "weapons"),
    ),
)


def readings(instruction: list[float], prompt: list[float], sites: Any = SITES) -> Readings:
    """Raw awareness along axis 0 and raw refusal along axis 1; the second site holds twice the values."""
    scale = torch.arange(1, len(sites) + 1)[None, :]
    a, r = torch.zeros(len(instruction), len(sites), 4), torch.zeros(len(prompt), len(sites), 4)
    a[:, :, 0] = torch.tensor(instruction)[:, None] * scale
    r[:, :, 1] = torch.tensor(prompt)[:, None] * scale
    return Readings(sites, a, r)


TOY = {
    "plain": readings([3.0, 1.0, 5.0], [-1.0, -1.0, 1.0]),
    "both": readings([3.0, 1.0, 3.0], [3.0, -1.0, 5.0]),
}


@pytest.fixture(scope="module")
def toy() -> GapResult:
    return measure_gap(TOY, PROMPTS, AWARE, REFUSE, n_null=50)


def test_awareness_refusal_and_gap_by_hand(toy: GapResult) -> None:
    # A = (raw - 1) / 2 and R = (raw + 1) / 4.
    frame = toy.to_dataframe().set_index(["arm", "layer", "prompt_id"])
    assert frame.loc[("plain", 0, "b"), ["awareness", "refusal", "gap"]].tolist() == [1.0, 0.0, 1.0]
    assert frame.loc[("plain", 0, "a"), ["awareness", "refusal", "gap"]].tolist() == [2.0, 0.5, 1.5]
    assert frame.loc[("both", 0, "a"), ["awareness", "refusal", "gap"]].tolist() == [1.0, 1.5, -0.5]
    assert frame.loc[("plain", 1, "c"), ["awareness", "refusal", "gap"]].tolist() == [0.5, -0.25, 0.75]
    assert frame.loc[("plain", 1, "c"), ["label", "category"]].tolist() == ["harmless", "food"]
    assert len(frame) == 2 * 2 * 3
    assert toy.arms == ["plain", "both"]
    assert toy.prompts["sha256"] == PROMPTS.content_hash


def test_summaries_are_means_over_the_prompts_of_a_label(toy: GapResult) -> None:
    frame = toy.summary("gap").set_index(["arm", "layer"])
    assert frame.loc[("plain", 0), "value"] == pytest.approx((1.0 + 1.5) / 2)
    assert frame.loc[("both", 0), "value"] == pytest.approx((0.0 - 0.5) / 2)
    assert frame.loc[("plain", 0), "n"] == 2
    harmless = toy.summary("refusal", "harmless").set_index(["arm", "layer"])
    assert harmless.loc[("plain", 1), "value"] == pytest.approx(-0.25)
    with pytest.raises(WorkbenchError, match="No unlabelled prompt was measured; labels: harmful, harmless"):
        toy.summary("gap", "unlabelled")


def test_differences_are_paired_by_prompt(toy: GapResult) -> None:
    frame = toy.differences("gap").set_index(["arm", "layer"])
    assert list(frame.index) == [("both", 0), ("both", 1)]
    assert frame.loc[("both", 0), "value"] == pytest.approx(((0.0 - 1.0) + (-0.5 - 1.5)) / 2)
    with pytest.raises(WorkbenchError, match=r"Unknown arm 'plane'\. Did you mean 'plain'\?"):
        toy.differences("gap", reference="plane")


def many(n: int = 60) -> GapResult:
    prompts = PromptSet("many", tuple(Prompt(f"t{i}", f"{i}", "harmful") for i in range(n)))
    level = (3 * noise(n)).tolist()  # prompts differ far more than arms do
    arms = {
        "plain": readings(level, [0.0] * n),
        "prompted": readings(
            [value - 1 + 0.01 * k for k, value in zip(noise(n, seed=1).tolist(), level, strict=True)], [0.0] * n
        ),
    }
    return measure_gap(arms, prompts, AWARE, REFUSE, n_null=10)


def test_the_bootstrap_resamples_prompts_and_keeps_arms_paired() -> None:
    result = many()
    wide = result.table.pivot(index="prompt_id", columns=["arm", "layer"], values="gap")
    difference = (wide["prompted"] - wide["plain"])[0].to_numpy()
    generator = np.random.default_rng(1)
    means = difference[generator.integers(0, len(difference), (4000, len(difference)))].mean(1)
    row = result.differences("gap").iloc[0]
    width = row["high"] - row["low"]
    assert row["value"] == pytest.approx(difference.mean())
    assert width == pytest.approx(np.quantile(means, 0.975) - np.quantile(means, 0.025), rel=0.15)
    # Unpaired arms would have an interval about a hundred times as wide.
    single = result.summary("gap").iloc[0]
    assert single["high"] - single["low"] > 50 * width
    pd.testing.assert_frame_equal(result.differences("gap", seed=5), result.differences("gap", seed=5))
    assert not result.differences("gap", seed=5).equals(result.differences("gap", seed=6))


def test_prompts_used_for_fitting_are_refused() -> None:
    fitted = AWARE.with_provenance(train_texts_sha256=[text_hash("make a bomb"), text_hash("something else")])
    with pytest.raises(WorkbenchError, match="1 of the 3 prompts to measure were used to fit the awareness direction"):
        measure_gap(TOY, PROMPTS, fitted, REFUSE)
    fitted = REFUSE.with_provenance(train_texts_sha256=[text_hash(p.text) for p in PROMPTS])
    with pytest.raises(WorkbenchError, match=r"3 of the 3 prompts .* refusal direction; train and test must not share"):
        measure_gap(TOY, PROMPTS, AWARE, fitted)


def test_bad_readings_are_refused() -> None:
    with pytest.raises(
        WorkbenchError, match="No readings were given; expected at least one of the arms plain, prompted"
    ):
        measure_gap({}, PROMPTS, AWARE, REFUSE)
    with pytest.raises(WorkbenchError, match=r"Unknown arm 'stered'\. Did you mean 'steered'\?"):
        measure_gap({"stered": TOY["plain"]}, PROMPTS, AWARE, REFUSE)
    other = axis_directions("refusal", 1, 0.0, 1.0, all_sites(3))
    with pytest.raises(
        WorkbenchError, match=r"must cover the same sites; found .*\(2\) for the plain .*\(3\) for refusal"
    ):
        measure_gap(TOY, PROMPTS, AWARE, other)
    short = readings([3.0, 1.0], [-1.0, -1.0])
    with pytest.raises(WorkbenchError, match="Expected plain readings of the 3 prompts, found 2"):
        measure_gap({"plain": short}, PROMPTS, AWARE, REFUSE)
    twice = (Site(1, "resid_pre"), Site(1))
    directions = (axis_directions("awareness", 0, 1.0, 2.0, twice), axis_directions("refusal", 1, 0.0, 1.0, twice))
    with pytest.raises(WorkbenchError, match="measured at one site per layer"):
        measure_gap({"plain": readings([1.0] * 3, [1.0] * 3, twice)}, PROMPTS, *directions)


def test_a_layer_without_direction_is_missing_not_zero() -> None:
    separation = torch.tensor([float("nan"), 2.0])
    unit = AWARE.unit.clone()
    unit[0] = 0
    result = measure_gap(TOY, PROMPTS, replace(AWARE, unit=unit, separation=separation), REFUSE, n_null=5)
    frame = result.summary("gap").set_index(["arm", "layer"])
    assert math.isnan(frame.loc[("plain", 0), "value"])
    assert not math.isnan(frame.loc[("plain", 1), "value"])
    assert np.isnan(result.nulls[0].low[0])


def test_the_auroc_of_awareness_is_that_of_scikit_learn() -> None:
    prompts = PromptSet("p", tuple(Prompt(f"t{i}", f"{i}", "harmful" if i % 3 else "harmless") for i in range(40)))
    scores = noise(40).tolist()
    result = measure_gap({"plain": readings(scores, [0.0] * 40)}, prompts, AWARE, REFUSE, n_null=5)
    assert result.awareness_auroc is not None
    expected = roc_auc_score([p.label == "harmful" for p in prompts], scores)
    np.testing.assert_allclose(result.awareness_auroc.value, [expected, expected])
    assert (result.awareness_auroc.n_positive, result.awareness_auroc.n_negative) == (26, 14)


# --- nulls --------------------------------------------------------------------------------------------------------


def isotropic(n: int = 80, d: int = 64) -> tuple[dict[str, Readings], PromptSet, Directions, Directions, NullFit]:
    """Classes that differ along one axis of otherwise isotropic noise; training and test items apart."""
    label = torch.arange(n) % 2 == 0

    def draw(seed: int) -> Tensor:
        values = noise(n, 2, d, seed=seed)
        values[label, :, 0] += 6.0
        return values

    train_a, train_r, test_a, test_r = (draw(seed) for seed in range(4))
    aware = awareness_directions(train_a[label], train_a[~label], SITES)
    refuse = mean_difference_directions(
        train_r[label], train_r[~label], concept="refusal", source="s", read_at="last_prompt", sites=SITES
    )
    shuffled = NullFit(*(shuffled_unit_directions(v, label.long(), n=200) for v in (train_a, train_r)))
    prompts = PromptSet("p", tuple(Prompt(f"t{i}", f"{i}", "harmful" if label[i] else "harmless") for i in range(n)))
    # These prompts are recognised and complied with: refusal readings of the harmful ones look complied.
    complied = test_r.clone()
    complied[label, :, 0] -= 6.0
    return {"plain": Readings(SITES, test_a, complied)}, prompts, aware, refuse, shuffled


def test_the_null_bands_hold_zero_and_leave_out_the_gap() -> None:
    arms, prompts, aware, refuse, shuffled = isotropic()
    result = measure_gap(arms, prompts, aware, refuse, shuffled=shuffled)
    assert [band.name for band in result.nulls] == [RANDOM, SHUFFLED]
    gap = result.summary("gap")["value"].to_numpy()
    assert (gap > 0.8).all()
    assert (gap < 1.2).all()
    for band in result.nulls:
        assert band.n == 200
        assert (band.low < 0).all()
        assert (band.high > 0).all()
        assert (band.high < gap).all()
    assert set(result.nulls_dataframe()["name"]) == {RANDOM, SHUFFLED}


def test_the_random_band_is_the_one_of_its_definition() -> None:
    arms, prompts, aware, refuse, _ = isotropic()
    result = measure_gap(arms, prompts, aware, refuse, n_null=2000, seed=3)
    harmful = torch.tensor([p.label == "harmful" for p in prompts])
    generator = np.random.default_rng(0)
    statistics = np.zeros(2000)
    for sign, values, real in ((1, arms["plain"].instruction, aware), (-1, arms["plain"].prompt, refuse)):
        units = generator.standard_normal((2000, 64))
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        centred = values[harmful][:, 0].mean(0).numpy() - real.origin[0].numpy()
        statistics += sign * (units @ centred) / float(real.separation[0])
    low, high = np.quantile(statistics, [0.025, 0.975])
    assert result.nulls[0].low[0] == pytest.approx(low, rel=0.15)
    assert result.nulls[0].high[0] == pytest.approx(high, rel=0.15)


def test_without_a_plain_arm_or_harmful_prompts_there_are_no_nulls(tmp_path: Path) -> None:
    result = measure_gap({"both": TOY["both"]}, PROMPTS, AWARE, REFUSE)
    assert result.nulls == ()
    assert result.awareness_auroc is None
    assert list(result.nulls_dataframe().columns) == ["name", "layer", "low", "high", "n"]
    result.save(tmp_path)
    assert pd.read_parquet(tmp_path / "gap_nulls.parquet").empty
    harmless = measure_gap({"plain": TOY["plain"]}, PROMPTS.labelled("harmless"), AWARE, REFUSE)
    assert harmless.nulls == ()


def test_a_result_can_be_saved_and_shown(toy: GapResult, tmp_path: Path) -> None:
    toy.save(tmp_path / "out")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "gap.parquet"), toy.table)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "gap_nulls.parquet"), toy.nulls_dataframe())
    torch.testing.assert_close(Directions.load(tmp_path / "out" / "refusal.safetensors").unit, REFUSE.unit)
    assert "arms plain, both" in toy._repr_html_()
    copied = toy.to_dataframe()
    copied["gap"] = 0
    assert (toy.table["gap"] != 0).any()


def test_one_group_per_condition_and_content() -> None:
    condition, content = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    assert strata_index(condition, content).tolist() == [0, 1, 2, 3]


# --- curves by layer ----------------------------------------------------------------------------------------------


def test_held_out_separation_equals_scikit_learn() -> None:
    arms, prompts, aware, _, shuffled = isotropic()
    positive = torch.tensor([p.label == "harmful" for p in prompts])
    values = (
        arms["plain"].instruction - 2.5 * torch.tensor([1.0, 0.0])[None, :, None] * aware.unit * positive[:, None, None]
    )
    curve = held_out_separation(values, positive, aware, shuffled=shuffled.awareness)
    for layer in range(2):
        scores = values[:, layer].numpy() @ aware.unit[layer].numpy()
        assert curve.table["value"][layer] == pytest.approx(roc_auc_score(positive.numpy(), scores))
        assert curve.table["low"][layer] <= curve.table["value"][layer] <= curve.table["high"][layer]
    assert best_layer(curve) == 1
    for band in curve.nulls:
        assert (band.low < 0.5).all()
        assert (band.high > 0.5).all()
    # Shuffled fits lie along the data's largest variation, here the classes themselves, with either sign: their band is
    # honest but wide. Random directions hardly see it.
    assert (curve.nulls[0].high < 0.9).all()
    assert set(curve.nulls_dataframe()["name"]) == {RANDOM, SHUFFLED}
    with pytest.raises(WorkbenchError, match="needs items in both"):
        held_out_separation(values, torch.zeros(80).bool(), aware)


def test_the_projected_shift_by_hand() -> None:
    n = 30
    plain = noise(n, 2, 4)
    move = noise(n, seed=4)
    prompted = plain.clone()
    prompted[:, :, 1] += 2.0 + move[:, None]
    curve = projected_shift(plain, prompted, REFUSE, n_null=500)
    expected = ((2.0 + move) / 4.0).double().numpy()  # separation 4
    np.testing.assert_allclose(curve.table["value"], [expected.mean()] * 2, atol=1e-6)
    half = 1.96 * expected.std(ddof=1) / math.sqrt(n)
    np.testing.assert_allclose(curve.table["high"] - curve.table["low"], [2 * half] * 2, rtol=0.2)
    # In four dimensions a random direction has at most the whole shift, and 95 % of them less.
    assert (curve.nulls[0].high < expected.mean()).all()
    assert (curve.nulls[0].low > -expected.mean()).all()
    assert curve.quantity == "shift along the refusal direction (separation units)"
    assert "awareness" in projected_shift(plain, prompted, AWARE, n_null=5).quantity
