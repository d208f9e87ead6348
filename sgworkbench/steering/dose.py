"""Dose: the same steering strength as a raw coefficient, a share of the residual norm, or a KL on harmless prompts.

    fraction = |alpha| |v_l| / mean |h_l|,      KL = mean over prompts of KL( p_unsteered || p_steered )

p is the distribution of the first answer token. The norm of a safety vector grows about 200x with depth, so a raw alpha
is another dose at every layer; a fraction compares layers of one vector; a KL compares everything, because it is read
off what the model does. The KL need not grow with alpha: it saturates, and can fall again. So the root finder first
scans a grid, takes the first crossing, and reports the whole scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from sgworkbench.analysis.capture import Positions, capture
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting.rendering import RenderedPrompt
from sgworkbench.prompting.token_batch import check_lengths
from sgworkbench.steering.generation import last_logits
from sgworkbench.steering.hooks import Intervention, steering
from sgworkbench.steering.layers import LayerChoice, choose_layers
from sgworkbench.steering.selector import Selector
from sgworkbench.steering.vector import SteeringVector


class TargetNotReached(WorkbenchError):
    """No coefficient of the scan gives the target KL."""


@torch.inference_mode()
def first_token_log_probabilities(
    loaded: LoadedModel, rendered: Sequence[RenderedPrompt], *, max_batch_tokens: int | None = None
) -> Float[Tensor, "prompt d_vocab"]:
    """Return the log-probabilities of the first answer token, float32 on the CPU; active steering applies.

    Raises:
        WorkbenchError: no prompts, or a prompt longer than the context.
    """
    check_lengths(rendered, loaded.identity.context_length)
    values = torch.empty(len(rendered), loaded.identity.d_vocab)
    for rows, logits in last_logits(loaded, rendered, max_batch_tokens=max_batch_tokens):
        values[rows] = torch.log_softmax(logits.double(), dim=-1).float().cpu()
    return values


def mean_first_token_kl(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    interventions: Intervention | Sequence[Intervention],
    *,
    unsteered: Float[Tensor, "prompt d_vocab"] | None = None,
) -> float:
    """Return the mean KL(unsteered || steered) of the first answer token, in nats.

    Args:
        loaded: the model; steering that is already active on it belongs to both sides.
        rendered: prompts, usually harmless ones.
        interventions: what is measured.
        unsteered: log-probabilities without them, when they are known already.

    Raises:
        WorkbenchError: as `first_token_log_probabilities` and `steering`.
    """
    before = first_token_log_probabilities(loaded, rendered) if unsteered is None else unsteered
    with steering(loaded, interventions):
        after = first_token_log_probabilities(loaded, rendered)
    log_p, log_q = before.double(), after.double()
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@dataclass(frozen=True)
class KlCalibration:
    """The coefficient that gives a KL, and everything that was tried to find it.

    Attributes:
        alpha: smallest coefficient in size at which the target is crossed.
        kl: the KL measured at `alpha`.
        target: the KL asked for.
        n_prompts: prompts per mean.
        crossings: how often the scanned curve crosses the target; more than one means that larger coefficients have
            the same KL again.
        monotone: whether the KL grew along the whole scan.
        scan: alpha, kl and step ("scan" or "root") of every evaluation.
    """

    alpha: float
    kl: float
    target: float
    n_prompts: int
    crossings: int
    monotone: bool
    scan: pd.DataFrame


def alpha_for_kl(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    intervention: Callable[[float], Intervention | Sequence[Intervention]],
    target: float,
    *,
    largest: float,
    n_scan: int = 9,
    tolerance: float = 0.01,
    unsteered: Float[Tensor, "prompt d_vocab"] | None = None,
    report: Reporter = silent,
) -> KlCalibration:
    """Find the coefficient with a given mean first-token KL.

    A grid of coefficients, each twice the one before, is scanned up to `largest`; the first interval that crosses the
    target is refined with Brent's method.

    Args:
        loaded: the model.
        rendered: prompts, usually harmless ones.
        intervention: makes the intervention of a coefficient, for example
            `lambda alpha: vector.intervention(20, alpha)`; 0 must mean no steering.
        target: mean KL in nats.
        largest: last coefficient scanned; negative to search among negative ones.
        n_scan: coefficients scanned.
        tolerance: how far, relative to the target, the KL at the result may be off.
        unsteered: log-probabilities without steering, when they are known already.
        report: progress callback.

    Raises:
        TargetNotReached: a target that the scan does not reach.
        WorkbenchError: a target or settings out of range, or a KL that is not finite.
    """
    if not (0 < target < float("inf")) or not np.isfinite(largest) or largest == 0 or n_scan < 2 or tolerance <= 0:
        raise WorkbenchError(
            "A target KL and a tolerance are positive, the largest coefficient is finite and not zero, and a scan has "
            f"at least two points; found target={target}, largest={largest}, n_scan={n_scan}, tolerance={tolerance}."
        )
    base = first_token_log_probabilities(loaded, rendered) if unsteered is None else unsteered
    tried: list[tuple[float, float, str]] = []

    def excess(alpha: float, step: str = "root") -> float:
        kl = mean_first_token_kl(loaded, rendered, intervention(float(alpha)), unsteered=base)
        if not np.isfinite(kl):
            raise WorkbenchError(f"The KL at coefficient {alpha:g} is not finite; lower the largest coefficient.")
        tried.append((float(alpha), kl, step))
        return kl - target

    grid = [0.0] + [largest * 2.0 ** (step + 1 - n_scan) for step in range(n_scan)]
    values = [-target]
    for index, alpha in enumerate(grid[1:]):
        report("target KL", index, n_scan)
        values.append(excess(alpha, "scan"))
    report("target KL", n_scan, n_scan)
    signs = np.asarray(values) >= 0
    changes = np.flatnonzero(signs[1:] != signs[:-1])
    if len(changes) == 0:
        highest = max(kl for _, kl, _ in tried)
        raise TargetNotReached(
            f"A KL of {target:g} is not reached: the largest found up to coefficient {largest:g} is {highest:.3g}; "
            "raise largest or lower the target."
        )
    low, high = grid[changes[0]], grid[changes[0] + 1]
    alpha = _refine(excess, low, high, values[changes[0]], values[changes[0] + 1], tolerance * target)
    kl = next(kl for tried_alpha, kl, _ in reversed(tried) if tried_alpha == alpha)
    scan = pd.DataFrame(tried, columns=["alpha", "kl", "step"])
    monotone = bool((np.diff(values) >= 0).all())
    return KlCalibration(alpha, kl, target, len(rendered), len(changes), monotone, scan)


class _CloseEnough(Exception):
    """Ends the root finder as soon as the KL itself is close enough: Brent's own tolerance is on the coefficient."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha


