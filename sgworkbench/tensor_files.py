"""Atomic writes, and safetensors files that say what they are."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgworkbench.errors import WorkbenchError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it when the block succeeds and removed when it fails.

    Raises:
        WorkbenchError: the folder cannot be written to.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise WorkbenchError(f"Cannot write {str(target)!r}: {error.strerror or error}.") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # Temporary files are private by default; results should have the permissions any new file gets.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        raise WorkbenchError(f"Cannot write {str(target)!r}: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; tensors are made contiguous and moved to the CPU."""
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(ready, temporary, metadata=dict(metadata))


def read_tensors(
    path: str | Path, file_format: str, names: tuple[str, ...] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file of one of our formats.

    Args:
        path: the file.
        file_format: expected value of the metadata field `format`.
        names: tensors that must be there; None takes whatever is there.

    Raises:
        WorkbenchError: missing, truncated or damaged file, another format, or a missing tensor.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder; expected a safetensors file" if file.is_dir() else "does not exist"
        raise WorkbenchError(f"The file {str(path)!r} {what}.")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            found = list(opened.keys())
            found_format = metadata.get("format")
            if found_format != file_format:
                what = f"is of format {found_format!r}" if found_format else "does not name its format"
                raise WorkbenchError(
                    f"Expected a file of format {file_format!r} written by this package, but {str(path)!r} {what}."
                )
            missing = [name for name in names or () if name not in found]
            if missing:
                raise WorkbenchError(f"{str(path)!r} lacks the tensors {', '.join(missing)}; it is damaged.")
            return {name: opened.get_tensor(name) for name in found}, metadata
    except (SafetensorError, OSError, ValueError, struct.error, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise WorkbenchError(f"{str(path)!r} is not a readable safetensors file (truncated?): {reason}.") from None
