"""Export: complete files or none, offline pages, and a note instead of an exception without a browser."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from sgworkbench.errors import WorkbenchError
from sgworkbench.plotting import browser, export, figure_div, plotlyjs_script, save_figure


@pytest.fixture
def figure() -> go.Figure:
    return go.Figure(
        go.Scatter(x=[0, 1], y=[2, 3]), {"template": "sgworkbench", "title": {"text": "A <b>line</b>"}, "height": 300}
    )


@pytest.fixture(autouse=True)
def _one_browser_per_test() -> Iterator[None]:
    yield
    browser.close()


@pytest.fixture
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "find_browser", lambda: None)
    monkeypatch.delenv("BROWSER_PATH", raising=False)


@pytest.mark.usefixtures("no_browser")
def test_html_and_csv_are_written_and_a_note_stands_for_the_image(figure: go.Figure, tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [0, 1], "y": [2.5, 3.0]})
    saved = save_figure(figure, tmp_path / "new" / "alpha_0.5", ("html", "png", "svg"), frame)
    assert saved.paths == {name: tmp_path / "new" / f"alpha_0.5.{name}" for name in ("html", "csv")}
    pd.testing.assert_frame_equal(pd.read_csv(saved.paths["csv"]), frame)
    page = saved.paths["html"].read_text()
    assert get_plotlyjs() in page
    assert "<title>A  line </title>" in page
    assert "src=" not in page.replace(get_plotlyjs(), "")
    assert [note.split(": ")[0] for note in saved.notes] == [
        "alpha_0.5.png was not written",
        "alpha_0.5.svg was not written",
    ]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["alpha_0.5.csv", "alpha_0.5.html"]


def test_the_note_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, figure: go.Figure) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    note = browser.render(figure, "png", width=400, scale=1)
    assert isinstance(note, str)
    assert "sgworkbench[images]" in note


@pytest.mark.skipif(importlib.util.find_spec("kaleido") is None, reason="kaleido is not installed")
def test_a_wrong_browser_path_is_named(monkeypatch: pytest.MonkeyPatch, figure: go.Figure, tmp_path: Path) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nothing"))
    note = browser.render(figure, "png", width=400, scale=1)
    assert isinstance(note, str)
    assert "BROWSER_PATH names" in note


@pytest.mark.skipif(importlib.util.find_spec("kaleido") is None, reason="kaleido is not installed")
@pytest.mark.skipif(os.name != "posix", reason="the stand-in for a browser is a shell script")
def test_a_program_that_is_no_browser_gives_a_note_once(
    monkeypatch: pytest.MonkeyPatch, figure: go.Figure, tmp_path: Path
) -> None:
    program, log = tmp_path / "browser", tmp_path / "starts"
    program.write_text(f"#!/bin/sh\necho started >> {log}\n")
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(program))
    notes = {browser.render(figure, "png", width=400, scale=1) for _ in range(3)}
    assert len(notes) == 1
    assert "did not start" in str(notes.pop())
    assert log.read_text() == "started\n"


needs_browser = pytest.mark.skipif(
    importlib.util.find_spec("kaleido") is None or browser.find_browser() is None, reason="no browser for images"
)


@needs_browser
def test_images_have_the_asked_size_and_share_one_browser(figure: go.Figure, tmp_path: Path) -> None:
    saved = save_figure(figure, tmp_path / "a", ("png", "svg", "pdf"), width=420, scale=2)
    assert saved.notes == []
    png = saved.paths["png"].read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (840, 600)
    assert b"<svg" in saved.paths["svg"].read_bytes()[:200]
    assert saved.paths["pdf"].read_bytes()[:5] == b"%PDF-"
    running = browser._running
    assert running is not None
    save_figure(figure, tmp_path / "b", ("png",), width=300)
    assert browser._running is running


@needs_browser
def test_a_browser_that_died_is_replaced(figure: go.Figure) -> None:
    assert isinstance(browser.render(figure, "png", width=300, scale=1), bytes)
    assert browser._running is not None
    browser._kill(browser._running._kaleido.subprocess)
    assert isinstance(browser.render(figure, "png", width=300, scale=1), bytes)


@pytest.mark.usefixtures("no_browser")
def test_a_failed_write_leaves_the_old_file_and_no_rest(
    monkeypatch: pytest.MonkeyPatch, figure: go.Figure, tmp_path: Path
) -> None:
    save_figure(figure, tmp_path / "a", ("html",))
    before = (tmp_path / "a.html").read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(export.os, "replace", fail)
    figure.update_layout(title_text="another")
    with pytest.raises(WorkbenchError, match="disk full"):
        save_figure(figure, tmp_path / "a", ("html",))
    assert (tmp_path / "a.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_figures_of_a_folder_can_share_plotlyjs(figure: go.Figure, tmp_path: Path) -> None:
    (tmp_path / "plotly.min.js").write_text("an old version")
    for name in ("a", "b"):
        save_figure(figure, tmp_path / name, ("html",), include_plotlyjs="directory")
    assert (tmp_path / "plotly.min.js").read_text() == get_plotlyjs()
    page = (tmp_path / "a.html").read_text()
    assert 'src="plotly.min.js"' in page
    assert len(page) < 100_000


def test_a_div_brings_no_library_and_cannot_upload(figure: go.Figure) -> None:
    element = figure_div(figure, div_id="gap")
    assert 'id="gap"' in element
    assert len(element) < 50_000
    assert '"showSendToCloud": false' in element
    assert "matchMedia" not in element
    assert get_plotlyjs() in plotlyjs_script()


def test_a_div_can_follow_the_colour_scheme(figure: go.Figure) -> None:
    element = figure_div(figure, follow_color_scheme=True, div_id="gap")
    assert "prefers-color-scheme: dark" in element
    assert '["#0062A8", "#3F8FDC"]' in element
    assert 'getElementById("gap")' in element


def test_text_in_a_figure_cannot_end_its_script(tmp_path: Path) -> None:
    harmful = go.Figure(go.Scatter(x=[0], y=[0], text=["</script><script>alert(1)</script>"]))
    assert "<script>alert" not in figure_div(harmful)


@pytest.mark.parametrize(
    ("formats", "library", "message"),
    [(("gif",), "embed", "Unknown figure format 'gif'"), (("html",), "cdn", "Unknown plotly.js option 'cdn'")],
)
def test_unknown_choices_are_refused(
    figure: go.Figure, tmp_path: Path, formats: tuple[str, ...], library: str, message: str
) -> None:
    with pytest.raises(WorkbenchError, match=message):
        save_figure(figure, tmp_path / "a", formats, include_plotlyjs=library)


def test_a_folder_that_cannot_be_made_is_one_sentence(figure: go.Figure, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match="cannot be written"):
        save_figure(figure, tmp_path / "file" / "a", ("html",))
