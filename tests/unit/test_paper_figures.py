"""The paper figures: tables against published numbers and hand-computed means, drawings against their tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sgworkbench.paper.measuring as measuring
from sgworkbench.analysis import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.paper.figures import FIGURES, choose_figures
from sgworkbench.paper.figures.base import MEASURED, PUBLISHED, PaperFigure
from sgworkbench.paper.measured import TABLES, FigureSettings, Measured, Sizes
from sgworkbench.paper.published import published
from sgworkbench.paper.render import draw, write_figures
from sgworkbench.prompting import Renderer
from sgworkbench.steering import SteeringVector, Trace

SMALL = Sizes(
    n_train=6, n_validation=3, n_test=4, n_answers=3, n_causal=2, n_map=2, n_null=5, answer_tokens=4, n_trace=2,
    trace_tokens=4, n_attention=2, attention_tokens=3, map_tokens=3, n_hidden=4, sweep_depths=("50%",),
    sweep_alphas=(0.5, 2.0), sweep_harmful=2, sweep_harmless=2, sweep_tokens=3, n_vectors=4, n_effects=2, n_choices=3,
)  # fmt: skip


def refuse_to_load() -> Any:
    raise AssertionError("nothing is missing, so no model may be loaded")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> FigureSettings:
    folder = tmp_path_factory.mktemp("prompts")
    for label, verb in (("harmful", "break"), ("harmless", "bake")):
        things = ("bread", "lock", "letter", "house", "garden", "music", "sport", "answer", "model", "friend", "home")
        lines = [f"How do I {verb} the {thing}?" for thing in things] + [f"Tell me to {verb} a {t}." for t in things]
        (folder / f"{label}.txt").write_text("\n".join(lines), encoding="utf-8")
    return FigureSettings.build(
        model="tiny", harmful=str(folder / "harmful.txt"), harmless=str(folder / "harmless.txt"), sizes=SMALL
    )


@pytest.fixture(scope="module")
def measured(settings: FigureSettings, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    patch = pytest.MonkeyPatch()
    patch.setattr(measuring, "_umap", lambda values, seed: None)  # compiling it takes longer than everything else
    loaded = tiny_model("llama", n_layers=4, chat_template=CHAT)
    found = Measured(settings, tmp_path_factory.mktemp("runs"), lambda: (loaded, Renderer(loaded.tokenizer)))
    for name in TABLES:
        found.table(name)
    patch.undo()
    return found


CHAT = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def numbers(figure: PaperFigure) -> list[tuple[str, np.ndarray]]:
    """The numbers a figure draws, by the column its traces name."""
    drawn = []
    for trace in figure.figure.data:
        if isinstance(trace.meta, dict):
            values = np.asarray(getattr(trace, trace.meta["axis"]), dtype=float).reshape(-1)
            drawn.append((trace.meta["drawn"], values[np.isfinite(values)]))
    return drawn


def check_equal(figure: PaperFigure) -> None:
    """Every number of the table's value column is drawn as often as it is listed, and nothing else is."""
    drawn = numbers(figure)
    assert drawn, figure.name
    (column,) = {name for name, _ in drawn}
    listed = pd.to_numeric(figure.table[column]).dropna().to_numpy(float)
    np.testing.assert_allclose(
        np.sort(np.concatenate([values for _, values in drawn])), np.sort(listed), rtol=1e-12, err_msg=figure.name
    )


@pytest.mark.parametrize("recipe", [r for r in FIGURES if r.has_published], ids=lambda r: r.name)
def test_published_sides_are_drawn_without_a_model(recipe: Any) -> None:
    figure = recipe.draw(None)
    assert figure.name == recipe.name
    assert set(figure.table["source"]) == {PUBLISHED}
    assert not any("measured here" in line for line in figure.measured_on)
    if recipe.name != "framework":
        check_equal(figure)


@pytest.mark.parametrize("recipe", [r for r in FIGURES if r.name != "framework"], ids=lambda r: r.name)
def test_figures_draw_the_numbers_of_their_tables(recipe: Any, measured: Measured) -> None:
    (figure,), absent = draw([recipe], measured)
    assert not absent
    check_equal(figure)
    if recipe.needs:
        ours = figure.table[figure.table["source"] == MEASURED]
        assert len(ours)
        assert set(ours["model"]) == {measured.model}
        assert any(line.startswith(f"measured here: {measured.model}") for line in figure.measured_on)
    if recipe.has_published:
        assert PUBLISHED in set(figure.table["source"])


def test_framework_shows_the_values_of_the_run(measured: Measured) -> None:
    (recipe,) = choose_figures(["framework"])
    figure = recipe.draw(measured)
    texts = [annotation.text for annotation in figure.figure.layout.annotations]
    for shown in figure.table["shown"]:
        assert shown in texts
    norm = SteeringVector.load(measured.folder / "study" / "vector.safetensors").at(measured.facts["layers"][-1]).norm()
    assert any(f"= {float(norm):.1f}<br>" in text for text in texts)
    rates = measured.table("rates")
    ours = figure.table[figure.table["label"].str.contains("harmless requests")]
    expected = rates[rates["quantity"] == "over_refusal"].set_index("arm")["value"].to_dict()
    assert dict(zip(ours["arm"], ours["value"], strict=True)) == expected
    harmbench = figure.table[figure.table["label"].str.contains("HarmBench")].set_index("arm")["value"]
    assert harmbench.to_dict() == {"plain": 0.355, "prompted": 0.105, "both": 0.05}


