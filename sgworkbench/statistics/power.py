"""What difference a comparison of two rates could have seen.

Sources: unpaired, the normal sample-size formula with the pooled variance under the null (Fleiss, Levin and
Paik 2003, chapter 4); paired, the same for McNemar's test (Miettinen 1968; Connor 1987, Biometrics 43, 207-211).
Caveat: both describe the normal test; the exact McNemar test needs a slightly larger difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy.optimize import brentq
from scipy.stats import norm

from sgworkbench.errors import WorkbenchError, unknown_name


@dataclass(frozen=True)
class MinimalDetectableDifference:
    """The smallest change of a rate that a two-sided test finds with the given power.

    Attributes:
        increase: smallest detectable rise above the base rate, in (0, 1]; NaN when even 1 is too close.
        decrease: smallest detectable fall, as a positive number; NaN when even 0 is too close.
        n: pairs, or items per arm.
        base_rate: rate of the reference arm.
        power: probability of finding a change of that size.
        alpha: two-sided level.
        design: "paired" or "unpaired".
    """

    increase: float
    decrease: float
    n: int
    base_rate: float
    power: float
    alpha: float
    design: str


def minimal_detectable_difference(
    n: int,
    base_rate: float,
    power: float = 0.8,
    alpha: float = 0.05,
    *,
    design: Literal["paired", "unpaired"] = "paired",
    correlation: float = 0.0,
) -> MinimalDetectableDifference:
    """Return the smallest rise and fall from `base_rate` that `n` items can detect.

    Args:
        n: pairs (paired), or items in each arm (unpaired).
        base_rate: rate of the reference arm, in [0, 1].
        power: wanted power.
        alpha: two-sided level; divide it by the family size for a Bonferroni-like planning figure.
        design: "paired" (same items in both arms) or "unpaired".
        correlation: phi between the two arms' outcomes, paired only. 0, the default, is the cautious end:
            arms that agree on items see smaller differences.

    Raises:
        WorkbenchError: a number outside its range.
    """
    if design not in ("paired", "unpaired"):
        raise unknown_name("design", design, ("paired", "unpaired"))
    if n < 1 or not 0.0 <= base_rate <= 1.0:
        raise WorkbenchError(
            f"A detectable difference needs n >= 1 and a base rate in [0, 1], but n is {n} and the base rate "
            f"is {base_rate}."
        )
    if not 0.0 < alpha < 1.0 or not alpha < power < 1.0 or not 0.0 <= correlation < 1.0:
        raise WorkbenchError(
            f"A detectable difference needs 0 < alpha < power < 1 and a correlation in [0, 1), but alpha is "
            f"{alpha}, power is {power} and correlation is {correlation}."
        )
    if design == "unpaired" and correlation:
        raise WorkbenchError("Only a paired design has a correlation between arms; leave it at 0 when unpaired.")
    z_alpha, z_beta = float(norm.ppf(1.0 - alpha / 2.0)), float(norm.ppf(power))

    def excess(size: float, sign: int) -> float:
        """How far the expected z of a change of this size lies above what the power needs."""
        other = min(1.0, max(0.0, base_rate + sign * size))
        spread = base_rate * (1 - base_rate), other * (1 - other)
        if design == "unpaired":
            middle = (base_rate + other) / 2.0
            null, alternative = 2.0 * middle * (1.0 - middle), sum(spread)
        else:
            # Share of disagreeing pairs; it can never be smaller than the difference itself.
            null = base_rate * (1 - other) + other * (1 - base_rate)
            null = max(null - 2.0 * correlation * math.sqrt(spread[0] * spread[1]), size)
            alternative = null - size * size
        return size * math.sqrt(n) - z_alpha * math.sqrt(null) - z_beta * math.sqrt(max(alternative, 0.0))

    def smallest(room: float, sign: int) -> float:
        if room <= 0.0 or excess(room, sign) < 0.0:
            return math.nan
        return float(brentq(excess, 1e-12, room, args=(sign,)))

    return MinimalDetectableDifference(
        smallest(1.0 - base_rate, 1), smallest(base_rate, -1), n, base_rate, power, alpha, design
    )
