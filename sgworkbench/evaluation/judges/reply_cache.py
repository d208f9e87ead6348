"""Replies of judge models, kept by content, so that no question is asked twice.

A key is the SHA-256 of the filled template, the decoding and the judge's identity: the same question to the same
judge, whatever file it came from. Replies are kept, not verdicts, so that a corrected parser needs no new call. Only
hashes of the judged texts are stored, but a reply may quote them. Errors are not kept: a later run asks again.

One SQLite file: every reply is committed as it arrives and survives a killed process, and several processes can
share the file.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sgworkbench.downloads import cache_folder
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.judges.backend import Reply, Request

_WAIT_SECONDS = 30.0


def default_cache_path() -> Path:
    """Return the cache every run shares unless another is named, in the user's cache folder."""
    return cache_folder() / "judge_replies.sqlite"


def request_key(request: Request, identity: Mapping[str, Any]) -> str:
    """Return the cache key of a request to a judge, 64 hexadecimal digits."""
    content = json.dumps({"judge": dict(identity), "request": request.content()}, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class ReplyCache:
    """A cache file; use it as a context manager or call `close`.

    Raises:
        WorkbenchError: the file cannot be opened, is locked for long, or is not a cache of ours.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self.path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, cut INTEGER NOT NULL)"
            )
            self._database.execute("SELECT key, text, cut FROM replies LIMIT 1").fetchone()
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> WorkbenchError:
        return WorkbenchError(
            f"The cache of judge replies {str(self.path)!r} cannot be used ({error}); remove it, or name another "
            f"one with --cache."
        )

    def get(self, key: str) -> Reply | None:
        """Return the stored reply, or None."""
        try:
            with self._lock:
                row = self._database.execute("SELECT text, cut FROM replies WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return None if row is None else Reply(row[0], cut=bool(row[1]))

    def put(self, key: str, reply: Reply) -> None:
        """Store a reply; one without text is not stored."""
        if reply.text is None:
            return
        try:
            with self._lock:
                self._database.execute(
                    "INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (key, reply.text, int(reply.cut))
                )
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
