"""Writing the paper figures: interactive pages, PNG, the table behind each as CSV, and an index page.

The interactive pages hold only their data and load `plotly.min.js` from their own folder, so that everything works
offline and the library is there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from sgworkbench.errors import WorkbenchError
from sgworkbench.paper.figures.base import NothingToDraw, PaperFigure, Recipe
from sgworkbench.paper.figures.panels import WIDTH
from sgworkbench.paper.measured import Measured
from sgworkbench.plotting import browser, figure_div
from sgworkbench.progress import Reporter, silent
from sgworkbench.tensor_files import atomic_path, write_text

LIBRARY = "plotly.min.js"


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        index: the index page.
        names: figures written now.
        notes: one sentence for each file that could not be written.
    """

    index: Path
    names: tuple[str, ...]
    notes: tuple[str, ...]


def check_folder(out: str | Path) -> None:
    """Refuse a folder that cannot be written, before anything is measured.

    Raises:
        WorkbenchError: it is a file, or cannot be written.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise WorkbenchError(f"Expected a folder for the figures, found the file {str(out)!r}.")
    # An empty probe would be left behind by a crash; the library has to be there anyway.
    _share_library(folder)


def draw(recipes: Sequence[Recipe], measured: Measured | None) -> tuple[list[PaperFigure], dict[str, str]]:
    """Draw figures, measuring what is missing; returns them, and the names that cannot be drawn with the reason.

    Raises:
        WorkbenchError: as the measurements raise.
    """
    figures: list[PaperFigure] = []
    absent: dict[str, str] = {}
    for recipe in recipes:
        if measured is None and not recipe.has_published:
            absent[recipe.name] = "Nothing of this was published as numbers; it is measured on a model."
        else:
            try:
                figures.append(recipe.draw(measured))
            except NothingToDraw as error:
                absent[recipe.name] = str(error)
    return figures, absent


def write_figures(
    figures: Sequence[PaperFigure],
    out: str | Path,
    *,
    recipes: Sequence[Recipe],
    absent: dict[str, str] | None = None,
    images: bool = True,
    scale: float | int = 1.25,
    report: Reporter = silent,
) -> Written:
    """Write figures and the index page of the folder; every file is complete or absent.

    Args:
        figures: what to write.
        out: the folder; made when it does not exist.
        recipes: all recipes, in the order of the index; those with files from an earlier call stay listed.
        absent: why a figure was not drawn, by name; shown on the index page.
        images: also write PNG files, where a browser is found.
        scale: pixels of a PNG per pixel of the figure.
        report: progress callback.

    Raises:
        WorkbenchError: the folder cannot be written.
    """
    folder = Path(out)
    check_folder(folder)
    notes: list[str] = []
    for done, each in enumerate(figures):
        report("writing figures", done, len(figures))
        with atomic_path(folder / f"{each.name}.csv") as temporary:
            each.table.to_csv(temporary, index=False, float_format="%.6g")
        write_text(folder / f"{each.name}.html", _page(each))
        if images:
            image = browser.render(each.figure, "png", width=each.figure.layout.width or WIDTH, scale=scale)
            if isinstance(image, bytes):
                with atomic_path(folder / f"{each.name}.png") as temporary:
                    temporary.write_bytes(image)
            else:
                notes.append(f"{each.name}.png was not written: {image}")
    report("writing figures", len(figures), len(figures))
    write_text(folder / "index.html", _index(folder, figures, recipes, absent or {}))
    return Written(folder / "index.html", tuple(each.name for each in figures), tuple(dict.fromkeys(notes)))


def _share_library(folder: Path) -> None:
    content, target = get_plotlyjs().encode(), folder / LIBRARY
    # A stale library would draw newer figures wrongly; an equal one is left alone.
    if not (target.is_file() and target.read_bytes() == content):
        with atomic_path(target) as temporary:
            temporary.write_bytes(content)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _template(name: str) -> jinja2.Template:
    text = resources.files("sgworkbench.paper").joinpath("templates", name).read_text(encoding="utf-8")
    return _environment().from_string(text)


def _page(each: PaperFigure) -> str:
    page: str = _template("figure.html.j2").render(
        figure=each, div=figure_div(each.figure, follow_color_scheme=True, div_id=each.name), library=LIBRARY
    )
    return page


def _index(folder: Path, figures: Sequence[PaperFigure], recipes: Sequence[Recipe], absent: dict[str, str]) -> str:
    drawn = {each.name: each for each in figures}
    entries = []
    for recipe in recipes:
        sidecar = folder / f"{recipe.name}.html"
        entries.append(
            {
                "name": recipe.name,
                "title": recipe.title,
                "figure": drawn.get(recipe.name),
                "has_page": sidecar.is_file(),
                "has_image": (folder / f"{recipe.name}.png").is_file(),
                "absent": absent.get(recipe.name, ""),
                "earlier": _earlier(sidecar) if recipe.name not in drawn and sidecar.is_file() else "",
            }
        )
    page: str = _template("index.html.j2").render(entries=entries)
    return page


def _earlier(page: Path) -> str:
    """Return the caption of a page written by an earlier call."""
    text = page.read_text(encoding="utf-8")
    start, end = text.find("<!-- caption -->"), text.find("<!-- end of caption -->")
    return text[start + len("<!-- caption -->") : end].strip() if 0 <= start < end else ""
