"""The `vector` commands as a user meets them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sgworkbench.cli import app
from sgworkbench.interchange import read_vector
from sgworkbench.steering import SteeringVector
from sgworkbench.steering.recipe import SteeringRecipe

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "paper" / "svec" / "Qwen3-4B_diff_star1000_selfreminder.svec"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["vector", *(str(a) for a in arguments)])


def fails_with(result: Any, *words: str) -> None:
    """One sentence on standard error, status 2, nothing on standard output, no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
    error = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in error[0], error[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_model("llama", tmp_path_factory.mktemp("cli") / "model", n_layers=4))


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    facts = {"model": {"architecture": "llama", "n_layers": 4, "d_model": 32}, "condition": {"name": "self-reminder"}}
    SteeringVector((1, 2, 3), values, provenance=facts).save(tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


def test_inspect_shows_layers_sites_norms_and_provenance(vector: Path, model: str) -> None:
    done = run("inspect", vector)
    assert done.exit_code == 0, done.stderr
    for word in ("resid_post[2]", "same-site", "self-reminder", "safetensors"):
        assert word in done.stdout
    done = run("inspect", vector, "--model", model, "--json")
    summary = json.loads(done.stdout)
    loaded = SteeringVector.load(vector)
    assert summary["layers"] == [1, 2, 3]
    assert [row["write_site"] for row in summary["vectors"]] == ["resid_post[1]", "resid_post[2]", "resid_post[3]"]
    assert [row["norm"] for row in summary["vectors"]] == pytest.approx(loaded.values.norm(dim=-1).tolist())
    cosine = torch.nn.functional.cosine_similarity(loaded.at(1), loaded.at(2), dim=0)
    assert summary["vectors"][0]["cosine_with_previous"] is None
    assert summary["vectors"][1]["cosine_with_previous"] == pytest.approx(float(cosine), abs=1e-6)
    assert summary["provenance"]["condition"]["name"] == "self-reminder"


def test_inspect_does_not_pass_terminal_codes_on(tmp_path: Path) -> None:
    SteeringVector((1,), torch.ones(1, 2), provenance={"note": "a\x1b[31mred"}).save(tmp_path / "v.safetensors")
    done = run("inspect", tmp_path / "v.safetensors")
    assert done.exit_code == 0
    assert "\x1b[31m" not in done.stdout
    assert "a [31mred" in done.stdout


def test_convert_and_compare_round_the_formats(vector: Path, tmp_path: Path, model: str) -> None:
    steps = [
        ("a.gguf", []),
        ("b.npz", ["--protocol", "official"]),
        ("c.pt", ["--format", "lm-eval", "--layers", "2,3", "--alpha", "2", "--model", model]),
        ("d.svec", ["--layers", "2"]),
    ]
    source = vector
    for name, options in steps:
        done = run("convert", source, tmp_path / name, "--json", *options)
        assert done.exit_code == 0, done.stderr
        summary = json.loads(done.stdout)
        source = tmp_path / name
    assert summary["layers"] == [2]
    assert summary["written_to"] == ["resid_pre[2]"]
    original = SteeringVector.load(vector)
    back = read_vector(source)
    assert torch.equal(back.at(2), 2 * original.at(2))
    assert back.provenance["condition"]["name"] == "self-reminder"
    done = run("compare", vector, source, "--json")
    summary = json.loads(done.stdout)
    assert [row["layer"] for row in summary["layers"]] == [2]
    assert summary["layers"][0]["cosine"] == pytest.approx(1.0, abs=1e-12)
    assert summary["layers"][0]["norm_ratio"] == pytest.approx(2.0, abs=1e-12)
    assert summary["only_first"] == [1, 3]
    assert "only in v.safetensors" in run("compare", vector, source).stdout


def test_convert_takes_recipes(vector: Path, tmp_path: Path) -> None:
    SteeringRecipe.additive(SteeringVector.load(vector), (1, 2), 0.5).save(tmp_path / "r.safetensors")
    done = run("convert", tmp_path / "r.safetensors", tmp_path / "r.gguf")
    assert done.exit_code == 0, done.stderr
    back = read_vector(tmp_path / "r.gguf")
    assert back.layers == (1, 2)
    assert torch.equal(back.at(1), 0.5 * SteeringVector.load(vector).at(1))


def test_bake_a_vector_and_a_recipe_alike(vector: Path, model: str, tmp_path: Path) -> None:
    done = run("bake", "--vector", vector, "--layers", "2", "--alpha", "1.5", "--model", model, "--out", tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    assert "resid_post[2]" in done.stdout
    SteeringRecipe.additive(SteeringVector.load(vector), 2, 1.5).save(tmp_path / "r.safetensors")
    done = run("bake", "--vector", tmp_path / "r.safetensors", "--model", model, "--out", tmp_path / "b", "--json")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["max_logit_difference"] < 1e-4 < summary["steering_effect"]
    ids = torch.tensor([[5, 6, 7]])
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in "ab")
    assert torch.equal(first, second)
    assert json.loads(run("inspect", tmp_path / "a", "--json").stdout)["scale"] == 1.5


def test_mistakes_are_one_sentence(vector: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    fails_with(run("inspect", tmp_path / "none.svec"), "does not exist")
    fails_with(run("convert", vector, out, "--format", "guff"), "Did you mean 'gguf'")
    fails_with(run("convert", vector, out, "--layers", "0-3"), "no layer 0")
    fails_with(run("convert", vector, out, "--layers", "x"), "layers")
    fails_with(run("convert", vector, out, "--alpha", "nan"), "coefficient")
    fails_with(run("convert", vector, out, "--protocol", "offical"), "official")
    fails_with(run("convert", vector, tmp_path / "out.svec"), "last block", "--layers 0-2")
    fails_with(run("convert", vector, out, "--protocol", "official"), "resid_pre[1]")
    fails_with(run("bake", "--vector", vector, "--out", tmp_path / "b", "--model", model), "--layers and --alpha")
    wide = tmp_path / "wide.npz"
    SteeringVector((1,), torch.ones(1, 8)).save(tmp_path / "wide.safetensors")
    assert run("convert", tmp_path / "wide.safetensors", wide).exit_code == 0
    for command in (("inspect", wide), ("convert", wide, out)):
        fails_with(run(*command, "--model", model), "another model", "width 8")
    baking = ("--layers", "1", "--alpha", "1", "--model", model, "--out", tmp_path / "b")
    fails_with(run("bake", "--vector", wide, *baking), "another model")
    fails_with(run("compare", wide, vector), "widths 8 and 32")
    assert not out.exists()
    assert not (tmp_path / "b").exists()


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "v.pt").write_bytes(pickle.dumps(Payload()))
    fails_with(run("inspect", tmp_path / "v.pt"), "pickle", "refused")
    torch.save({1: torch.ones(2), 2: Payload()}, tmp_path / "w.pt")
    fails_with(run("convert", tmp_path / "w.pt", tmp_path / "w.npz"), "nothing was executed")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published vector is not on this machine")
def test_the_published_vector(tmp_path: Path, model: str) -> None:
    summary = json.loads(run("inspect", PUBLISHED, "--json").stdout)
    assert summary["layers"] == list(range(35))
    assert summary["provenance"]["interchange"]["left_out"]["key"] == 35
    done = run("convert", PUBLISHED, tmp_path / "again.svec")
    assert "unchanged" in done.stdout
    assert (tmp_path / "again.svec").read_bytes() == PUBLISHED.read_bytes()
    done = run("convert", PUBLISHED, tmp_path / "v.gguf", "--layers", "1-34")
    assert done.exit_code == 0
    assert "key 35 was left out" in done.stderr
    assert torch.equal(read_vector(tmp_path / "v.gguf").values, read_vector(PUBLISHED).values[1:])
    fails_with(run("inspect", PUBLISHED, "--model", model), "another model")
    fails_with(run("convert", PUBLISHED, tmp_path / "w.gguf", "--layers", "30-35"), "no layer 35")
