"""What a recipe returns, and how published and measured results are named in every figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd
import plotly.graph_objects as go

from sgworkbench.errors import WorkbenchError
from sgworkbench.paper.measured import Measured
from sgworkbench.plotting.theme import ARMS, OTHER_SERIES, SeriesStyle

PUBLISHED, MEASURED = "published", "measured here"
MODELS = ("Qwen3-4B", "Qwen3-8B", "Qwen3-14B")
"""The published models, by size."""


def _named(label: str, style: SeriesStyle) -> SeriesStyle:
    return SeriesStyle(label, style.shade, style.dash, style.symbol, style.pattern)


STYLES: Mapping[str, SeriesStyle] = MappingProxyType(
    {
        "plain": _named("plain (vanilla)", ARMS["plain"]),
        "prompted": _named("prompted (Self-Reminder)", ARMS["prompted"]),
        "steered": _named("steered", ARMS["steered"]),
        "both": _named("both (Self-Guard)", ARMS["both"]),
        "star1-sft": _named("STAR-1 fine-tune", OTHER_SERIES[4]),
        "thinking-intervention": SeriesStyle("ThinkingIntervention", OTHER_SERIES[3].shade, "longdashdot", "x"),
    }
)
"""Arms of published and measured results; the four arms keep the colours they have everywhere."""

_OURS = {"vanilla": "plain", "self-reminder": "prompted", "self-guard": "both"}


def our_arm(name: str) -> str:
    """Return our name of a published arm."""
    return _OURS.get(name, name)


@dataclass(frozen=True)
class PaperFigure:
    """A figure with the table it was drawn from.

    Attributes:
        name: file name without ending.
        title: what it is, in a phrase.
        figure: the plotly figure.
        table: tidy; every number drawn is in it. Column `source` says published or measured here, `model` on what.
        caption: what to know to read it: judge, n, intervals, site, caveats.
        measured_on: one line per source: what was measured on which model.
    """

    name: str
    title: str
    figure: go.Figure
    table: pd.DataFrame
    caption: str
    measured_on: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Return the table behind the figure."""
        return self.table.copy()

    def _repr_html_(self) -> str:
        return f"<b>{self.title}</b> ({'; '.join(self.measured_on)})<br>{self.caption}"


@dataclass(frozen=True)
class Recipe:
    """How to make one figure.

    Attributes:
        name: name of the figure.
        title: what it is, in a phrase.
        draw: makes it; None instead of measurements draws the published side only.
        needs: measured tables it draws; empty for a figure of published numbers alone.
        has_published: whether there is a published side.
    """

    name: str
    title: str
    draw: Callable[[Measured | None], PaperFigure]
    needs: tuple[str, ...] = ()
    has_published: bool = True


class NothingToDraw(WorkbenchError):
    """A model gives no values for a figure, through no fault of the user; the index page says so."""


def measured_line(measured: Measured) -> str:
    """Return model, prompts and judge of our side, for captions."""
    settings, facts = measured.settings, measured.facts
    harmful, harmless = (source.removeprefix("builtin:") for source in (settings.harmful, settings.harmless))
    sites = ", ".join(facts["write_sites"])
    return (
        f"measured here: {measured.model}, prompts {harmful} and {harmless}, judge {facts['judge']}, safety prompt "
        f"{facts['condition']}, steering {facts['alpha']:g} v at {sites}"
    )


def published_line(models: str = "Qwen3-4B, 8B, 14B") -> str:
    """Return the origin of the published side, for captions."""
    return f"published: {models}, recounted from the label files of Self-Guard (arXiv 2602.00707)"
