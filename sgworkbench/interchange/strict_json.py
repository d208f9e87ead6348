"""JSON from files that nobody vouches for: bounded in size, no duplicate keys, no numbers that are not numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from sgworkbench.errors import WorkbenchError

MAX_JSON_BYTES = 64 * 2**20
"""Vectors of a model with 126 blocks of width 16,384 take 45 MB as decimal text; parsing takes about 15 times more."""


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file of at most `MAX_JSON_BYTES` bytes.

    NaN is let through as a float, since published vector files use it for missing statistics; callers refuse it where
    it means harm.

    Raises:
        WorkbenchError: too large, not UTF-8, or as `parse_json`.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise WorkbenchError(
            f"{str(path)!r} has {size / 2**20:.0f} MiB; "
            f"a vector file in JSON has at most {MAX_JSON_BYTES // 2**20} MiB."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{str(path)!r} is not UTF-8 text (byte {error.start}), so it is no JSON file.") from None
    return parse_json(text, repr(str(path)))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON text.

    Args:
        text: the text.
        where: what it is, for the message.

    Raises:
        WorkbenchError: not JSON, cut short, nested too deeply, a key given twice, Infinity, or a number too large for
            float64.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for index, key in enumerate(keys) if key in keys[:index])
            raise WorkbenchError(f"{where} gives the key {_short(twice)!r} twice; it is damaged or was tampered with.")
        return found

    def finite(literal: str) -> float:
        value = float(literal)
        if math.isinf(value):
            raise WorkbenchError(f"{where} holds the number {_short(literal)}, which is too large for float64.")
        return value

    def whole(literal: str) -> int:
        if len(literal) > 300:
            raise WorkbenchError(f"{where} holds a whole number of {len(literal)} digits, too large for float64.")
        return int(literal)

    def constant(name: str) -> float:
        if name != "NaN":
            _refuse_constant(where, name)
        return math.nan

    try:
        return json.loads(text, object_pairs_hook=once, parse_float=finite, parse_int=whole, parse_constant=constant)
    except RecursionError:
        raise WorkbenchError(f"{where} is nested too deeply; a vector file has three levels.") from None
    except json.JSONDecodeError as error:
        end = " (the file is cut short)" if error.pos >= len(text.rstrip()) else ""
        raise WorkbenchError(
            f"{where} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}{end}."
        ) from None


def _refuse_constant(where: str, name: str) -> NoReturn:
    raise WorkbenchError(f"{where} holds {name}; a vector file has finite numbers only.")


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
