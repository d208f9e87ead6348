"""What each operator promises, on plain tensors, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.capture import Activations, Moments
from sgworkbench.analysis.directions import Directions, mean_difference_directions
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.steering import (
    OPERATORS,
    Ablate,
    Add,
    AddPreservingNorm,
    AffineConceptEdit,
    Clamp,
    NullSpace,
    Operator,
    Rotate,
    fit_null_space,
    get_operator,
    moments_of,
    register_operator,
)

D = 24
SITE, OTHER = Site(2), Site(3, "resid_pre")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def stream(generator: torch.Generator) -> Tensor:
    return 4 * torch.randn(3, 7, D, generator=generator)


@pytest.fixture
def direction(generator: torch.Generator) -> Tensor:
    return 5 * torch.randn(D, generator=generator)


@pytest.fixture
def fitted(generator: torch.Generator) -> Directions:
    one, zero = torch.randn(9, 2, D, generator=generator) + 1, torch.randn(8, 2, D, generator=generator)
    return mean_difference_directions(
        one, zero, concept="test", source="random", read_at="last_prompt", sites=(SITE, OTHER)
    )


def steered(operator: Operator, stream: Tensor, site: Site = SITE) -> Tensor:
    return stream + operator.change(stream, site)


def along(stream: Tensor, direction: Tensor) -> Tensor:
    return stream.double() @ (direction.double() / direction.double().norm())


class TestProperties:
    def test_ablation_leaves_no_projection_and_nothing_else_changes(self, stream: Tensor, direction: Tensor) -> None:
        result = steered(Ablate({SITE: direction}), stream)
        assert along(stream, direction).abs().min() > 1e-3
        assert along(result, direction).abs().max() < 1e-5
        unit = direction / direction.norm()
        torch.testing.assert_close(result, stream - (stream @ unit)[..., None] * unit, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(("low", "high"), [(None, 0.5), (-0.25, None), (-0.25, 0.5), (0.5, 0.5)])
    def test_a_clamp_holds_its_bounds_and_leaves_what_is_within(
        self, low: float | None, high: float | None, stream: Tensor, direction: Tensor
    ) -> None:
        operator = Clamp({SITE: direction}, {} if low is None else {SITE: low}, {} if high is None else {SITE: high})
        before, after = along(stream, direction), along(steered(operator, stream), direction)
        expected = torch.from_numpy(np.clip(before.numpy(), low, high))
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)
        within = before == expected
        assert torch.equal(steered(operator, stream)[within], stream[within])

    def test_a_clamp_in_separation_units(self, stream: Tensor, fitted: Directions) -> None:
        operator = Clamp.from_directions(fitted, (SITE, OTHER), low=0.2, high=0.8)
        for index, site in enumerate((SITE, OTHER)):
            result = steered(operator, stream, site)
            units = fitted.in_separation_units(torch.stack([result, result], dim=-2))[..., index]
            assert units.min() > 0.2 - 1e-5
            assert units.max() < 0.8 + 1e-5

    @pytest.mark.parametrize("level", [0.0, 1.0, -0.5])
    def test_affine_editing_puts_every_token_at_the_level(
        self, level: float, stream: Tensor, fitted: Directions
    ) -> None:
        result = steered(AffineConceptEdit.from_directions(fitted, (SITE,), level), stream)
        units = fitted.in_separation_units(torch.stack([result, result], dim=-2))[..., 0]
        torch.testing.assert_close(units, torch.full_like(units, level), atol=1e-5, rtol=0)
        unit = fitted.at(SITE)
        rest = result - (result @ unit)[..., None] * unit
        torch.testing.assert_close(rest, stream - (stream @ unit)[..., None] * unit, atol=1e-5, rtol=0)

    def test_norm_preserving_addition_keeps_norms_and_turns_towards_the_vector(
        self, stream: Tensor, direction: Tensor
    ) -> None:
        result = steered(AddPreservingNorm({SITE: direction}, 0.8), stream)
        torch.testing.assert_close(result.norm(dim=-1), stream.norm(dim=-1))
        plain = stream + 0.8 * direction
        torch.testing.assert_close(torch.cosine_similarity(result, plain, dim=-1), torch.ones(3, 7))

    def test_norm_preserving_addition_of_the_exact_opposite_leaves_the_token(self) -> None:
        stream = torch.ones(1, 2, D)
        result = steered(AddPreservingNorm({SITE: -torch.ones(D)}, 1.0), stream)
        assert torch.equal(result, stream)

    @pytest.mark.parametrize("angle", [0.0, 30.0, 180.0, -100.0])
    def test_rotation_reaches_its_target_angle(
        self, angle: float, stream: Tensor, direction: Tensor, generator: torch.Generator
    ) -> None:
        second = torch.randn(D, generator=generator)
        result = steered(Rotate({SITE: direction}, {SITE: second}, angle), stream)
        one = direction.double() / direction.double().norm()
        two = second.double() - (second.double() @ one) * one
        two = two / two.norm()
        x, y = result.double() @ one, result.double() @ two
        found = torch.rad2deg(torch.atan2(y, x))
        difference = (found - angle + 180) % 360 - 180
        assert difference.abs().max() < 1e-3
        torch.testing.assert_close(result.norm(dim=-1), stream.norm(dim=-1))
        plane = torch.stack([one, two])
        outside = result.double() - (result.double() @ plane.T) @ plane
        torch.testing.assert_close(outside, stream.double() - (stream.double() @ plane.T) @ plane, atol=1e-5, rtol=0)

    def test_relative_rotation_adds_angles_and_undoes_itself(
        self, stream: Tensor, direction: Tensor, generator: torch.Generator
    ) -> None:
        plane = ({SITE: direction}, {SITE: torch.randn(D, generator=generator)})
        there = steered(Rotate(*plane, 40.0, "relative"), stream)
        assert not torch.allclose(there, stream, atol=1e-2)
        torch.testing.assert_close(steered(Rotate(*plane, -40.0, "relative"), there), stream, atol=1e-5, rtol=0)
        twice = steered(Rotate(*plane, 40.0, "relative"), there)
        torch.testing.assert_close(twice, steered(Rotate(*plane, 80.0, "relative"), stream), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("name", sorted(OPERATORS))
    def test_bfloat16_streams_are_computed_wide(
        self, name: str, stream: Tensor, direction: Tensor, generator: torch.Generator
    ) -> None:
        operator = self.example(name, direction, generator)
        low = stream.bfloat16()
        change = operator.change(low, SITE)
        assert change.dtype == torch.bfloat16
        expected = operator.change(low.float(), SITE)
        assert (change.float() - expected).abs().max() <= 2**-8 * expected.abs().max()

    @staticmethod
    def example(name: str, direction: Tensor, generator: torch.Generator) -> Operator:
        other = {SITE: torch.randn(D, generator=generator)}
        return {
            "add": lambda: Add({SITE: direction}, 0.5),
            "ablate": lambda: Ablate({SITE: direction}),
            "clamp": lambda: Clamp({SITE: direction}, {}, {SITE: 0.1}),
            "ace": lambda: AffineConceptEdit({SITE: direction}, {SITE: 0.3}, {SITE: 2.0}, 1.0),
            "add_preserving_norm": lambda: AddPreservingNorm({SITE: direction}, 0.5),
            "rotate": lambda: Rotate({SITE: direction}, other, 50.0),
            "null_space": lambda: NullSpace({SITE: direction}, other),
        }[name]()


def low_rank(n: int, rank: int, generator: torch.Generator, basis: Tensor) -> Tensor:
    return torch.randn(n, rank, generator=generator) @ basis[:rank] + basis[0]


def kept(values: Tensor) -> Activations:
    index = torch.arange(len(values))
    return Activations((SITE,), values[:, None], index, torch.zeros_like(index), len(values))


class TestNullSpace:
    RANK = 10

    @pytest.fixture
    def sets(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Harmless activations in ten dimensions, harmful ones that also leave them, held-out harmless ones."""
        basis = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
        harmless, held_out = (low_rank(n, self.RANK, generator, basis) for n in (200, 50))
        noise = 0.02 * torch.randn(60, D, generator=generator)
        harmful = low_rank(60, self.RANK, generator, basis) + 1.5 * basis[self.RANK + 2] + noise
        small = 1e-3
        return (
            harmless + small * torch.randn(200, D, generator=generator),
            harmful,
            held_out + small * torch.randn(50, D, generator=generator),
        )

    def test_harmless_activations_stay_within_tolerance_and_harmful_ones_get_the_vector(
        self, sets: tuple[Tensor, Tensor, Tensor], direction: Tensor
    ) -> None:
        harmless, harmful, held_out = sets
        fit = fit_null_space({SITE: direction}, moments_of(kept(harmless)), moments_of(kept(harmful)), leak=0.01)
        quiet = fit.operator.change(held_out[None], SITE)[0].norm(dim=-1) / direction.norm()
        loud = fit.operator.change(harmful[None], SITE)[0] / direction
        assert quiet.max() < 0.02
        torch.testing.assert_close(loud.mean(), torch.tensor(1.0), atol=0.05, rtol=0)
        row = fit.table.iloc[0]
        assert row["dimensions"] == D - self.RANK
        assert row["harmful_gain"] == pytest.approx(float(fit.operator.gain(harmful, SITE).mean()), abs=1e-4)
        assert row["harmless_gain"] == pytest.approx(
            float(fit.operator.gain(harmless, SITE).square().mean().sqrt()), abs=1e-4
        )

    def test_equals_the_full_ridge_regression_of_alphasteer(
        self, sets: tuple[Tensor, Tensor, Tensor], direction: Tensor
    ) -> None:
        """Their formula with matrices: M = R H^T P (P H H^T P + ridge P)^+, every column of R being v."""
        harmless, harmful, held_out = (values.double() for values in sets)
        leak, ridge = 0.01, 0.03
        fit = fit_null_space(
            {SITE: direction}, moments_of(kept(sets[0])), moments_of(kept(sets[1])), leak=leak, ridge=ridge
        )
        values, vectors = np.linalg.eigh((harmless.T @ harmless / len(harmless)).numpy())
        null = vectors[:, np.cumsum(values) <= leak**2 * values.sum()]
        project = null @ null.T
        targets = np.tile(direction.double().numpy()[:, None], len(harmful))
        inside = project @ harmful.T.numpy()
        second = inside @ inside.T / len(harmful)
        penalty = ridge * np.trace(second) / null.shape[1]
        full = (targets @ inside.T / len(harmful)) @ np.linalg.pinv(second + penalty * project, rcond=1e-9) @ project
        expected = held_out.numpy() @ full.T
        ours = fit.operator.change(sets[2][None], SITE)[0]
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4 * float(direction.norm()))
        expected = harmful.numpy() @ full.T
        ours = fit.operator.change(sets[1][None], SITE)[0]
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4 * float(direction.norm()))

    def test_refuses_moments_that_cannot_serve(self, sets: tuple[Tensor, Tensor, Tensor], direction: Tensor) -> None:
        good = moments_of(kept(sets[0]))
        bare = Moments((SITE,), 5, good.mean, None)
        with pytest.raises(WorkbenchError, match="harmless moments have no covariance"):
            fit_null_space({SITE: direction}, bare, good)
        with pytest.raises(WorkbenchError, match=r"harmful|harmless moments were not read at resid_pre\[3\]"):
            fit_null_space({OTHER: direction}, good, good)
        with pytest.raises(WorkbenchError, match="leak between 0 and 1"):
            fit_null_space({SITE: direction}, good, good, leak=1.0)
        white = Moments((SITE,), 100, torch.zeros(1, D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)[None])
        with pytest.raises(WorkbenchError, match="fill every direction"):
            fit_null_space({SITE: direction}, white, good, leak=0.05)
        with pytest.raises(WorkbenchError, match="at least two tokens"):
            moments_of(kept(sets[0][:1]))


