"""ZIP archives that nobody vouches for: `.npz` and `.pt` files are both ZIP archives."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgworkbench.errors import WorkbenchError

MAX_ARCHIVE_BYTES = 512 * 2**20
"""Unpacked size at most; the vectors of 126 blocks of width 16,384 take 16 MiB in float64."""
_MAX_MEMBERS = 4096
# What Python's zipfile raises for archives with damaged headers.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError, OverflowError)


@contextmanager
def checked_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive whose members are few, have distinct names and are small when unpacked.

    Raises:
        WorkbenchError: not such an archive, or a member turns out to be damaged while the block reads it.
    """
    where = repr(str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if not 0 < len(members) <= _MAX_MEMBERS:
                raise WorkbenchError(f"{where} holds {len(members)} members; a vector file has one to a few per layer.")
            if len({member.filename for member in members}) < len(members):
                raise WorkbenchError(f"{where} holds two members of one name; it is damaged or was tampered with.")
            total = sum(member.file_size for member in members)
            if total > MAX_ARCHIVE_BYTES:
                raise WorkbenchError(
                    f"{where} unpacks to {total / 2**20:.0f} MiB; a vector file has at most "
                    f"{MAX_ARCHIVE_BYTES // 2**20} MiB."
                )
            yield archive
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise WorkbenchError(f"{where} is not a readable archive (cut short?): {reason}.") from None
