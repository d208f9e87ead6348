"""NumPy `.npz` archives, read without pickle.

Form written: `layers` (int64), `values` (float32, layer x d_model) and `facts` (JSON text).
Form read: that, or one 1-D array per layer, named `12`, `layer_12` or the like; such files do not say where their
vectors were read, which is then taken to be the output of the block.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange.archives import MAX_ARCHIVE_BYTES, checked_archive
from sgworkbench.interchange.facts import VectorFacts, vector_from_sites
from sgworkbench.interchange.layer_names import layer_keys
from sgworkbench.steering.vector import SteeringVector
from sgworkbench.tensor_files import atomic_path


def read_npz(path: Path) -> SteeringVector:
    """Read an archive, holding at most what it declares and at most `MAX_ARCHIVE_BYTES`.

    Raises:
        WorkbenchError: not a ZIP archive, damaged, too large unpacked, arrays of Python objects, or no layers.
    """
    where = repr(str(path))
    with checked_archive(path) as archive:
        arrays = {name.removesuffix(".npy"): _array(archive, name, where) for name in archive.namelist()}
    if {"layers", "values"} <= set(arrays):
        return _own(arrays, where)
    vectors = {Site(layer): _tensor(arrays[key], where) for layer, key in layer_keys(arrays, where).items()}
    kinds = ", ".join(sorted({str(array.dtype) for array in arrays.values()}))
    return vector_from_sites(vectors, None, where, {"format": "npz", "dtype": kinds})


def write_npz(vector: SteeringVector, path: Path) -> None:
    """Write layers, values and facts; the archive holds no pickle."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            allow_pickle=False,
            layers=np.asarray(vector.layers, dtype=np.int64),
            values=vector.values.detach().cpu().float().numpy(),
            facts=np.asarray(VectorFacts.of(vector).to_text()),
        )


def _own(arrays: dict[str, np.ndarray], where: str) -> SteeringVector:
    layers, values, text = arrays["layers"], arrays["values"], arrays.get("facts")
    if layers.ndim != 1 or layers.dtype.kind not in "iu" or values.ndim != 2 or len(values) != len(layers):
        raise WorkbenchError(
            f"Expected 'layers' (whole numbers) and 'values' (layer x d_model) in {where}, found the shapes "
            f"{list(layers.shape)} and {list(values.shape)}."
        )
    if len(set(layers.tolist())) < len(layers):
        raise WorkbenchError(f"{where} holds a layer twice: {layers.tolist()}.")
    if min(layers.tolist(), default=0) < 0:
        raise WorkbenchError(f"The layers in {where} count from 0; found {min(layers.tolist())}.")
    facts = None
    if text is not None:
        if text.ndim or text.dtype.kind != "U":
            raise WorkbenchError(f"The facts stored in {where} are not a text; it is damaged.")
        facts = VectorFacts.from_text(str(text), where)
        if list(facts.layers) != layers.tolist():
            raise WorkbenchError(
                f"The facts stored in {where} name other layers than its arrays; it was changed since."
            )
    sites = tuple(Site(layer) for layer in layers.tolist()) if facts is None else facts.sites()
    vectors = {site: _tensor(row, where) for site, row in zip(sites, values, strict=True)}
    return vector_from_sites(vectors, facts, where, {"format": "npz", "dtype": str(values.dtype)})


def _tensor(array: np.ndarray, where: str) -> torch.Tensor:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise WorkbenchError(f"Expected floating-point arrays in {where}, found {array.dtype}.")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _array(archive: zipfile.ZipFile, name: str, where: str) -> np.ndarray:
    """Read one array, but only after its header and the archive agree on its size."""
    if not name.endswith(".npy"):
        raise WorkbenchError(f"{where} holds {name[:60]!r} beside its arrays; it is not an .npz file.")
    size = archive.getinfo(name).file_size
    try:
        with archive.open(name) as stream:
            version = np.lib.format.read_magic(stream)
            header: Any = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = header(stream)
            if dtype.hasobject:
                raise WorkbenchError(f"{name} in {where} holds pickled Python objects, which are never loaded.")
            n_bytes = math.prod(shape) * dtype.itemsize
            if n_bytes > min(size, MAX_ARCHIVE_BYTES):
                raise WorkbenchError(
                    f"{name} in {where} declares {n_bytes} bytes, but the archive holds {size}; it is damaged."
                )
            data = stream.read(n_bytes)
    except (ValueError, SyntaxError, TypeError, EOFError, zipfile.BadZipFile, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120].rstrip(".")
        raise WorkbenchError(f"{name} in {where} is not a readable array: {reason}.") from None
    if len(data) < n_bytes:
        raise WorkbenchError(f"{name} in {where} is cut short.")
    return np.frombuffer(data, dtype=dtype, count=math.prod(shape)).reshape(shape, order="F" if fortran else "C")
