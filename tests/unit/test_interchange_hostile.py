"""Files made to do harm: nothing in them runs, memory stays bounded, and the answer is one sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from tiny_models import build_tiny_model

from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange import archives, read_vector, write_vector
from sgworkbench.steering import SteeringVector

MODEL = {"architecture": "llama", "n_layers": 8, "d_model": 6}


def refused(path: Path, *words: str) -> None:
    with pytest.raises(WorkbenchError) as caught:
        read_vector(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message, message


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def payload_archive(tmp_path: Path) -> tuple[Path, Path]:
    marker, path = tmp_path / "ran", tmp_path / "v.pt"
    torch.save({1: torch.ones(2), "x": Payload(marker)}, path)
    return path, marker


def test_the_payload_is_real(tmp_path):
    path, marker = payload_archive(tmp_path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "otherwise the tests below could not fail"


def test_code_in_a_torch_archive_is_not_run(tmp_path):
    path, marker = payload_archive(tmp_path)
    refused(path, "system", "nothing was executed")
    assert not marker.exists()


@pytest.mark.parametrize("ending", ["pt", "svec", "safetensors", "npz", "gguf"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_bare_pickles_are_not_run(tmp_path, protocol, ending):
    marker, path = tmp_path / "ran", tmp_path / f"v.{ending}"
    path.write_bytes(pickle.dumps(Payload(marker), protocol=protocol))
    refused(path)
    assert not marker.exists()


def test_old_torch_files_are_refused(tmp_path):
    torch.save({1: torch.ones(2)}, tmp_path / "v.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "v.pt", "pickle", "torch.save")


def test_pickled_objects_in_npz_are_not_run(tmp_path):
    marker = tmp_path / "ran"
    np.savez(tmp_path / "v.npz", layer_1=np.array([Payload(marker)], dtype=object))
    refused(tmp_path / "v.npz", "never loaded")
    assert not marker.exists()


def rewritten(source: Path, target: Path, change: Any, **options: Any) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_sizes_in_a_pickle_are_bounded_by_the_file(tmp_path):
    torch.save({1: torch.ones(200)}, tmp_path / "v.pt")

    def huge(name: str, data: bytes) -> bytes:
        # BININT1 200 becomes LONG1 with five bytes: 2 ** 33 elements.
        return data.replace(b"K\xc8", b"\x8a\x05" + (2**33).to_bytes(5, "little")) if name.endswith("pkl") else data

    refused(rewritten(tmp_path / "v.pt", tmp_path / "w.pt", huge), "size", str(2**33))

    def thousand(name: str, data: bytes) -> bytes:
        return data.replace(b"K\xc8", b"M\xe8\x03") if name.endswith("pkl") else data

    refused(rewritten(tmp_path / "v.pt", tmp_path / "x.pt", thousand), "torch cannot read")


def test_compressed_torch_archives_are_refused(tmp_path):
    torch.save({1: torch.zeros(100_000)}, tmp_path / "v.pt")
    same = rewritten(tmp_path / "v.pt", tmp_path / "w.pt", lambda _n, d: d, compression=zipfile.ZIP_DEFLATED)
    refused(same, "compressed")


def test_objects_of_torch_other_than_tensors_are_refused(tmp_path):
    sparse = torch.sparse_coo_tensor([[0]], [1.0], (4,), check_invariants=True)
    torch.save({1: sparse}, tmp_path / "v.pt")
    refused(tmp_path / "v.pt", "nothing was executed")
    torch.save({1: torch.ones(4, device="meta")}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "nothing was executed")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "l.pt")
    refused(tmp_path / "l.pt", "nothing was executed")


def test_zip_bombs_are_refused_before_they_unfold(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_ARCHIVE_BYTES", 64 * 2**20)
    path = tmp_path / "v.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**27,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("layer_1.npy", "w") as stream:
        stream.write(header.getvalue())
        for _ in range(80):
            stream.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    refused(path, "unpacks to 80 MiB")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (10**30,)])
def test_declared_shapes_are_bounded_by_the_archive(tmp_path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("layer_1.npy", header.getvalue() + bytes(64))
    refused(tmp_path / "v.npz", "declares")


def test_odd_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "a.npz", "readme.txt")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("layer_1.npy", b"\x93NUMPY\x01\x00\xff\xff")
    refused(tmp_path / "b.npz", "layer_1.npy")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        data = io.BytesIO()
        np.save(data, np.ones(3))
        archive.writestr("layer_1.npy", data.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("layer_1.npy", data.getvalue())
    refused(tmp_path / "c.npz", "two members")
    np.savez(tmp_path / "d.npz", layer_1=np.ones(3), v_1=np.ones(3))
    refused(tmp_path / "d.npz", "layer 1 twice")
    np.savez(tmp_path / "e.npz", layer_1=np.array([1.0, np.nan]))
    refused(tmp_path / "e.npz", "NaN")
    np.savez(tmp_path / "f.npz", layers=np.array([1, 1]), values=np.ones((2, 3)))
    refused(tmp_path / "f.npz", "twice")
    np.savez(tmp_path / "g.npz", layers=np.array([1, 2, 3]), values=np.ones((2, 3)))
    refused(tmp_path / "g.npz", "[3]", "[2, 3]")
    np.savez(tmp_path / "h.npz", layers=np.array([-1, 2]), values=np.ones((2, 3)))
    refused(tmp_path / "h.npz", "-1")
    np.savez(tmp_path / "i.npz", layer_1=np.array(["a"]))
    refused(tmp_path / "i.npz", "floating-point")


@pytest.mark.parametrize(
    ("name", "ending"), [("gguf", "gguf"), ("npz", "npz"), ("torch", "pt"), ("safetensors", "safetensors")]
)
def test_every_truncation_is_refused(tmp_path, name, ending):
    vector = SteeringVector((1, 2), torch.randn(2, 6), provenance={"model": MODEL})
    path = tmp_path / f"v.{ending}"
    write_vector(vector, path, name)
    data = path.read_bytes()
    ends = data.rfind(vector.at(2).numpy().tobytes()) + 24
    for length in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
        path.write_bytes(data[:length])
        if name == "gguf" and length >= ends:
            # Only the padding after the last tensor is gone.
            assert torch.equal(read_vector(path).values, vector.values)
        else:
            refused(path)


@pytest.mark.parametrize(
    ("name", "ending"), [("gguf", "gguf"), ("npz", "npz"), ("torch", "pt"), ("safetensors", "safetensors")]
)
def test_flipped_bytes_give_a_vector_or_a_sentence(tmp_path, name, ending):
    vector = SteeringVector((1, 2), torch.randn(2, 6), provenance={"model": MODEL})
    path = tmp_path / f"v.{ending}"
    write_vector(vector, path, name)
    data = path.read_bytes()
    outcomes = set()
    for place in range(0, len(data), max(1, len(data) // 150)):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        path.write_bytes(bytes(changed))
        try:
            outcomes.add(isinstance(read_vector(path), SteeringVector))
        except WorkbenchError:
            outcomes.add(False)
    assert False in outcomes


def test_a_language_model_in_gguf_is_called_one(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", "language model", "'llama'", "--model")


def test_a_model_folder_and_weights_are_called_what_they_are(tmp_path):
    folder = build_tiny_model("llama", tmp_path / "model", n_layers=1)
    refused(folder, "model without a baked vector")
    refused(folder / "model.safetensors", "Expected a file of format")


def gguf(tmp_path: Path, **tensors: np.ndarray) -> Path:
    writer = GGUFWriter(tmp_path / "v.gguf", "controlvector")
    for name, data in tensors.items():
        writer.add_tensor(name.replace("_", "."), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "v.gguf"


def test_foreign_control_vectors(tmp_path):
    back = read_vector(gguf(tmp_path, direction_3=np.ones(4, np.float32), direction_1=np.zeros(4, np.float32)))
    assert back.layers == (1, 3)
    assert [str(back.write_site(layer)) for layer in back.layers] == ["resid_post[1]", "resid_post[3]"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"direction_0": np.ones(4, np.float32)}, "direction.1"),
        ({"direction_1": np.ones(4, np.float16)}, "not float32"),
        ({"direction_1": np.ones((2, 2), np.float32)}, "2 axes"),
        ({"direction_1": np.ones(4, np.float32), "direction_2": np.ones(5, np.float32)}, "widths"),
        ({"direction_1": np.array([1, np.nan], np.float32)}, "NaN"),
        ({"vector_1": np.ones(4, np.float32)}, "vector.1"),
    ],
    ids=str,
)
def test_control_vectors_that_are_none(tmp_path, tensors, words):
    refused(gguf(tmp_path, **tensors), words)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (struct.pack("<IQQ", 3, 2**60, 0), "architecture"),
        (struct.pack("<IQQ", 3, 1, 2**60), "cut short"),
        (struct.pack("<IQQ", 99, 1, 1), "version 99"),
        (struct.pack("<IQQQ", 3, 1, 1, 2**62), "damaged"),
        (struct.pack("<IQQQ", 3, 1, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**62), "cut short"),
        (struct.pack("<IQQQ", 3, 1, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**62), "cut short"),
        (struct.pack("<IQQQ", 3, 1, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 2**62), "nested"),
        (struct.pack("<IQQQ", 3, 1, 1, 1) + b"a" + struct.pack("<I", 77), "type 77"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_headers_that_promise_too_much(tmp_path, header, words):
    (tmp_path / "v.gguf").write_bytes(b"GGUF" + header + bytes(8))
    refused(tmp_path / "v.gguf", words)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": "[1, 1]"},
        {"layers": "[-1, 2]"},
        {"layers": "[1]"},
        {"layers": "{}"},
        {"layers": "[" * 50_000},
        {"read_kind": "attn_out"},
        {"protocol": "other"},
        {"provenance": "[1, 2]"},
        {"provenance": '"text"'},
        {"provenance": '{"model": [1]}'},
        {"provenance": '{"model": {"n_layers": "8"}}'},
        {"provenance": '{"model": {"n_layers": 2}}'},
        {"provenance": '{"model": {"d_model": 7}}'},
        {"provenance": '{"a":' * 50_000},
    ],
    ids=lambda value: str(value)[:50],
)
def test_hostile_metadata_of_our_own_format(tmp_path, change):
    SteeringVector((1, 2), torch.ones(2, 6), provenance={"model": MODEL}).save(tmp_path / "v.safetensors")
    metadata = {
        "format": "sgworkbench-steering-vector-1",
        "layers": "[1, 2]",
        "read_kind": "resid_post",
        "protocol": "same-site",
        "provenance": json.dumps({"model": MODEL}),
    }
    save_file({"values": torch.ones(2, 6)}, tmp_path / "w.safetensors", metadata=metadata)
    assert read_vector(tmp_path / "w.safetensors").layers == (1, 2), "unchanged, it is read"
    save_file({"values": torch.ones(2, 6)}, tmp_path / "w.safetensors", metadata=metadata | change)
    refused(tmp_path / "w.safetensors")


def test_nothing_recognisable_is_said_to_be_so(tmp_path):
    for data in (b"", b"\x00" * 100, b"hello world", b"\x1f\x8b\x08\x00", b"cos\nsystem\n(S'ls'\ntR."):
        (tmp_path / "v.bin").write_bytes(data)
        refused(tmp_path / "v.bin")
