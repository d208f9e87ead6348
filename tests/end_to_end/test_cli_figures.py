"""`sgworkbench figures` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny_models import NO_SYSTEM, build_tiny_model
from typer.testing import CliRunner

import sgworkbench.paper.measuring as measuring
from sgworkbench.cli import app
from sgworkbench.paper.figures import FIGURES


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["figures", *(str(a) for a in arguments), "--quiet"])


def fails_with(result: Any, *words: str) -> None:
    """One sentence on standard error, status 2, nothing on standard output, no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in errors[0], errors[0]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    for label, verb in (("harmful", "break"), ("harmless", "bake")):
        things = [f"the {what} {n}" for what in ("bread", "lock", "letter", "house") for n in range(12)]
        text = "\n".join(f"How do I {verb} {thing}?" for thing in things)
        (folder / f"{label}.txt").write_text(text, encoding="utf-8")
    return folder / "harmful.txt", folder / "harmless.txt"


def test_list_names_every_figure() -> None:
    done = run("--list")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [recipe.name for recipe in FIGURES]


def test_published_figures_need_no_model(tmp_path: Path) -> None:
    done = run("trade-off", "shift-map", "--published-only", "--no-images", "--out", tmp_path / "f", "--json")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["figures"] == ["trade-off"]
    assert list(summary["absent"]) == ["shift-map"]
    assert summary["runs"] is None
    assert {p.name for p in (tmp_path / "f").iterdir()} == {
        "index.html", "plotly.min.js", "trade-off.csv", "trade-off.html"
    }  # fmt: skip
    table = pd.read_csv(tmp_path / "f" / "trade-off.csv")
    assert set(table["source"]) == {"published"}


def test_a_run_is_measured_once_and_redrawn(
    tmp_path: Path, prompts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_umap", lambda values, seed: None)
    model = build_tiny_model("llama", tmp_path / "model", n_layers=3)
    harmful, harmless = prompts
    names = ("framework", "safety-comparison", "gap-by-layer", "hidden-states")
    options = ("--quick", "--no-images", "--runs", tmp_path / "runs", "--harmful", harmful, "--harmless", harmless)
    done = run(*names, "--model", model, "--out", tmp_path / "one", *options, "--json")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert set(summary["figures"]) | set(summary["absent"]) == set(names)
    table = pd.read_csv(tmp_path / "one" / "safety-comparison.csv")
    assert set(table["source"]) == {"published", "measured here"}
    assert "measured here: model" in (tmp_path / "one" / "safety-comparison.html").read_text(encoding="utf-8")

    # With the model gone, the same command draws the same figures from the stored run.
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    again = run(*names, "--model", model, "--out", tmp_path / "two", *options, "--json")
    assert again.exit_code == 0, again.stderr
    for name in summary["figures"]:
        for ending in ("csv", "html"):
            first, second = ((tmp_path / folder / f"{name}.{ending}").read_bytes() for folder in ("one", "two"))
            assert first == second, (name, ending)


def test_mistakes_are_one_sentence(tmp_path: Path, prompts: tuple[Path, Path]) -> None:
    fails_with(run("safety-comparision"), "safety-comparison", "Did you mean")
    (tmp_path / "file").write_text("", encoding="utf-8")
    fails_with(run("utility", "--published-only", "--out", tmp_path / "file"), "found the file")
    fails_with(run("utility", "--published-only", "--out", tmp_path / "file" / "below"), "Cannot write")
    fails_with(run("shift-map", "--published-only", "--out", tmp_path / "f"), "no published side", "--published-only")
    fails_with(run("utility", "--condition", "self-remider", "--out", tmp_path / "f"), "Did you mean 'self-reminder'")
    fails_with(run("utility", "--model", tmp_path / "none", "--out", tmp_path / "f", "--runs", tmp_path / "r"), "none")
    strict = build_tiny_model("llama", tmp_path / "strict", n_layers=2, chat_template=NO_SYSTEM)
    harmful, harmless = prompts
    options = ("--quick", "--harmful", harmful, "--harmless", harmless, "--runs", tmp_path / "r")
    fails_with(run("utility", "--model", strict, "--out", tmp_path / "f", *options), "template", "--system-in-user")
