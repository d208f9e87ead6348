"""Figures to files and to HTML reports: offline HTML always, static images where a browser is found.

Static images need the optional package kaleido (extra "images") and an installed Chrome or Chromium (Debian:
``apt-get install chromium``; another place is named by the environment variable BROWSER_PATH). It works headless
and as root: kaleido starts the browser without its sandbox. Where either is missing, a note says so and the other
files are written. One browser serves every figure of a process, because starting it takes seconds.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.plotting import browser
from sgworkbench.plotting.layout import NARROWEST, colour_pairs
from sgworkbench.plotting.theme import PAGE

IMAGE_FORMATS = ("png", "svg", "pdf")
FORMATS = ("html", *IMAGE_FORMATS)

_CONFIG = {
    "displaylogo": False,
    "displayModeBar": "hover",
    "responsive": True,
    # Off by name: nothing that a reader clicks may send a figure, and the prompts in it, to a server.
    "showSendToCloud": False,
    "toImageButtonOptions": {"format": "svg"},
}

# Walks data and layout of a figure and swaps the workbench's colours whenever the page's colour scheme changes;
# the translation is the one that layout.retheme makes.
_FOLLOW_SCHEME = """
(function () {
  const plot = document.getElementById("{plot_id}");
  const pairs = %s;
  const query = window.matchMedia("(prefers-color-scheme: dark)");
  const spread = c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16)).join(",");
  let dark = false;
  function apply() {
    if (query.matches === dark) { return; }
    dark = query.matches;
    const map = new Map();
    for (const [light, other] of pairs) {
      const [from, to] = dark ? [light, other] : [other, light];
      map.set(from.toLowerCase(), to);
      map.set(spread(from), spread(to));
    }
    const text = s => s
      .replace(/#[0-9a-f]{6}\\b/gi, c => map.get(c.toLowerCase()) || c)
      .replace(/rgba\\((\\d+), ?(\\d+), ?(\\d+),/g, (all, r, g, b) => {
        const to = map.get([r, g, b].join(","));
        return to ? "rgba(" + to + "," : all;
      });
    const walk = v => typeof v === "string" ? text(v)
      : ArrayBuffer.isView(v) || v === null || typeof v !== "object" ? v
      : Array.isArray(v) ? v.map(walk)
      : Object.fromEntries(Object.entries(v).map(([k, x]) => [k, walk(x)]));
    Plotly.react(plot, walk(plot.data), walk(plot.layout));
  }
  query.addEventListener("change", apply);
  apply();
})();
"""


@dataclass(frozen=True)
class SavedFigure:
    """What was written for one figure.

    Attributes:
        paths: file by format ("html", "png", "svg", "pdf", "csv").
        notes: one sentence for each format that could not be written, and why.
    """

    paths: dict[str, Path]
    notes: list[str] = field(default_factory=list)


def save_figure(
    figure: go.Figure,
    path_without_suffix: str | Path,
    formats: Sequence[str] = ("html", "png"),
    frame: pd.DataFrame | None = None,
    *,
    include_plotlyjs: str = "embed",
    width: int = 1000,
    scale: float | int = 2,
) -> SavedFigure:
    """Write a figure, and the table behind it, next to each other under one name.

    Args:
        figure: any plotly figure.
        path_without_suffix: folder and name; the suffixes are added. Missing folders are made.
        formats: among "html", "png", "svg", "pdf". HTML is written whether it is listed or not.
        frame: table behind the figure, written as CSV.
        include_plotlyjs: "embed" puts plotly.js (about 5 MB) into the HTML file; "directory" writes it once as
            plotly.min.js into the folder, for several figures to share. Both work offline.
        width: width of static images in pixels, unless the figure has its own; the height is the figure's.
        scale: pixels of a PNG per pixel of the figure.

    Every file is complete or absent: it is written under another name and then moved into place.

    Raises:
        WorkbenchError: an unknown format or plotly.js option, or a folder that cannot be written.
    """
    for name in formats:
        if name not in FORMATS:
            raise unknown_name("figure format", name, FORMATS)
    if include_plotlyjs not in ("embed", "directory"):
        raise unknown_name("plotly.js option", include_plotlyjs, ("embed", "directory"))
    base = Path(path_without_suffix)
    paths: dict[str, Path] = {}
    notes: list[str] = []
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        if include_plotlyjs == "directory":
            _share_plotlyjs(base.parent)
        page = _html_page(figure, embed=include_plotlyjs == "embed")
        paths["html"] = _write_atomic(_with_suffix(base, "html"), page.encode())
        if frame is not None:
            paths["csv"] = _write_atomic(_with_suffix(base, "csv"), frame.to_csv(index=False).encode())
        for name in dict.fromkeys(name for name in formats if name in IMAGE_FORMATS):
            image = browser.render(figure, name, width=figure.layout.width or width, scale=scale)
            if isinstance(image, bytes):
                paths[name] = _write_atomic(_with_suffix(base, name), image)
            else:
                notes.append(f"{base.name}.{name} was not written: {image}")
    except OSError as error:
        raise WorkbenchError(f"The figure {base.name!r} cannot be written to {base.parent}: {error}.") from error
    return SavedFigure(paths, notes)


def plotlyjs_script() -> str:
    """A ``<script>`` element with plotly.js itself (about 5 MB), to be put once before the figures of a report."""
    return f'<script charset="utf-8">{get_plotlyjs()}</script>'


def figure_div(figure: go.Figure, *, follow_color_scheme: bool = False, div_id: str | None = None) -> str:
    """A figure as one HTML element for a page that holds `plotlyjs_script` already.

    Args:
        figure: any plotly figure.
        follow_color_scheme: switch a light figure of the workbench to its dark colours, and back, with the reader's
            colour scheme.
        div_id: id of the element; by default a random one.
    """
    script = _FOLLOW_SCHEME % json.dumps(colour_pairs("dark")) if follow_color_scheme else None
    element: str = pio.to_html(
        figure,
        config=dict(_CONFIG),
        include_plotlyjs=False,
        full_html=False,
        post_script=script,
        default_height=f"{figure.layout.height or 450}px",
        div_id=div_id,
    )
    return element


def _html_page(figure: go.Figure, *, embed: bool) -> str:
    library = plotlyjs_script() if embed else '<script charset="utf-8" src="plotly.min.js"></script>'
    title = html.escape(
        re.sub(r"<[^>]*>", " ", (figure.layout.title.text or "figure").split("<br><span")[0]), quote=False
    )
    page = figure.layout.paper_bgcolor or figure.layout.template.layout.paper_bgcolor or PAGE.light
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>body{{margin:0;background:{page};min-width:{NARROWEST}px}}</style>{library}</head>\n"
        f"<body>{figure_div(figure)}</body></html>\n"
    )


def _with_suffix(base: Path, suffix: str) -> Path:
    # Not Path.with_suffix: a name such as "alpha_0.5" would lose its end.
    return base.with_name(f"{base.name}.{suffix}")


def _share_plotlyjs(folder: Path) -> None:
    """Write plotly.min.js unless this very version is there; a stale one would draw newer figures wrongly."""
    content = get_plotlyjs().encode()
    target = folder / "plotly.min.js"
    if not (target.is_file() and target.read_bytes() == content):
        _write_atomic(target, content)


def _write_atomic(path: Path, content: bytes) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
