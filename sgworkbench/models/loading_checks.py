"""Two things every read through transformers needs: silence while it works, and a check of what it filled in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from sgworkbench.errors import WorkbenchError


def require_complete(info: dict[str, Any], where: Path) -> None:
    """Refuse a model some of whose weights transformers had to make up.

    Transformers fills absent or wrongly shaped weights with random numbers and only warns.

    Args:
        info: the loading info `from_pretrained(output_loading_info=True)` returns.
        where: the folder or file, for the message.

    Raises:
        WorkbenchError: naming the first weight concerned.
    """
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    for problem, keys in (("lack", missing), ("have the wrong shape for", mismatched)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise WorkbenchError(f"The weights of {where} {problem} {keys[0]}{more}; the model is incomplete.")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and loading tables; failures still raise."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
