"""Every direction method against a hand-made or independent answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.covariance import LedoitWolf
from torch import Tensor

from sgworkbench.analysis.direction_methods import DIRECTION_METHODS, fit_directions
from sgworkbench.analysis.directions import mean_difference_directions
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError

D = 6
SITES = (Site(0), Site(3))
FACTS: dict[str, Any] = {"sites": SITES, "concept": "awareness", "read_at": "last_prompt"}


@pytest.fixture
def classes() -> tuple[Tensor, Tensor]:
    """Two classes of 40 with one correlated covariance, other means at each site."""
    generator = torch.Generator().manual_seed(11)
    mix = torch.randn(D, D, generator=generator)
    shift = torch.randn(2, D, generator=generator)
    one, zero = (torch.randn(40, 2, D, generator=generator) @ mix for _ in range(2))
    return one + shift, zero


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("method", sorted(DIRECTION_METHODS))
def test_every_method_gives_unit_directions_in_the_same_separation_units(
    method: str, classes: tuple[Tensor, Tensor]
) -> None:
    one, zero = classes
    found = fit_directions(method, one, zero, **FACTS)
    torch.testing.assert_close(found.unit.norm(dim=-1), torch.ones(2))
    units = torch.stack([found.in_separation_units(values).mean(0) for values in (zero, one)])
    torch.testing.assert_close(units, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), atol=1e-4, rtol=0)
    assert found.provenance["method"] == method
    assert (found.provenance["n_positive"], found.provenance["n_negative"]) == (40, 40)
    swapped = fit_directions(method, zero, one, **FACTS)
    torch.testing.assert_close(swapped.unit, -found.unit, atol=1e-3, rtol=0)


def test_mean_difference_equals_the_one_of_the_foundation(classes: tuple[Tensor, Tensor]) -> None:
    found = fit_directions("mean_difference", *classes, **FACTS)
    expected = mean_difference_directions(*classes, source="", **FACTS)
    torch.testing.assert_close(found.unit, expected.unit)
    torch.testing.assert_close(found.separation, expected.separation)


def test_pca_diff_is_the_top_eigenvector_of_the_covariance_of_differences(classes: tuple[Tensor, Tensor]) -> None:
    one, zero = classes
    found = fit_directions("pca_diff", one, zero, **FACTS)
    for index in range(2):
        covariance = np.cov((one - zero)[:, index].double().numpy().T)
        top = np.linalg.eigh(covariance)[1][:, -1]
        assert abs(cosine(found.unit[index], top)) == pytest.approx(1, abs=1e-5)


def test_pca_diff_is_blind_to_the_shift_itself() -> None:
    """All pairs differ by one large shift and by noise along one other axis: pca_diff finds the other axis."""
    generator = torch.Generator().manual_seed(2)
    zero = torch.randn(50, 1, D, generator=generator)
    one = zero.clone()
    one[:, :, 0] += 30.0
    one[:, :, 1] += torch.randn(50, 1, generator=generator)
    facts = FACTS | {"sites": SITES[:1]}
    assert abs(float(fit_directions("pca_diff", one, zero, **facts).unit[0, 1])) > 0.999
    assert float(fit_directions("mean_difference", one, zero, **facts).unit[0, 0]) > 0.99
    assert float(fit_directions("pca_classes", one, zero, **facts).unit[0, 0]) > 0.99


def test_pca_classes_weighs_classes_equally_around_their_midpoint(classes: tuple[Tensor, Tensor]) -> None:
    one, zero = classes[0], classes[1][:10]
    found = fit_directions("pca_classes", one, zero, **FACTS)
    for index in range(2):
        a, b = one[:, index].double().numpy(), zero[:, index].double().numpy()
        middle = (a.mean(0) + b.mean(0)) / 2
        scatter = (a - middle).T @ (a - middle) / len(a) + (b - middle).T @ (b - middle) / len(b)
        assert abs(cosine(found.unit[index], np.linalg.eigh(scatter)[1][:, -1])) == pytest.approx(1, abs=1e-5)


def test_lda_is_the_inverse_within_class_scatter_times_the_mean_difference(classes: tuple[Tensor, Tensor]) -> None:
    one, zero = classes
    found = fit_directions("lda", one, zero, **FACTS)
    for index in range(2):
        a, b = one[:, index].double().numpy(), zero[:, index].double().numpy()
        scatter = np.cov(a.T) + np.cov(b.T)
        expected = np.linalg.solve(scatter, a.mean(0) - b.mean(0))
        assert cosine(found.unit[index], expected) == pytest.approx(1, abs=1e-5)


def test_whitened_mean_difference_shrinks_the_covariance(classes: tuple[Tensor, Tensor]) -> None:
    one, zero = (values[:8] for values in classes)
    found = fit_directions("whitened_mean_difference", one, zero, **FACTS)
    for index in range(2):
        a, b = one[:, index].double().numpy(), zero[:, index].double().numpy()
        residuals = np.concatenate([a - a.mean(0), b - b.mean(0)])
        shrunk = LedoitWolf(assume_centered=True).fit(residuals).covariance_
        expected = np.linalg.inv(shrunk) @ (a.mean(0) - b.mean(0))
        assert cosine(found.unit[index], expected) == pytest.approx(1, abs=1e-5)


def test_logistic_probe_minimises_the_penalised_loss(classes: tuple[Tensor, Tensor]) -> None:
    one, zero = classes[0], classes[1][:20]
    found = fit_directions("logistic", one, zero, **FACTS)
    a, b = one[:, 0].double().numpy(), zero[:, 0].double().numpy()
    values, sign = np.concatenate([a, b]), np.repeat([1.0, -1.0], [len(a), len(b)])
    scale = values.std(0)
    scaled = (values - values.mean(0)) / scale
    weight = np.repeat([60 / (2 * 40), 60 / (2 * 20)], [40, 20])

    def loss(parameters: np.ndarray) -> float:
        margin = sign * (scaled @ parameters[:-1] + parameters[-1])
        return float((weight * np.logaddexp(0, -margin)).sum() + parameters[:-1] @ parameters[:-1] / 2)

    best = minimize(loss, np.zeros(D + 1), method="BFGS").x
    assert cosine(found.unit[0], best[:-1] / scale) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", sorted(DIRECTION_METHODS))
def test_a_site_where_the_classes_are_the_same_has_no_direction(method: str, classes: tuple[Tensor, Tensor]) -> None:
    one, zero = (values.clone() for values in classes)
    one[:, 0] = zero[:, 0] = 3.0
    found = fit_directions(method, one, zero, **FACTS)
    assert not found.unit[0].any()
    assert found.separation[0].isnan()
    assert found.unit[1].norm() == pytest.approx(1)


def test_refuses_classes_it_cannot_separate(classes: tuple[Tensor, Tensor]) -> None:
    one, zero = classes
    with pytest.raises(WorkbenchError, match=r"Unknown direction method 'logistics'\. Did you mean 'logistic'"):
        fit_directions("logistics", one, zero, **FACTS)
    with pytest.raises(WorkbenchError, match="at least two positive examples; found 1"):
        fit_directions("lda", one[:1], zero, **FACTS)
    with pytest.raises(WorkbenchError, match="as many positive as negative"):
        fit_directions("pca_diff", one[:5], zero, **FACTS)
    with pytest.raises(WorkbenchError, match="positive activations are of 2 sites, but 1 were named"):
        fit_directions("lda", one, zero, **(FACTS | {"sites": SITES[:1]}))
    with pytest.raises(WorkbenchError, match="positive activations for the awareness direction hold NaN"):
        fit_directions("lda", one * float("nan"), zero, **FACTS)
