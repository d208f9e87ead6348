"""`.svec` files: the published vector to the last digit, its last key kept apart, and hostile JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange import ModelShape, SvecDocument, read_vector, write_vector
from sgworkbench.steering import SteeringVector

PAPER = Path(__file__).parents[2].parent / "shared" / "paper"
PUBLISHED = PAPER / "svec" / "Qwen3-4B_diff_star1000_selfreminder.svec"
needs_paper = pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published vector is not on this machine")

ROWS = {"0": [1.0, -2.5, 0.1], "1": [3, 4, 0], "2": [0.3333333333333333, 1e-08, -7.0], "3": [9.0, 9.0, 9.0]}


def document(**changes: Any) -> dict[str, Any]:
    plain = {"model_type": "llama", "directions": ROWS, "explained_variances": dict.fromkeys(ROWS, 0.5)}
    return plain | changes


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "v.svec"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refused(path: Path, *words: str, **options: Any) -> str:
    with pytest.raises(WorkbenchError) as caught:
        read_vector(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message, message
    return message


def test_keys_are_block_outputs_and_the_last_one_is_left_out(tmp_path):
    vector = read_vector(written(tmp_path, document()))
    assert vector.layers == (0, 1, 2)
    assert [str(vector.read_site(layer)) for layer in vector.layers] == [f"resid_post[{l}]" for l in range(3)]
    np.testing.assert_array_equal(vector.values.numpy(), np.array([ROWS[str(l)] for l in range(3)], dtype=np.float32))
    left = vector.provenance["interchange"]["left_out"]
    assert left["key"] == 3
    assert left["norm"] == pytest.approx(9 * 3**0.5, abs=1e-6)
    with pytest.raises(WorkbenchError, match="no layer 3"):
        vector.intervention(3, 1.0)


def test_a_model_tells_which_key_is_the_last(tmp_path):
    path = written(tmp_path, document())
    taller = ModelShape("m", "llama", 5, 3)
    assert read_vector(path, model=taller).layers == (0, 1, 2, 3)
    assert read_vector(path, model=ModelShape("m", "llama", 4, 3)).layers == (0, 1, 2)
    refused(path, "another model", "3 layers", model=ModelShape("m", "llama", 3, 3))
    refused(path, "another model", "width", model=ModelShape("m", "llama", 4, 8))
    refused(path, "another model", "family", model=ModelShape("m", "qwen3", 4, 3))


def test_unchanged_documents_keep_their_bytes_and_unknown_fields(tmp_path):
    content = document(author={"name": "ü"}, explained_variances={"0": float("nan")})
    path = written(tmp_path, content)
    SvecDocument.load(path).save(tmp_path / "again.svec")
    assert (tmp_path / "again.svec").read_bytes() == path.read_bytes()


def test_our_vectors_come_back_with_site_protocol_and_scale(tmp_path):
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    model = {"architecture": "llama", "n_layers": 9, "d_model": 5, "weights_sha256": "a" * 64}
    vector = SteeringVector((2, 4, 7), values, "resid_post", "official", {"model": model, "condition": {"name": "x"}})
    write_vector(vector, tmp_path / "v.svec", alpha=0.5)
    raw = json.loads((tmp_path / "v.svec").read_text(encoding="utf-8"))
    assert list(raw["directions"]) == ["2", "4", "7"]
    assert raw["model_type"] == "llama"
    back = read_vector(tmp_path / "v.svec")
    assert (back.layers, back.protocol, back.read_kind) == ((2, 4, 7), "official", "resid_post")
    assert torch.equal(back.values, 0.5 * values)
    assert back.provenance == {**vector.provenance, "scale": 0.5}


def test_what_the_format_cannot_say_is_refused(tmp_path):
    values, model = torch.ones(2, 4), {"n_layers": 4}
    with pytest.raises(WorkbenchError, match="--layers 0-2"):
        write_vector(SteeringVector((1, 3), values, provenance={"model": model}), tmp_path / "a.svec")
    with pytest.raises(WorkbenchError, match="--model"):
        write_vector(SteeringVector((1, 2), values), tmp_path / "a.svec")
    with pytest.raises(WorkbenchError, match="block outputs"):
        write_vector(SteeringVector((1, 2), values, "resid_mid", provenance={"model": model}), tmp_path / "a.svec")
    assert list(tmp_path.iterdir()) == []


def test_a_gap_is_refused_unless_the_layers_wanted_are_named(tmp_path):
    rows = {key: row for key, row in ROWS.items() if key != "1"}
    path = written(tmp_path, document(directions=rows))
    refused(path, "lacks layers 1", "--layers")
    assert read_vector(path, layers=(0, 2)).layers == (0, 2)
    refused(path, "no layer 1", layers=(0, 1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["empty"]),
        ('{"model_type": "llama", "directions": {"0": [1.0, 2.0', ["not valid JSON", "cut short"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"a":' * 100_000, ["nested too deeply"]),
        ("[1, 2, 3]", ["Expected the JSON object", "a list of 3"]),
        ('{"model_type": "llama"}', ["directions"]),
        (document(model_type=None), ["model_type"]),
        (document(directions={}), ["no directions"]),
        (document(directions=[[1.0]]), ["directions"]),
        (document(directions={"0": [1.0, 2.0], "1": [1.0]}), ["has 1 numbers"]),
        (document(directions={"0": [1.0, "2.0"]}), ["the text '2.0'"]),
        (document(directions={"0": [1.0, None]}), ["NoneType"]),
        (document(directions={"0": [1.0, True]}), ["bool"]),
        (document(directions={"0": [[1.0]]}), ["a list of 1"]),
        (document(directions={"0": "AAAA"}), ["the text"]),
        (document(directions={"0": []}), ["a list of 0"]),
        (document(directions={"-1": [1.0]}), ["'-1'"]),
        (document(directions={"01": [1.0], "1": [1.0]}), ["'01'"]),
        (document(directions={"layer0": [1.0]}), ["'layer0'"]),
        ('{"model_type": "llama", "directions": {"0": [1.0], "0": [2.0]}}', ["'0' twice"]),
        ('{"model_type": "llama", "directions": {"0": [NaN, 1.0]}}', ["NaN"]),
        ('{"model_type": "llama", "directions": {"0": [Infinity, 1.0]}}', ["Infinity"]),
        ('{"model_type": "llama", "directions": {"0": [-Infinity]}}', ["Infinity"]),
        ('{"model_type": "llama", "directions": {"0": [1e400, 1.0]}}', ["1e400", "too large"]),
        ('{"model_type": "llama", "directions": {"0": [1' + "0" * 5000 + "]}}", ["5001 digits"]),
        ('{"model_type": "llama", "directions": {"0": [1e39], "1": [1.0]}}', ["too large for float32"]),
        (document(directions={"7": [1.0]}), ["only key 7", "final norm"]),
        (document(sgworkbench={"layers": [0]}), ["facts", "damaged"]),
        (document(sgworkbench="x"), ["facts", "damaged"]),
        (
            document(sgworkbench={"layers": [0, 1, 2], "read_kind": "resid_post", "protocol": "same-site"}),
            ["contradict"],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:40],
)
def test_hostile_files_are_one_sentence(tmp_path, content, words):
    refused(written(tmp_path, content), *words)


def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path):
    whole = json.dumps(document())
    for length in range(1, len(whole), 7):
        refused(written(tmp_path, whole[:length]))


def test_text_of_another_encoding_is_refused(tmp_path):
    path = tmp_path / "v.svec"
    path.write_bytes(b'{"model_type": "\xff\xfe"}')
    refused(path, "UTF-8")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(document()).encode())
    assert read_vector(path).layers == (0, 1, 2)


@needs_paper
def test_the_published_vector_has_the_published_norms():
    stats = json.loads((PAPER / "svec_stats_qwen3_4b.json").read_text(encoding="utf-8"))
    facts = next(entry for entry in stats["files"].values() if entry["method"] == "diff")
    document = SvecDocument.load(PUBLISHED)
    assert document.keys == tuple(range(36))
    assert [round(norm, 6) for norm in document.norms().values()] == facts["l2_norm"]
    vector = read_vector(PUBLISHED)
    assert vector.layers == tuple(range(35))
    assert vector.values.shape == (35, facts["d_model"])
    np.testing.assert_allclose(vector.values.double().norm(dim=-1).numpy(), facts["l2_norm"][:35], atol=5e-7)
    cosines = vector.to_dataframe()["cosine_with_previous"].to_numpy()[1:]
    np.testing.assert_allclose(cosines, facts["cos_consecutive"][:34], atol=2e-6)
    assert vector.provenance["interchange"]["left_out"]["norm"] == facts["l2_norm"][35]


@needs_paper
def test_the_published_vector_is_written_back_unchanged(tmp_path):
    SvecDocument.load(PUBLISHED).save(tmp_path / "again.svec")
    assert (tmp_path / "again.svec").read_bytes() == PUBLISHED.read_bytes()


@needs_paper
@pytest.mark.parametrize(("protocol", "layers", "shift"), [("same-site", "1-34", 0), ("official", "2-34", 1)])
def test_the_published_vector_goes_to_gguf_and_back_without_loss(tmp_path, protocol, layers, shift):
    vector = read_vector(PUBLISHED)
    write_vector(vector, tmp_path / "v.gguf", layers=layers, protocol=protocol)
    tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(tmp_path / "v.gguf").tensors}
    raw = json.loads(PUBLISHED.read_text(encoding="utf-8"))["directions"]
    chosen = range(int(layers.split("-")[0]), 35)
    assert set(tensors) == {f"direction.{layer - shift}" for layer in chosen}
    for layer in chosen:
        assert tensors[f"direction.{layer - shift}"].tolist() == raw[str(layer)]
    back = read_vector(tmp_path / "v.gguf")
    assert back.layers == tuple(chosen)
    assert back.protocol == protocol
    assert torch.equal(back.values, vector.values[chosen.start :])
    write_vector(back, tmp_path / "back.svec")
    again = json.loads((tmp_path / "back.svec").read_text(encoding="utf-8"))
    assert again["directions"] == {str(layer): raw[str(layer)] for layer in chosen}


@needs_paper
def test_the_published_vector_cannot_go_to_gguf_whole(tmp_path):
    with pytest.raises(WorkbenchError, match=r"resid_post\[0\].*--layers"):
        write_vector(read_vector(PUBLISHED), tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []
