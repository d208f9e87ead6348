"""Verdict rows written as they come, whole or not at all: .jsonl, .csv, .tsv or .parquet."""

from __future__ import annotations

import csv
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as parquet

from sgworkbench.errors import unknown_name
from sgworkbench.evaluation.text_stream import replace_lone_surrogates
from sgworkbench.tensor_files import atomic_path

ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
_ROWS_AT_ONCE = 4096
# Types of the columns that are always there; a file without any score still has a column of numbers.
_TYPES = {
    "row": pa.int64(),
    "sample": pa.int64(),
    "score": pa.float64(),
    "reasoning_characters": pa.int64(),
    "answer_characters": pa.int64(),
    "empty": pa.bool_(),
    "zlib_ratio": pa.float64(),
    "loop": pa.bool_(),
    "cut_by_length": pa.bool_(),
    "coherent": pa.bool_(),
}
_LARGEST_INTEGER = 2**63


def check_ending(path: str | Path) -> str:
    """Return the ending of a verdict file in lower case.

    Raises:
        WorkbenchError: it is none of `ENDINGS`.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise unknown_name("ending for a verdict file", ending or "(none)", ENDINGS)
    return ending


def write_rows(rows: Iterable[Mapping[str, Any]], path: str | Path) -> int:
    """Write rows in order, a few thousand in memory at a time, and return how many there were.

    JSON lines are written as they come. For the other formats the columns and their types are known only at the end,
    so rows go through a temporary file first.

    Raises:
        WorkbenchError: an unknown ending, or a folder that cannot be written to. Whatever reading the rows raises
            passes through, and nothing is left behind.
    """
    ending = check_ending(path)
    with atomic_path(path) as part:
        if ending == ".jsonl":
            with part.open("w", encoding="utf-8", newline="\n") as handle:
                return _write_lines(rows, handle, {})
        with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n", dir=part.parent) as spool:
            kinds: dict[str, set[str]] = {}
            count = _write_lines(rows, spool, kinds)
            spool.seek(0)
            again = (json.loads(line) for line in spool)
            if ending == ".parquet":
                _write_parquet(again, part, kinds)
            else:
                _write_csv(again, part, list(kinds), "\t" if ending == ".tsv" else ",")
            return count


def _write_lines(rows: Iterable[Mapping[str, Any]], handle: IO[str], kinds: dict[str, set[str]]) -> int:
    count = 0
    for row in rows:
        plain = {name: _plain(value) for name, value in row.items()}
        for name, value in plain.items():
            kinds.setdefault(name, set()).add(_kind(value))
        handle.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        count += 1
    return count


def _plain(value: Any) -> Any:
    """A JSON value: numpy scalars unpacked, numbers that JSON lacks as null, text without lone surrogates."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else str(value)


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and not -_LARGEST_INTEGER <= value < _LARGEST_INTEGER:
        return "str"
    return type(value).__name__


def _arrow_type(name: str, kinds: set[str]) -> pa.DataType:
    found = kinds - {"NoneType"}
    if name in _TYPES:
        return _TYPES[name]
    if found == {"bool"}:
        return pa.bool_()
    if found == {"int"}:
        return pa.int64()
    return pa.float64() if found and found <= {"int", "float"} else pa.string()


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path, kinds: dict[str, set[str]]) -> None:
    schema = pa.schema([(name, _arrow_type(name, found)) for name, found in kinds.items()])
    texts = {field.name for field in schema if pa.types.is_string(field.type)}
    with parquet.ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            columns = {
                name: [_as_text(row.get(name)) if name in texts else row.get(name) for row in batch] for name in kinds
            }
            writer.write_table(pa.Table.from_pydict(columns, schema=schema))


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _write_csv(rows: Iterator[dict[str, Any]], path: Path, columns: list[str], delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns, restval="", delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
