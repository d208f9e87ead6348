"""Directions: hand-computed toys, the confound that stratification removes, files that cannot be trusted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sgworkbench.analysis import (
    Directions,
    Site,
    all_sites,
    awareness_directions,
    content_directions,
    mean_difference_directions,
    refusal_directions,
    unembedding_directions,
)
from sgworkbench.analysis.nulls import null_band, random_unit_directions, shuffled_unit_directions
from sgworkbench.errors import WorkbenchError

SITE = (Site(4),)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


# --- mean differences ---------------------------------------------------------------------------------------------


def test_a_toy_worked_out_by_hand() -> None:
    # Class means (4, 5) and (1, 1): difference (3, 4), norm 5, unit (0.6, 0.8), zero at 0.6 + 0.8 = 1.4.
    harmful = torch.tensor([[[3.0, 5.0]], [[5.0, 5.0]]])
    harmless = torch.tensor([[[1.0, 0.0]], [[1.0, 2.0]]])
    found = awareness_directions(harmful, harmless, SITE)
    torch.testing.assert_close(found.unit, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(found.origin, torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(found.separation, torch.tensor([5.0]))
    torch.testing.assert_close(found.zero, torch.tensor([1.4]))
    h = torch.tensor([[[2.0, 3.0]]])  # raw 1.2 + 2.4 = 3.6, in units (3.6 - 1.4) / 5 = 0.44
    torch.testing.assert_close(found.project(h), torch.tensor([[3.6]]))
    torch.testing.assert_close(found.in_separation_units(h), torch.tensor([[0.44]]))
    assert (found.concept, found.read_at) == ("awareness", "last_instruction")
    assert found.provenance["n_positive"] == found.provenance["n_negative"] == 2


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_class_means_are_zero_and_one_at_every_layer(scale: float) -> None:
    positive, negative = scale * (5 + noise(40, 6, 64)), scale * (5 + noise(30, 6, 64, seed=1))
    found = mean_difference_directions(
        positive, negative, concept="c", source="s", read_at="last_prompt", sites=all_sites(6)
    )
    torch.testing.assert_close(found.in_separation_units(positive).mean(0), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.in_separation_units(negative).mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    expected = positive.double().numpy().mean(0) - negative.double().numpy().mean(0)
    np.testing.assert_allclose(found.separation.numpy(), np.linalg.norm(expected, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(
        found.unit.numpy(), expected / np.linalg.norm(expected, axis=-1, keepdims=True), atol=1e-5
    )


def test_where_the_classes_do_not_differ_there_is_no_unit() -> None:
    same = noise(1, 1, 8).expand(10, 1, 8)
    positive = torch.cat([same, 2 + noise(10, 1, 8, seed=1)], dim=1)
    negative = torch.cat([same, noise(10, 1, 8, seed=2)], dim=1)
    found = awareness_directions(positive, negative, all_sites(2))
    assert float(found.unit[0].abs().max()) == 0.0
    assert math.isnan(float(found.separation[0]))
    assert torch.isnan(found.in_separation_units(positive)[:, 0]).all()
    assert torch.isfinite(found.in_separation_units(positive)[:, 1]).all()
    assert (found.project(positive)[:, 0] == 0).all()
    assert "separation" in found._repr_html_()


def test_rounding_noise_is_no_direction() -> None:
    base = 1000 * noise(6, 1, 16)
    found = awareness_directions(base * (1 + 2e-8), base, SITE)
    assert math.isnan(float(found.separation[0]))


def test_any_leading_shape_and_dtype_can_be_projected() -> None:
    found = awareness_directions(noise(9, 3, 8) + 1, noise(7, 3, 8, seed=1), all_sites(3))
    values = noise(2, 5, 3, 8, seed=2)
    raw = found.project(values)
    for site in range(3):
        expected = values[:, :, site].numpy() @ found.unit[site].numpy()
        np.testing.assert_allclose(raw[:, :, site].numpy(), expected, atol=1e-5)
    torch.testing.assert_close(found.project(values.double()), raw)
    torch.testing.assert_close(found.project(values[0, 0]), raw[0, 0])


def test_empty_classes_and_infinite_values_are_refused() -> None:
    values = noise(4, 1, 8)
    with pytest.raises(WorkbenchError, match="The awareness direction needs positive examples; found none"):
        awareness_directions(values[:0], values, SITE)
    with pytest.raises(WorkbenchError, match="The refusal direction needs negative examples; found none"):
        content_directions(values, values[:0], SITE)
    broken = values.clone()
    broken[1, 0, 3] = float("inf")
    with pytest.raises(WorkbenchError, match="negative activations for the awareness direction hold NaN or infinite"):
        awareness_directions(values, broken, SITE)
    ones = torch.ones(4, dtype=torch.bool)
    with pytest.raises(WorkbenchError, match="activations for the refusal direction hold NaN"):
        refusal_directions(broken, ones, ones.long(), ones.long(), SITE)


def test_activations_of_other_sites_or_widths_are_refused() -> None:
    found = awareness_directions(noise(4, 3, 8) + 1, noise(4, 3, 8, seed=1), all_sites(3))
    for shape in ((5, 2, 8), (5, 3, 9), (5, 8)):
        with pytest.raises(WorkbenchError, match=r"Expected activations of shape .* \(\.\.\., 3, 8\), found"):
            Directions.project(found, noise(*shape))
    with pytest.raises(
        WorkbenchError, match=r"no awareness direction at resid_post\[7\]; sites: resid_post\[0\] \.\.\."
    ):
        found.at(Site(7))
    torch.testing.assert_close(found.at(Site(1)), found.unit[1])


# --- refusal: stratification --------------------------------------------------------------------------------------


def confounded(n: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Items in which the safety prompt moves axis 0 by 10, refusing moves axis 1 by 2 and content axis 2 by 3.

    Under the prompt 85 % are refused, without it 15 %: the pooled difference is mostly axis 0.
    """
    generator = torch.Generator().manual_seed(0)
    condition = torch.arange(n) % 2
    content = (torch.arange(n) // 2) % 2
    refused = torch.rand(n, generator=generator) < torch.where(condition == 1, 0.85, 0.15)
    values = 0.3 * torch.randn(n, 1, 6, generator=generator)
    values[:, 0, 0] += 10.0 * condition
    values[:, 0, 1] += 2.0 * refused
    values[:, 0, 2] += 3.0 * content
    return values, refused, condition, content


def test_stratification_finds_refusal_where_pooling_finds_the_prompt() -> None:
    values, refused, condition, content = confounded()
    stratified = refusal_directions(values, refused, condition, content, SITE)
    pooled = refusal_directions(values, refused, condition, content, SITE, min_strata=99)
    prompt, refusal = torch.eye(6)[0], torch.eye(6)[1]
    assert cosine(stratified.at(SITE[0]), refusal) > 0.99
    assert cosine(stratified.at(SITE[0]), prompt) < 0.1
    assert cosine(pooled.at(SITE[0]), prompt) > 0.9
    assert cosine(pooled.at(SITE[0]), refusal) < 0.4
    assert stratified.source == "refused minus complied within condition x content"
    assert pooled.source == "refused minus complied, pooled over conditions (confounded with the prompt)"
    assert (stratified.provenance["fit"], pooled.provenance["fit"]) == ("stratified", "pooled")
    assert abs(float(stratified.separation[0]) - 2.0) < 0.1


def test_strata_are_weighted_by_the_product_of_their_sizes() -> None:
    # Stratum (0, 0): 2 refused, 6 complied, weight 2 * 6 / 8 = 1.5, difference (4, 0).
    # Stratum (1, 1): 5 refused, 5 complied, weight 25 / 10 = 2.5, difference (0, 8).
    # Stratum (1, 0): 1 refused, 9 complied: too few to count.
    spec = [(0, 0, 2, 6, (4.0, 0.0)), (1, 1, 5, 5, (0.0, 8.0)), (1, 0, 1, 9, (100.0, 100.0))]
    rows: list[tuple[int, int, bool, tuple[float, float]]] = []
    for c, k, n_refused, n_complied, difference in spec:
        base = (1.0 * c, 2.0 * k)
        rows += [(c, k, True, (base[0] + difference[0], base[1] + difference[1]))] * n_refused
        rows += [(c, k, False, base)] * n_complied
    values = torch.tensor([[row[3]] for row in rows])
    refused = torch.tensor([row[2] for row in rows])
    condition, content = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    found = refusal_directions(values, refused, condition, content, SITE, min_per_class=2)
    difference = np.array([1.5 * 4.0, 2.5 * 8.0]) / 4.0
    np.testing.assert_allclose(found.separation.numpy(), [np.linalg.norm(difference)], rtol=1e-6)
    np.testing.assert_allclose(found.unit[0].numpy(), difference / np.linalg.norm(difference), rtol=1e-6)
    np.testing.assert_allclose(found.origin[0].numpy(), [2.5 * 1.0 / 4.0, 2.5 * 2.0 / 4.0], rtol=1e-6)
    assert found.provenance["strata_used"] == 2
    assert {"condition": 1, "content": "harmless", "refused": 1, "complied": 9} in found.provenance["strata"]


def test_the_sources_follow_one_another_in_order_and_by_name() -> None:
    values, _, condition, content = confounded(40)

    def source(refused: Tensor, condition: Tensor = condition, content: Tensor = content) -> str:
        found = refusal_directions(values, refused, condition, content, SITE, min_per_class=5)
        assert found.concept == "refusal"
        assert found.read_at == "last_prompt"
        return str(found.provenance["fit"])

    mixed = (torch.arange(40) // 4) % 2 == 0  # every stratum half refused
    assert source(mixed) == "stratified"
    assert source(condition == 1) == "pooled"  # refused exactly under the prompt
    few = torch.arange(40) < 4
    assert source(few) == "content"
    assert source(torch.zeros(40, dtype=torch.bool)) == "content"


def test_the_content_fallback_uses_plain_prompts_only() -> None:
    values, _, condition, content = confounded(40)
    found = refusal_directions(values, torch.zeros(40, dtype=torch.bool), condition, content, SITE)
    plain = values[condition == 0]
    expected = plain[content[condition == 0] == 1].mean(0) - plain[content[condition == 0] == 0].mean(0)
    assert cosine(found.unit[0], expected[0]) > 0.999999
    assert found.source == "harmful minus harmless content (fallback: too few refusals or compliances)"


def test_when_nothing_is_enough_the_message_counts_everything() -> None:
    values = noise(6, 1, 4)
    refused = torch.tensor([True, False, False, False, False, False])
    with pytest.raises(
        WorkbenchError,
        match=r"at least 5 refused .* found 1 refused, 5 complied, 6 harmful and 0 harmless.*more training",
    ):
        refusal_directions(values, refused, torch.zeros(6).long(), torch.ones(6).long(), SITE)


def test_lists_of_unequal_length_are_refused() -> None:
    # The shape check of the tests would see it first; users run without it.
    unchecked = getattr(refusal_directions, "__wrapped__", refusal_directions)
    values, long = noise(6, 1, 4), torch.zeros(6).long()
    with pytest.raises(WorkbenchError, match="found 6 activations, 5 outcomes, 6 conditions and 6 content classes"):
        unchecked(values, torch.zeros(5).bool(), long, long, SITE)


# --- unembedding --------------------------------------------------------------------------------------------------


def test_the_unembedding_difference_by_hand() -> None:
    unembedding = torch.tensor([[1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 2.0, 9.0]])  # d_model 2, vocabulary 4
    zero, one = torch.zeros(2, 2), torch.tensor([[5.0, 1.0], [-5.0, 1.0]])
    found = unembedding_directions(unembedding, (0, 1), (2,), zero, one, all_sites(2))
    expected = torch.tensor([2.0, -2.0]) / math.sqrt(8)  # mean of columns 0 and 1, minus column 2
    torch.testing.assert_close(found.unit, torch.stack([expected, expected]))
    # At the second site the classes stand the other way round: no unit.
    torch.testing.assert_close(found.separation, torch.tensor([4 / math.sqrt(2), float("nan")]), equal_nan=True)
    assert found.source == "unembedding difference of refusal and compliance openings"


@pytest.mark.parametrize(
    ("refusal", "compliance", "message"),
    [
        ((), (1,), "needs first tokens of both refusals and compliant answers"),
        ((1,), (), "needs first tokens of both"),
        ((1, 2), (2, 1), "they must differ"),
        ((1,), (4,), "Token 4 is not in the vocabulary of 4 tokens"),
        ((-1,), (2,), "Token -1 is not in the vocabulary"),
    ],
)
def test_bad_openings_are_refused(refusal: Any, compliance: Any, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        unembedding_directions(noise(2, 4), refusal, compliance, torch.zeros(1, 2), torch.ones(1, 2), SITE)


# --- nulls --------------------------------------------------------------------------------------------------------


def test_random_directions_are_uniform_on_the_sphere_and_reproducible() -> None:
    drawn = random_unit_directions(4000, 2, 8, seed=3)
    torch.testing.assert_close(drawn.norm(dim=-1), torch.ones(4000, 2))
    assert torch.equal(drawn, random_unit_directions(4000, 2, 8, seed=3))
    assert not torch.equal(drawn, random_unit_directions(4000, 2, 8, seed=4))
    second = torch.einsum("nd,ne->de", drawn[:, 0], drawn[:, 0]) / 4000
    torch.testing.assert_close(second, torch.eye(8) / 8, atol=0.01, rtol=0)
    assert float(drawn.mean(0).abs().max()) < 0.03
    assert abs(float((drawn[:, 0] * drawn[:, 1]).sum(-1).mean())) < 0.03


def test_a_null_band_is_the_central_95_percent() -> None:
    statistics = torch.stack([torch.arange(1001.0), -torch.arange(1001.0)], dim=1)
    band = null_band("n", all_sites(2), statistics)
    np.testing.assert_allclose(band.low, [25.0, -975.0])
    np.testing.assert_allclose(band.high, [975.0, -25.0])
    assert band.to_dataframe()["layer"].tolist() == [0, 1]
    with pytest.raises(WorkbenchError, match="needs at least one null direction, found none"):
        null_band("n", all_sites(2), statistics[:0])


def test_shuffled_labels_forget_the_classes_but_not_the_anisotropy() -> None:
    label = (torch.arange(60) < 30).long()
    values = 0.1 * noise(60, 1, 16)
    values[:, 0, 5] += 2 * noise(60, seed=7)  # the data vary along axis 5
    values[:, 0, 0] += 2.0 * label
    drawn = shuffled_unit_directions(values, label, n=300)
    torch.testing.assert_close(drawn.norm(dim=-1), torch.ones(300, 1))
    assert torch.equal(drawn, shuffled_unit_directions(values, label, n=300))
    along_class, along_noise = drawn[:, 0, 0], drawn[:, 0, 5]
    assert abs(float(along_class.mean())) < 0.1
    assert float(along_noise.abs().mean()) > 0.6 > 3 * float(drawn[:, 0, 1].abs().mean())


def test_shuffling_within_strata_never_finds_what_differs_between_them() -> None:
    values, refused, condition, content = confounded(200)
    drawn = shuffled_unit_directions(values, refused.long(), n=200, strata=condition * 2 + content)
    free = shuffled_unit_directions(values, refused.long(), n=200)
    assert float(drawn[:, 0, 0].abs().mean()) < 0.3 < 0.8 < float(free[:, 0, 0].abs().mean())


def test_every_shuffle_keeps_class_sizes_within_strata() -> None:
    # One axis per item: a direction's coordinates are the weights of the items.
    n = 12
    strata = torch.tensor([0] * 6 + [1] * 4 + [2] * 2)
    label = torch.tensor([1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1])  # 2 of 6, 1 of 4, and 2 of 2, which cannot be used
    drawn = shuffled_unit_directions(torch.eye(n)[:, None], label, n=50, strata=strata)[:, 0]
    for row in drawn:
        assert (row[10:] == 0).all()
        assert int((row[:6] > 0).sum()) == 2
        assert int((row[6:10] > 0).sum()) == 1
        scale = row / row[:6].max() * (4 / 3) / 2  # weight 2 * 4 / 6 of the first stratum, on two items
        np.testing.assert_allclose(float(scale[:6][scale[:6] < 0][0]), -(4 / 3) / 4, rtol=1e-5)
        np.testing.assert_allclose(float(scale[6:10].max()), 3 / 4, rtol=1e-5)  # weight 1 * 3 / 4, on one item
    assert len({tuple((row > 0).tolist()) for row in drawn}) > 10
    only_first = shuffled_unit_directions(torch.eye(n)[:, None], label, n=5, strata=strata, min_per_class=2)[:, 0]
    assert (only_first[:, 6:] == 0).all()


def test_labels_that_cannot_be_shuffled_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="a group with at least 1 items of both labels; found none among 4 items"):
        shuffled_unit_directions(noise(4, 1, 3), torch.ones(4).long(), n=3)
    with pytest.raises(WorkbenchError, match="found none"):
        shuffled_unit_directions(noise(4, 1, 3), torch.tensor([1, 1, 0, 0]), n=3, strata=torch.tensor([0, 0, 1, 1]))


# --- provenance and files -----------------------------------------------------------------------------------------


@pytest.fixture
def directions() -> Directions:
    found = awareness_directions(noise(9, 3, 8) + 1, noise(7, 3, 8, seed=1), all_sites(3), {"train": {"sha256": "é🙂"}})
    return replace(found, separation=torch.tensor([1.0, float("nan"), 2.0]))


def test_a_file_gives_back_everything(directions: Directions, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "a.safetensors"
    original = directions.with_provenance(validated=False, auroc=[0.9, None])
    original.save(file)
    found = Directions.load(file)
    for name in ("unit", "origin", "separation"):
        torch.testing.assert_close(getattr(found, name), getattr(original, name), rtol=0, atol=0, equal_nan=True)
    assert (found.concept, found.source, found.read_at, found.sites) == (
        original.concept,
        original.source,
        original.read_at,
        original.sites,
    )
    assert found.provenance == original.provenance
    assert found.describe().endswith(", NOT validated")
    assert [p.name for p in file.parent.iterdir()] == ["a.safetensors"]


def test_validation_is_part_of_the_description(directions: Directions) -> None:
    assert directions.validated is None
    assert directions.describe().endswith(", not checked causally")
    assert directions.with_provenance(validated=True).describe().endswith(", validated")
    assert directions.source in directions.describe()
    assert "validated" not in directions.provenance  # copies, not changes
    assert directions.to_dataframe()["site"].tolist() == ["resid_post[0]", "resid_post[1]", "resid_post[2]"]


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_one_sentence(directions: Directions, keep: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    directions.save(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        WorkbenchError, match=r"a\.safetensors' is not a readable safetensors file \(truncated\?\)"
    ) as caught:
        Directions.load(file)
    assert "\n" not in str(caught.value)


def test_other_files_are_told_apart(directions: Directions, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(WorkbenchError, match=r"a\.safetensors' does not exist"):
        Directions.load(file)
    with pytest.raises(WorkbenchError, match="is a folder; expected a safetensors file"):
        Directions.load(tmp_path)
    file.write_bytes(b"\x80\x04\x95 a pickle, perhaps")
    with pytest.raises(WorkbenchError, match="is not a readable safetensors file"):
        Directions.load(file)
    save_file({"unit": torch.zeros(2)}, file)
    with pytest.raises(WorkbenchError, match=r"format 'sgworkbench-directions-1' .* does not name its format"):
        Directions.load(file)
    save_file({"unit": torch.zeros(2)}, file, metadata={"format": "other"})
    with pytest.raises(WorkbenchError, match="is of format 'other'"):
        Directions.load(file)
    save_file({"unit": torch.zeros(2)}, file, metadata={"format": "sgworkbench-directions-1"})
    with pytest.raises(WorkbenchError, match="lacks the tensors origin, separation; it is damaged"):
        Directions.load(file)


GOOD = {"concept": "c", "source": "s", "read_at": "last_prompt", "sites": '["resid_post[0]"]', "provenance": "{}"}


@pytest.mark.parametrize(
    "change",
    [
        {"sites": None},
        {"concept": None},
        {"sites": "["},
        {"sites": "3"},
        {"sites": "[[3]]"},
        {"sites": '["mlp[0]"]'},
        {"sites": '["resid_post[0]", "resid_post[1]"]'},
        {"sites": "[" * 100_000},
        {"provenance": "{"},
        {"provenance": "[]"},
        {"provenance": '{"validated": "yes"}'},
        {"provenance": '{"validated": [1]}'},
    ],
    ids=lambda change: str(change)[:40],
)
def test_damaged_metadata_is_one_sentence(change: dict[str, str | None], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    metadata = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    tensors = {"unit": torch.zeros(1, 2), "origin": torch.zeros(1, 2), "separation": torch.zeros(1)}
    save_file(tensors, file, metadata={"format": "sgworkbench-directions-1", **metadata})
    with pytest.raises(WorkbenchError, match=r"a\.safetensors' (is damaged|has damaged metadata)"):
        Directions.load(file)


@pytest.mark.parametrize(
    "change",
    [
        {"unit": torch.zeros(2)},
        {"origin": torch.zeros(1, 3)},
        {"separation": torch.zeros(2)},
        {"unit": torch.zeros(1, 2, dtype=torch.float64)},
        {"unit": torch.tensor(1.0)},
        {"origin": torch.zeros(1, 2, dtype=torch.int64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_that_do_not_belong_together_are_one_sentence(change: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {"unit": torch.zeros(1, 2), "origin": torch.zeros(1, 2), "separation": torch.zeros(1)}
    save_file({**tensors, **change}, file, metadata={"format": "sgworkbench-directions-1", **GOOD})
    with pytest.raises(WorkbenchError, match="is damaged: its tensors, 1 sites and provenance do not belong together"):
        Directions.load(file)
    save_file(tensors, file, metadata={"format": "sgworkbench-directions-1", **GOOD})
    assert json.loads(GOOD["sites"]) == [str(site) for site in Directions.load(file).sites]


def test_what_cannot_be_written_is_one_sentence(directions: Directions, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="provenance must hold plain JSON values to be saved"):
        directions.with_provenance(when=object()).save(tmp_path / "a.safetensors")
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkbenchError, match="Cannot write"):
        directions.save(tmp_path / "file" / "a.safetensors")
    with pytest.raises(WorkbenchError, match="Cannot write"):
        directions.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
