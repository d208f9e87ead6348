"""Checks of what a figure is drawn from, each failing with one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from sgworkbench.errors import WorkbenchError


def numeric_column(frame: pd.DataFrame, column: str, what: str) -> Float[np.ndarray, " row"]:
    """Column ``column`` of the frame ``what`` as floats.

    Raises:
        WorkbenchError: the column holds something that is not a number, or an infinite value.
    """
    try:
        values = frame[column].to_numpy(dtype=float, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise WorkbenchError(f"Column {column!r} of the {what} must hold numbers: {error}.") from error
    if np.isinf(values).any():
        raise WorkbenchError(f"Column {column!r} of the {what} holds infinite values; find where they come from.")
    return values


def require_columns(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise `WorkbenchError` when the frame ``what`` is empty or lacks one of ``columns``."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        found = ", ".join(map(str, frame.columns)) or "none"
        raise WorkbenchError(
            f"The {what} needs the columns {', '.join(columns)}, but {missing[0]!r} is missing; found: {found}."
        )
    if frame.empty:
        raise WorkbenchError(f"The {what} has no rows, so there is nothing to draw.")


def require_some_finite(values: Float[np.ndarray, " *any"], what: str) -> None:
    """Raise `WorkbenchError` when ``values`` holds no finite number."""
    if not np.isfinite(values).any():
        raise WorkbenchError(f"Every value of the {what} is missing (NaN), so there is nothing to draw.")


def require_ordered(
    low: Float[np.ndarray, " row"], middle: Float[np.ndarray, " row"], high: Float[np.ndarray, " row"], what: str
) -> None:
    """Raise `WorkbenchError` when an interval does not hold its estimate (missing ends are allowed)."""
    slack = 1e-9 * (1 + np.abs(middle))
    wrong = (low > middle + slack) | (high < middle - slack)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise WorkbenchError(
            f"Row {row} of the {what} has the interval {low[row]:g} to {high[row]:g}, which does not hold its value "
            f"{middle[row]:g}; give low <= value <= high."
        )