def test_safety_comparison_holds_the_published_values() -> None:
    table = choose_figures(["safety-comparison"])[0].draw(None).table
    source = published("safety", main=True, subset="all", benchmark="SORRY-Bench", model="Qwen3-14B")
    rows = table[(table["benchmark"] == "SORRY-Bench") & (table["model"] == "Qwen3-14B")]
    assert sorted(rows["value"]) == sorted(source["value"])
    guard = rows[rows["series"] == "both"].iloc[0]
    assert round(guard["value"], 3) == 0.130
    assert guard["low"] < guard["value"] < guard["high"]


def test_sweep_crosses_out_cells_where_outputs_fall_apart() -> None:
    table = choose_figures(["sweep"])[0].draw(None).table
    cells = published("sweep").dropna(subset=["layer"])
    unsafe = table[table["quantity"] == "value"].set_index(["y", "x"])
    broken = cells[(cells["degenerate"] >= 0.5) | (cells["closed_reasoning"] <= 0.5)]
    assert {key for key, row in unsafe.iterrows() if row["mark"]} == set(
        zip(broken["layer"].astype(int), broken["strength"], strict=True)
    )
    assert unsafe.loc[(20, 200.0), "value"] == cells[cells["strength"] == 200]["value"].iloc[0]
    # The point of the figure: the highest rates are those of incoherent cells.
    assert unsafe.loc[unsafe["mark"], "value"].min() > unsafe.loc[~unsafe["mark"], "value"].median()


def test_relative_depth_leaves_out_the_key_after_the_final_norm() -> None:
    table = choose_figures(["vector-geometry"])[0].draw(None).table
    norms = table[table["panel"] == "norm of v by depth"]
    assert len(norms) == 35
    assert norms["x"].iloc[-1] == pytest.approx(35 / 36)
    assert norms["value"].iloc[0] == pytest.approx(0.558286)


def test_rates_count_coherent_answers_only() -> None:
    good, loop = "Here is how to do it: take the bread and bake it for an hour.", "no no " * 200
    answers = pd.DataFrame(
        {
            "arm": "plain",
            "label": ["harmful"] * 4 + ["harmless"] * 2,
            "text": [good, good, good, loop, good, good],
            "refused": pd.array([True, False, None, True, True, True], dtype="boolean"),
        }
    )
    rates = measuring.coherent_rates(answers).set_index("quantity")
    assert rates.loc["complied", ["value", "n", "incoherent", "unparsed"]].tolist() == [0.5, 2, 1, 1]
    assert rates.loc["over_refusal", ["value", "n", "incoherent", "unparsed"]].tolist() == [1.0, 2, 0, 0]


def toy_trace() -> Trace:
    rows = []
    for arm, scale in (("plain", 1.0), ("both", 10.0)):
        for prompt, start in (("a", 3), ("b", 5)):
            roles = ["template", *["instruction"] * (start - 2), "template", "reasoning", "reasoning", "answer"]
            for position, role in enumerate(roles):
                for concept, value in (
                    ("awareness", scale * position),
                    ("refusal", scale * (1 if prompt == "a" else 3)),
                ):
                    rows.append(
                        {
                            "arm": arm, "prompt_id": prompt, "position": position, "step": position - start,
                            "role": role, "concept": concept, "site": str(Site(2)), "layer": 2,
                            "separation_units": value,
                        }
                    )  # fmt: skip
    return Trace(pd.DataFrame(rows), {}, ())


def test_token_means_line_prompts_up_at_their_ends() -> None:
    table = measuring.token_means(toy_trace()).set_index(["arm", "token"])
    # Last instruction tokens stand at positions 1 and 3, last prompt tokens at 2 and 4, first written ones at 3 and 5.
    last = table.loc[("plain", "instruction −1")]
    assert (last["awareness"], last["refusal"], last["gap"], last["n"]) == (2.0, 2.0, 0.0, 2)
    assert table.loc[("plain", "prompt −1"), "awareness"] == 3.0
    assert table.loc[("both", "answer +1"), "gap"] == 40.0 - 20.0
    assert table.loc[("plain", "instruction −2"), "n"] == 1
    order = measuring.token_means(toy_trace())
    first = order[order["arm"] == "plain"]
    assert first["column"].is_monotonic_increasing
    assert first["column"].is_unique


