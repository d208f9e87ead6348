"""Reading `.pt` files without running what is in them.

`torch.load(weights_only=True)` already builds tensors and plain containers only. Before it is called, the pickle inside
is read as a list of instructions, never executed: it may name nothing but tensors and their storages, and no number
larger than the file, so that neither code nor an absurd size gets as far as torch.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange.archives import checked_archive

_ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch\._utils _rebuild_parameter|"
    r"torch (?:Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
_NAMES_OUTSIDE = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"})
_MAX_PICKLE_BYTES = 16 * 2**20
_LARGEST_NUMBER_ALLOWED = 2**20


def is_torch_archive(names: list[str]) -> bool:
    """Whether these members of an archive are those of a file written by `torch.save`."""
    return any(name == "data.pkl" or name.endswith("/data.pkl") for name in names)


def read_torch(path: Path) -> Any:
    """Read tensors and plain containers; tensors come to the CPU.

    Raises:
        WorkbenchError: not an archive of `torch.save`, damaged, too large, or naming anything but tensors.
    """
    where = repr(str(path))
    with checked_archive(path) as archive:
        total = _inspect(archive, where)
        pickled = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickled) != 1:
            raise WorkbenchError(f"{where} holds {len(pickled)} pickles; a file written by torch.save has one.")
        if archive.getinfo(pickled[0]).file_size > _MAX_PICKLE_BYTES:
            raise WorkbenchError(f"The pickle in {where} is larger than {_MAX_PICKLE_BYTES // 2**20} MiB.")
        _require_tensors_only(archive.read(pickled[0]), max(total, _LARGEST_NUMBER_ALLOWED), where)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
        raise WorkbenchError(f"torch cannot read {where}: {reason}.") from None
    except (EOFError, OSError, MemoryError, RecursionError, AssertionError) as error:
        raise WorkbenchError(f"torch cannot read {where} ({type(error).__name__}); it is damaged.") from None


def _inspect(archive: zipfile.ZipFile, where: str) -> int:
    """Return the unpacked size; torch stores its members uncompressed, so anything else is not its work."""
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise WorkbenchError(
            f"{where} holds compressed members, which torch.save does not write; it was tampered with."
        )
    return sum(member.file_size for member in members)


def _require_tensors_only(program: bytes, largest: int, where: str) -> None:
    try:
        for instruction, argument, _ in pickletools.genops(program):
            name = instruction.name
            if name in _NAMES_OUTSIDE or (name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument))):
                what = str(argument).replace(" ", ".") if name == "GLOBAL" else name
                raise WorkbenchError(
                    f"{where} asks for {what[:80]} when loaded; only tensors in plain dictionaries are read, "
                    "and nothing was executed."
                )
            if (
                isinstance(argument, int)
                and name in ("INT", "BININT", "LONG", "LONG1", "LONG4")
                and abs(argument) > largest
            ):
                raise WorkbenchError(f"{where} declares the size {str(argument)[:40]}, more than the file holds.")
    except (ValueError, IndexError, EOFError, RecursionError, OverflowError) as error:
        raise WorkbenchError(f"The pickle in {where} is damaged: {' '.join(str(error).split())[:100]}.") from None
