"""Rows of item files (questions, texts), with the place each stands at for messages."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.evaluation.text_stream import decoded_lines

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands ("items.csv, line 3"), and its fields."""


def read_rows(path: str | Path) -> list[Row]:
    """Read all rows of a .jsonl, .json (a list), .csv, .tsv or .parquet file.

    Raises:
        WorkbenchError: missing file, unknown ending, a broken line (with its number), or no rows.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder; expected a file" if file.is_dir() else "does not exist"
        raise WorkbenchError(f"The item file {str(path)!r} {what}.")
    ending = file.suffix.lower()
    if ending not in FORMATS:
        raise unknown_name("item file ending", ending or "(none)", FORMATS)
    if ending == ".parquet":
        rows = list(_parquet_rows(file))
    elif ending in (".csv", ".tsv"):
        rows = list(_csv_rows(file, "," if ending == ".csv" else "\t"))
    else:
        rows = list(_json_rows(file, by_line=ending == ".jsonl"))
    if not rows:
        raise WorkbenchError(f"The item file {str(path)!r} holds no items; at least one is needed.")
    return rows


def field_of(row: Row, ours: str, candidates: Iterable[str], mapping: Mapping[str, str]) -> Any:
    """Return the first field of a row that is there, under the name the user gave or one of the known ones.

    Raises:
        WorkbenchError: none of them is there.
    """
    where, fields = row
    names = (mapping[ours],) if ours in mapping else tuple(candidates)
    for name in names:
        if name in fields:
            return fields[name]
    found = ", ".join(map(str, fields)) or "none"
    raise WorkbenchError(
        f"{where}: no field for the {ours} (looked for {', '.join(names)}; found {found}); "
        f"name it with a field mapping such as {ours}=NAME."
    )


def text_of(value: Any, ours: str, where: str) -> str:
    """Return a field that must be text and not empty; numbers are written out.

    Raises:
        WorkbenchError: nothing, or something that is neither text nor a number.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None or value != value or value == "" else repr(value)[:40]
        raise WorkbenchError(f"{where}: the {ours} must be text, found {found}.")
    return value


def rank_key(seed: int, name: str) -> str:
    """Return a key whose order is random in the seed, and the same on every platform."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def sampled(ids: Sequence[str], n: int | None, seed: int) -> list[int]:
    """Return the indices of `n` items chosen by a hash of seed and id, in the items' order; None takes all.

    Raises:
        WorkbenchError: fewer than one item is asked for.
    """
    if n is not None and n < 1:
        raise WorkbenchError(f"At least one item is needed; found a request for {n}.")
    order = sorted(range(len(ids)), key=lambda index: rank_key(seed, ids[index]))
    return sorted(order if n is None else order[:n])


def _json_rows(file: Path, *, by_line: bool) -> Iterable[Row]:
    if by_line:
        values = []
        for number, line in enumerate(decoded_lines(file), start=1):
            if line.strip():
                where = f"{file.name}, line {number}"
                values.append((where, _parsed(line, where)))
    else:
        whole = _parsed("".join(decoded_lines(file)), file.name)
        if isinstance(whole, dict) and sum(isinstance(part, list) for part in whole.values()) == 1:
            whole = next(part for part in whole.values() if isinstance(part, list))
        if not isinstance(whole, list):
            raise WorkbenchError(f"{file.name}: expected a list of items, found {type(whole).__name__}.")
        values = [(f"{file.name}, item {number}", value) for number, value in enumerate(whole, start=1)]
    for where, value in values:
        if not isinstance(value, dict):
            raise WorkbenchError(f"{where}: expected an object with fields, found {type(value).__name__}.")
        yield where, value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise WorkbenchError(f"{where}: broken JSON ({reason}).") from None


def _csv_rows(file: Path, delimiter: str) -> Iterable[Row]:
    reader = csv.DictReader(decoded_lines(file), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            where = f"{file.name}, line {reader.line_num}"
            if None in fields or None in fields.values():
                raise WorkbenchError(f"{where}: not as many cells as the header has columns; quote the text.")
            yield where, fields
    except csv.Error as error:
        raise WorkbenchError(f"{file.name}, line {reader.line_num}: broken CSV ({error}).") from None


def _parquet_rows(file: Path) -> Iterable[Row]:
    try:
        frame = pd.read_parquet(file)
    except Exception as error:  # pyarrow raises many types for a damaged file
        reason = " ".join(str(error).split()).rstrip(".")
        raise WorkbenchError(f"{file.name} is not a readable parquet file ({reason}).") from None
    for number, fields in enumerate(frame.to_dict("records"), start=1):
        yield f"{file.name}, row {number}", {str(name): _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    """Arrays of a parquet file as lists."""
    return value.tolist() if hasattr(value, "tolist") else value