def _refine(
    excess: Callable[[float], float], low: float, high: float, at_low: float, at_high: float, tolerance: float
) -> float:
    known = {low: at_low, high: at_high}

    def watched(alpha: float) -> float:
        value = known[alpha] if alpha in known else excess(alpha)
        if abs(value) <= tolerance:
            raise _CloseEnough(alpha)
        return value

    try:
        return float(brentq(watched, low, high, xtol=abs(high) * 1e-6, rtol=1e-6))
    except _CloseEnough as found:
        return float(found.alpha)


def residual_norms(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    sites: Sequence[Site],
    positions: Positions = "last_prompt",
) -> Float[Tensor, "site"]:
    """Return the mean norm of the residual stream per site over the chosen tokens.

    Raises:
        WorkbenchError: as `capture`.
    """
    norms: Tensor = capture(loaded, rendered, sites, positions).values.double().norm(dim=-1)
    return norms.mean(0)


def alpha_for_fraction(fraction: float, vector: Float[Tensor, "d_model"], residual_norm: float) -> float:
    """Return the coefficient whose vector is a given share of the residual norm.

    Raises:
        WorkbenchError: a zero vector, or a fraction or a norm that is not finite.
    """
    norm = float(vector.double().norm())
    if not (np.isfinite(fraction) and 0 < norm < float("inf") and 0 < residual_norm < float("inf")):
        raise WorkbenchError(
            "A fraction of the residual norm needs a finite fraction, a vector that is not zero and a positive "
            f"residual norm; found {fraction}, {norm:g} and {residual_norm:g}."
        )
    return fraction * residual_norm / norm


def dose_table(
    loaded: LoadedModel,
    vector: SteeringVector,
    layers: LayerChoice,
    rendered: Sequence[RenderedPrompt],
    *,
    alpha: float | None = None,
    fraction: float | None = None,
    kl: float | None = None,
    largest_fraction: float = 4.0,
    selector: Selector | None = None,
    report: Reporter = silent,
) -> pd.DataFrame:
    """Convert one dose into the others at every layer, each layer steered alone.

    Args:
        loaded: the model.
        vector: the steering vector.
        layers: layers to convert at.
        rendered: harmless prompts; residual norms are read at their last token.
        alpha: the dose as a raw coefficient.
        fraction: the dose as a share of the residual norm at the written site.
        kl: the dose as a mean first-token KL; the coefficient is searched among positive ones.
        largest_fraction: where the search for a KL ends, as a share of the residual norm.
        selector: tokens to steer.
        report: progress callback.

    Returns one row per layer: layer, write_site, vector_norm, residual_norm, alpha, fraction, kl, crossings (for a
    target KL: see `KlCalibration`) and note. Where a target KL is not reached, alpha, fraction and kl are missing and
    the note says how far it got.

    Raises:
        WorkbenchError: not exactly one dose, or as `SteeringVector.intervention`.
    """
    given = [name for name, value in (("alpha", alpha), ("fraction", fraction), ("kl", kl)) if value is not None]
    if len(given) != 1:
        raise WorkbenchError(f"Give exactly one of alpha, fraction and kl; found {', '.join(given) or 'none'}.")
    chosen = choose_layers(layers, loaded.identity.n_layers)
    sites = [vector.write_site(layer) for layer in chosen]
    norms = residual_norms(loaded, rendered, sites).tolist()
    base = first_token_log_probabilities(loaded, rendered)
    rows = []
    for index, (layer, site, norm) in enumerate(zip(chosen, sites, norms, strict=True)):
        report("dose table", index, len(chosen))
        one = alpha_for_fraction(1.0, vector.at(layer), norm)
        crossings, note, at = 0, "", float("nan")
        if kl is None:
            at = float(alpha) if alpha is not None else float(fraction or 0.0) * one
        else:
            try:
                found = alpha_for_kl(
                    loaded,
                    rendered,
                    lambda a, layer=layer: vector.intervention(layer, a, selector),  # type: ignore[misc]
                    kl,
                    largest=largest_fraction * one,
                    unsteered=base,
                )
                at, crossings = found.alpha, found.crossings
            except TargetNotReached as error:
                note = str(error)
        measured = float("nan")
        if at == at:
            steer = vector.intervention(layer, at, selector)
            measured = mean_first_token_kl(loaded, rendered, steer, unsteered=base)
        rows.append((layer, str(site), norm / one, norm, at, abs(at) / one, measured, crossings, note))
    report("dose table", len(chosen), len(chosen))
    columns = ["layer", "write_site", "vector_norm", "residual_norm", "alpha", "fraction", "kl", "crossings", "note"]
    return pd.DataFrame(rows, columns=columns)