ALL = pytest.mark.parametrize(
    "make",
    [
        lambda v: Add({SITE: v}, 1.0),
        lambda v: Ablate({SITE: v}),
        lambda v: Clamp({SITE: v}, {SITE: 0.0}, {}),
        lambda v: AffineConceptEdit({SITE: v}, {SITE: 0.0}, {SITE: 1.0}, 0.0),
        lambda v: AddPreservingNorm({SITE: v}, 1.0),
        lambda v: Rotate({SITE: v}, {SITE: torch.ones(D)}, 90.0),
        lambda v: Rotate({SITE: torch.arange(1.0, D + 1)}, {SITE: v}, 90.0),
        lambda v: NullSpace({SITE: v}, {SITE: torch.ones(D)}),
        lambda v: NullSpace({SITE: torch.ones(D)}, {SITE: v}),
    ],
    ids=["add", "ablate", "clamp", "ace", "norm", "rotate1", "rotate2", "null1", "null2"],
)


class TestBadInput:
    @ALL
    def test_a_zero_direction_is_refused(self, make: object) -> None:
        with pytest.raises(WorkbenchError, match=r"at resid_post\[2\] is zero"):
            make(torch.zeros(D))  # type: ignore[operator]

    @ALL
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_direction_that_is_not_finite_is_refused(self, make: object, value: float) -> None:
        vector = torch.ones(D)
        vector[3] = value
        with pytest.raises(WorkbenchError, match=r"at resid_post\[2\] holds NaN or infinite"):
            make(vector)  # type: ignore[operator]

    def test_vectors_of_two_widths_or_none_are_refused(self) -> None:
        with pytest.raises(WorkbenchError, match="all of one length"):
            Add({SITE: torch.ones(D), OTHER: torch.ones(D + 1)}, 1.0)
        with pytest.raises(WorkbenchError, match="at least one site"):
            Ablate({})

    @pytest.mark.parametrize("value", [float("nan"), torch.tensor([1.0, float("inf")]), torch.ones(0)])
    def test_a_coefficient_that_is_no_number_per_prompt_is_refused(self, value: float | Tensor) -> None:
        with pytest.raises(WorkbenchError, match=r"coefficient|Coefficient"):
            Add({SITE: torch.ones(D)}, value)

    def test_a_clamp_needs_bounds_in_order(self) -> None:
        with pytest.raises(WorkbenchError, match="must not be above its cap"):
            Clamp({SITE: torch.ones(D)}, {SITE: 1.0}, {SITE: 0.0})
        with pytest.raises(WorkbenchError, match="a floor, a cap or both"):
            Clamp({SITE: torch.ones(D)}, {}, {})
        with pytest.raises(WorkbenchError, match="no direction there"):
            Clamp({SITE: torch.ones(D)}, {SITE: 0.0, OTHER: 0.0}, {})

    def test_parallel_directions_span_no_plane(self) -> None:
        with pytest.raises(WorkbenchError, match="parallel"):
            Rotate({SITE: torch.ones(D)}, {SITE: -3 * torch.ones(D)}, 10.0)

    def test_operators_of_a_site_without_a_fitted_direction_are_refused(self, fitted: Directions) -> None:
        with pytest.raises(WorkbenchError, match=r"no test direction at resid_post\[9\]"):
            Clamp.from_directions(fitted, (Site(9),), low=0.0)
        same = torch.ones(3, 1, D)
        nothing = mean_difference_directions(
            same, same, concept="refusal", source="none", read_at="last_prompt", sites=(SITE,)
        )
        with pytest.raises(WorkbenchError, match="classes do not differ"):
            AffineConceptEdit.from_directions(nothing, (SITE,))


