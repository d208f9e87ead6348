"""Judge many responses: one row out for one row in, in the same order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.coherence import coherence, split_reasoning
from sgworkbench.evaluation.judges.base import Judge

# Identifying columns that are carried over where the records have them; texts are not.
KEPT_COLUMNS = ("row", "sample", "id", "arm", "model", "category")
# Columns that a later command must find even in an empty table.
VERDICT_COLUMNS = ("row", "judge", "verdict", "score", "raw", "error")


def judge_table(records: pd.DataFrame | Iterable[Mapping[str, Any]], judge: Judge) -> pd.DataFrame:
    """Judge every record and describe its coherence.

    Records are taken one at a time, so that a generator over a large file is never held in memory.

    Args:
        records: a table or an iterable of mappings, each with `prompt` and `text`; see `responses.py`.
        judge: any `Judge`.

    Returns:
        One row per record in input order: `row` (position, unless the record has its own), the kept identifying
        columns, `judge`, `verdict`, `score` (NaN for none), `raw`, `error`, and the columns of `Coherence`.

    Raises:
        WorkbenchError: a record without `prompt` or `text`.
    """
    if isinstance(records, pd.DataFrame):
        columns = [str(column) for column in records.columns]
        values = zip(*(records[column] for column in records.columns), strict=True)
        records = (dict(zip(columns, row, strict=True)) for row in values)
    rows = []
    for position, record in enumerate(records):
        prompt, text = record.get("prompt"), record.get("text")
        if not isinstance(prompt, str) or not isinstance(text, str):
            missing = "prompt" if not isinstance(prompt, str) else "text"
            raise WorkbenchError(
                f"Record {position} has no {missing!r}; judging needs the columns prompt and text, but it holds "
                f"{', '.join(map(str, record)) or 'nothing'}."
            )
        verdict = judge.judge(prompt, text)
        kept = {column: record[column] for column in KEPT_COLUMNS if column in record}
        rows.append(
            {
                "row": position,
                **kept,
                "judge": judge.name,
                "verdict": verdict.verdict,
                "score": float("nan") if verdict.score is None else verdict.score,
                "raw": verdict.raw,
                "error": verdict.error,
                **vars(coherence(text, split_reasoning(text), record)),
            }
        )
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(VERDICT_COLUMNS))
