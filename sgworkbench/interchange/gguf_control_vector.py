"""GGUF control vectors, which llama.cpp adds with `--control-vector FILE` or `--control-vector-scaled FILE SCALE`.

Form: `general.architecture` is `controlvector`; one 1-D float32 tensor `direction.k` per layer.
Semantics: llama.cpp stores direction.k at place k - 1 of a buffer that starts at layer 1, and fills block il from place
il - 1; so k is the 0-based block, and the vector is added to the output of block k (resid_post[k], before the final
norm if it is the last), for every token. Block 0 cannot be expressed. The values are added as they are, times the
SCALE of the command; llama.cpp reads no metadata, so ours (`sgworkbench.facts`) do not disturb it.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange.facts import MAX_WIDTH, VectorFacts, vector_from_sites
from sgworkbench.steering.vector import SteeringVector
from sgworkbench.tensor_files import atomic_path

ARCHITECTURE = "controlvector"
_FACTS = "sgworkbench.facts"
_MAX_ENTRIES = 4096
_MAX_TEXT = 16 * 2**20
_STRING, _ARRAY, _F32 = 8, 9, 0
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_gguf(path: Path) -> SteeringVector:
    """Read a control vector; values come back bit by bit.

    The header is read here and not with the `gguf` package, whose reader trusts the counts a file declares.

    Raises:
        WorkbenchError: a language model, cut short, damaged, or tensors that are not directions.
    """
    with path.open("rb") as stream:
        header = _Header(stream, path)
        metadata, tensors = header.read()
        vectors: dict[Site, torch.Tensor] = {}
        for name, width, offset in tensors:
            found = re.fullmatch(r"direction\.(0|[1-9]\d{0,4})", name)
            if found is None:
                raise WorkbenchError(f"Expected tensors named direction.k in {str(path)!r}, found {name[:60]!r}.")
            site = Site.from_gguf_layer(int(found[1]))
            if site in vectors:
                raise WorkbenchError(f"{str(path)!r} holds {name} twice; it is damaged.")
            stream.seek(offset)
            data = np.frombuffer(header.take(4 * width), dtype=header.order + "f4")
            vectors[site] = torch.from_numpy(data.astype(np.float32))
    text = metadata.get(_FACTS)
    where = repr(str(path))
    facts = VectorFacts.from_text(text, where) if isinstance(text, str) else None
    origin: dict[str, Any] = {"format": "gguf", "dtype": "float32"}
    hint = metadata.get(f"{ARCHITECTURE}.model_hint")
    if isinstance(hint, str):
        origin["model_hint"] = hint
    return vector_from_sites(vectors, facts, where, origin)


def write_gguf(vector: SteeringVector, path: Path) -> None:
    """Write a control vector, and check with the `gguf` reader that it says what was meant, before it gets its name.

    Raises:
        WorkbenchError: a site that is not the output of a block from 1 on.
    """
    rows = {}
    for layer, row in zip(vector.layers, vector.values, strict=True):
        site = vector.write_site(layer)
        try:
            rows[site.gguf_layer()] = row.detach().cpu().float().contiguous().numpy()
        except WorkbenchError as error:
            raise WorkbenchError(f"{str(error).rstrip('.')}; choose other layers with --layers.") from None
    hint = str((vector.provenance.get("model") or {}).get("architecture", "unknown"))
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(rows))
        writer.add_string(_FACTS, VectorFacts.of(vector).to_text())
        for layer in sorted(rows):
            writer.add_tensor(f"direction.{layer}", rows[layer])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _verify(temporary, rows)


def _verify(path: Path, rows: dict[int, np.ndarray]) -> None:
    found = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    for layer, row in rows.items():
        back = found.pop(f"direction.{layer}", None)
        if back is None or back.dtype != np.float32 or back.tobytes() != row.tobytes():
            raise WorkbenchError(f"The gguf reader does not give direction.{layer} back as written; nothing was kept.")
    if found:
        raise WorkbenchError(f"The gguf reader finds the further tensors {sorted(found)}; nothing was kept.")


class _Header:
    """Reads a GGUF header, never more than the file has and never more than a control vector needs."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.where, self.size = stream, repr(str(path)), path.stat().st_size
        self.order = "<"

    def read(self) -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
        """Return the metadata, and name, width and byte offset of each tensor."""
        self.take(4)
        version = self.number("I")
        if version > 0xFFFF:
            # Written on a machine of the other byte order.
            self.order, version = ">", struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in (2, 3):
            raise WorkbenchError(f"{self.where} is of GGUF version {version}; versions 2 and 3 can be read.")
        n_tensors, n_entries = self.number("Q"), self.number("Q")
        metadata = self._metadata(n_entries)
        if metadata.get("general.architecture") != ARCHITECTURE:
            raise WorkbenchError(f"{self.where} names no architecture; a control vector says {ARCHITECTURE!r}.")
        if not 0 < n_tensors <= _MAX_ENTRIES:
            raise WorkbenchError(f"{self.where} declares {n_tensors} tensors; a control vector has one per layer.")
        tensors = [self._tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 65536 or alignment & (alignment - 1):
            raise WorkbenchError(f"{self.where} asks for an alignment of {alignment!r}, which is not a power of two.")
        start = math.ceil(self.stream.tell() / alignment) * alignment
        for name, width, offset in tensors:
            if start + offset + 4 * width > self.size:
                raise WorkbenchError(f"{self.where} is cut short: {name} ends beyond the end of the file.")
        return metadata, [(name, width, start + offset) for name, width, offset in tensors]

    def take(self, n_bytes: int) -> bytes:
        """Return the next bytes."""
        if n_bytes > self.size - self.stream.tell():
            raise WorkbenchError(f"{self.where} is cut short or damaged: it declares more than the file holds.")
        return self.stream.read(n_bytes)

    def number(self, code: str) -> Any:
        """Return the next number, by its `struct` letter."""
        return struct.unpack(self.order + code, self.take(struct.calcsize(self.order + code)))[0]

    def text(self) -> str:
        """Return the next string."""
        length = self.number("Q")
        if length > _MAX_TEXT:
            raise WorkbenchError(f"{self.where} declares a text of {length} bytes; it is damaged.")
        return self.take(length).decode("utf-8", errors="replace")

    def _metadata(self, n_entries: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(n_entries):
            if index > _MAX_ENTRIES:
                raise WorkbenchError(f"{self.where} declares {n_entries} metadata entries; it is damaged.")
            key, kind = self.text(), self.number("I")
            if key in metadata:
                raise WorkbenchError(f"{self.where} gives the metadata key {key[:60]!r} twice; it is damaged.")
            metadata[key] = self._value(kind)
            if key == "general.architecture" and metadata[key] != ARCHITECTURE:
                raise WorkbenchError(
                    f"{self.where} is a language model of the architecture {str(metadata[key])[:40]!r}, not a control "
                    "vector; load it with --model instead."
                )
        return metadata

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise WorkbenchError(f"{self.where} holds metadata of the unknown type {kind}; it is damaged.")
        inner, length = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(length * struct.calcsize(self.order + _SCALARS[inner]))
        elif inner == _STRING:
            # Every text has at least its length, so the loop ends with the file.
            for _ in range(length):
                self.text()
        else:
            raise WorkbenchError(f"{self.where} holds nested metadata, which a control vector does not have.")
        return None

    def _tensor(self) -> tuple[str, int, int]:
        name, n_axes = self.text(), self.number("I")
        if n_axes != 1:
            raise WorkbenchError(f"Expected vectors in {self.where}, but {name[:60]!r} has {n_axes} axes.")
        width, kind, offset = self.number("Q"), self.number("I"), self.number("Q")
        if not 0 < width <= MAX_WIDTH:
            raise WorkbenchError(f"{name[:60]!r} in {self.where} declares the width {width}; it is damaged.")
        if kind != _F32:
            raise WorkbenchError(f"{name[:60]!r} in {self.where} is not float32; llama.cpp takes only that.")
        return name, width, offset