class TestRegistry:
    def test_lists_every_operator_by_name(self) -> None:
        assert set(OPERATORS) == {
            "add", "ablate", "clamp", "ace", "add_preserving_norm", "rotate", "null_space"
        }  # fmt: skip
        assert get_operator("ace") is AffineConceptEdit

    def test_an_unknown_name_comes_with_the_nearest_one(self) -> None:
        with pytest.raises(WorkbenchError, match=r"Unknown operator 'abalte'\. Did you mean 'ablate'\?"):
            get_operator("abalte")

    def test_a_users_operator_joins_with_a_decorator(self, stream: Tensor) -> None:
        try:

            @register_operator
            @dataclass(frozen=True)
            class Shrink(Operator):
                name = "shrink"
                weights: dict[Site, Tensor]

                @property
                def by_site(self) -> Mapping[Site, Tensor]:
                    return self.weights

                def change(
                    self, stream: Float[Tensor, "batch pos d_model"], site: Site
                ) -> Float[Tensor, "batch pos d_model"]:
                    return -self.weights[site] * stream

            operator = get_operator("shrink")({OTHER: torch.ones(D), SITE: torch.full((D,), 0.5)})  # type: ignore[call-arg]
            assert torch.equal(steered(operator, stream), stream / 2)
            assert operator.sites == (SITE, OTHER)
            assert operator.d_model == D
            with pytest.raises(WorkbenchError, match="'add' is taken"):
                register_operator(type("Mine", (Shrink,), {"name": "add"}))
            with pytest.raises(WorkbenchError, match="needs a class attribute `name`"):
                register_operator(type("Mine", (Shrink,), {"name": ""}))
        finally:
            OPERATORS.pop("shrink", None)
