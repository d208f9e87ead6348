"""The published results of Self-Guard (arXiv 2602.00707) as data frames: numbers only, with source and caveats.

Every table is a CSV file beside `tables.json`, which names source, unit, columns and caveats. Values are shares, not
per cent. Shown beside measurements of one's own, they are to be labelled as published, with the model named.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from importlib import resources
from typing import Any

import pandas as pd

from sgworkbench.errors import WorkbenchError, unknown_name

_DATA = resources.files("sgworkbench.paper") / "data"


@cache
def _descriptions() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((_DATA / "tables.json").read_text(encoding="utf-8"))
    return loaded


PUBLISHED_TABLES: tuple[str, ...] = tuple(_descriptions()["tables"])
"""Names of the tables."""


def published(name: str, **where: Any) -> pd.DataFrame:
    """Return a table of published results.

    Args:
        name: one of `PUBLISHED_TABLES`.
        where: keep only rows with these values, for example `model="Qwen3-8B", main=True`.

    Returns:
        One row per measurement. `.attrs` holds name, title, unit, source, columns (their meaning) and caveats.

    Raises:
        WorkbenchError: unknown table, a column it has not, or a value no row has.
    """
    tables = _descriptions()["tables"]
    if name not in tables:
        raise unknown_name("published table", name, tables)
    with (_DATA / f"{name}.csv").open(encoding="utf-8") as file:
        # Layer lists stay text: "20" names one layer, "30,31,32" three.
        table = pd.read_csv(file, dtype=dict.fromkeys(("layers", "layers_a", "layers_b"), "string"))
    for column, value in where.items():
        if column not in table.columns:
            raise unknown_name("column", column, table.columns)
        kept = table[table[column] == value]
        if kept.empty:
            known = sorted(map(str, table[column].dropna().unique()))
            if isinstance(value, str):
                raise unknown_name(f"{column} in the published table {name!r}", value, known)
            raise WorkbenchError(f"No row of the published table {name!r} has {column} = {value!r} and the rest.")
        table = kept
    table = table.reset_index(drop=True)
    table.attrs = deepcopy({"name": name, "source": _descriptions()["source"], **tables[name]})
    return table