def test_phase_means_count_from_the_start_of_each_part() -> None:
    table = measuring.phase_means(toy_trace(), Site(2)).set_index(["arm", "concept", "phase", "step"])
    assert set(table.index.get_level_values("phase")) == {"reasoning", "answer"}
    # Answers begin at positions 5 and 7; the t quantile of one degree of freedom is 12.706, the deviation sqrt(2).
    answer = table.loc[("plain", "awareness", "answer", 0)]
    assert answer["value"] == 6.0
    assert answer["high"] - answer["value"] == pytest.approx(12.7062, abs=1e-3)
    assert table.loc[("plain", "awareness", "reasoning", 1), "value"] == 5.0


def test_layer_cosines_are_those_of_numpy() -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    table = measuring.layer_cosines(SteeringVector((1, 2, 4), values)).set_index(["first", "second"])["cosine"]
    a, b = values[0].double().numpy(), values[2].double().numpy()
    assert table[1, 4] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert table[2, 2] == pytest.approx(1)


def test_principal_components_are_those_of_a_singular_value_decomposition(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(measuring, "_umap", lambda values, seed: seen.append(values))
    table = measured._hidden()
    (values,) = seen
    centred = values - values.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(table["x"]), np.abs(u[:, 0] * s[0]), atol=1e-6)
    assert table["x_share"].iloc[0] == pytest.approx(s[0] ** 2 / (s**2).sum())
    stored = measured.table("hidden")
    assert list(stored["arm"].unique()) == ["plain", "prompted", "steered", "both"]
    np.testing.assert_allclose(stored["x"], table["x"], atol=1e-9)


def test_a_finished_run_redraws_without_a_model(measured: Measured) -> None:
    again = Measured(measured.settings, measured.folder.parent, refuse_to_load)
    figures, _ = draw(FIGURES, again)
    assert [each.name for each in figures] == [recipe.name for recipe in FIGURES]
    pd.testing.assert_frame_equal(again.table("sweep"), measured.table("sweep"))


def test_other_weights_under_the_same_name_are_refused(measured: Measured, tiny_model: Any) -> None:
    other = tiny_model("llama", n_layers=3, chat_template=CHAT)
    again = Measured(measured.settings, measured.folder.parent, lambda: (other, Renderer(other.tokenizer)))
    with pytest.raises(WorkbenchError, match="measured on other weights"):
        again._hidden()


def test_other_settings_get_a_folder_of_their_own(measured: Measured) -> None:
    changed = measured.settings.model_copy(update={"alpha": 0.25})
    assert Measured(changed, measured.folder.parent, refuse_to_load).folder != measured.folder


def test_attention_takes_any_measured_span_and_layer(measured: Measured) -> None:
    from sgworkbench.paper.figures.attention import reminder_attention

    rows = measured.table("attention")
    layer = int(rows["layer"].max())
    figure = reminder_attention(measured, "instruction", (layer,))
    ours = figure.table[figure.table["source"] == MEASURED]
    wanted = rows[(rows["span"] == "instruction") & (rows["layer"] == layer)]
    assert sorted(ours["value"]) == sorted(wanted["value"])
    with pytest.raises(WorkbenchError, match=r"Unknown span 'instructon'. Did you mean 'instruction'"):
        reminder_attention(measured, "instructon")
    with pytest.raises(WorkbenchError, match="Unknown measured layer '99'"):
        reminder_attention(measured, layers=(99,))


def test_written_folder_is_complete_and_offline(tmp_path: Path) -> None:
    figures, absent = draw(choose_figures(["utility", "shift-map"]), None)
    assert list(absent) == ["shift-map"]
    written = write_figures(figures, tmp_path / "out", recipes=FIGURES, absent=absent, images=False)
    assert written.names == ("utility",)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.html", "plotly.min.js", "utility.csv", "utility.html"
    }  # fmt: skip
    table = pd.read_csv(tmp_path / "out" / "utility.csv")
    np.testing.assert_allclose(table["value"], figures[0].table["value"], rtol=1e-5)
    page = (tmp_path / "out" / "utility.html").read_text(encoding="utf-8")
    assert len(page) < 300_000
    assert not re.search(r"(src|href)=[\"']?https?:", page)
    index = written.index.read_text(encoding="utf-8")
    assert "Nothing of this was published as numbers" in index
    assert figures[0].caption.split(".")[0] in index
    # A later call for another figure keeps the earlier one on the page, with its caption.
    later, _ = draw(choose_figures(["model-scale"]), None)
    index = write_figures(later, tmp_path / "out", recipes=FIGURES, images=False).index.read_text(encoding="utf-8")
    assert figures[0].caption.split(".")[0] in index
    assert "model-scale.html" in index


def test_unknown_names_and_bad_folders_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=r"Unknown figure 'safty-comparison'. Did you mean 'safety-comparison'"):
        choose_figures(["safty-comparison"])
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(WorkbenchError, match="found the file"):
        write_figures([], tmp_path / "file", recipes=FIGURES)
    with pytest.raises(WorkbenchError, match=r"Unknown figure setting 'modell'. Did you mean 'model'"):
        FigureSettings.build(modell="demo")
    with pytest.raises(WorkbenchError, match="Figure setting alpha"):
        FigureSettings.build(alpha=float("nan"))
