"""Shared test setup: shapes checked at run time, one thread budget, tiny models built in the test."""

from __future__ import annotations

import os

# Parallel workers share the machine; each gets its fair part of the cores, or what OMP_NUM_THREADS asks for if less.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_ASKED = os.environ.get("OMP_NUM_THREADS", "")
_THREADS = max(1, (os.cpu_count() or 1) // _WORKERS)
_THREADS = min(_THREADS, int(_ASKED)) if _ASKED.isdigit() and int(_ASKED) else _THREADS
os.environ["OMP_NUM_THREADS"] = str(_THREADS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook  # noqa: E402

# Every annotated tensor shape of the package is checked by beartype while the tests run.
install_import_hook("sgworkbench", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(_THREADS)

from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function that builds a tiny model of a family, loads it and remembers it for the whole run.

    `tiny_model("llama")` takes the further arguments of `build_tiny_model`; tests must leave the model as it was.
    """
    from tiny_models import build_tiny_model

    from sgworkbench.models import load_model

    loaded: dict[str, Any] = {}

    def build(family: str, **changes: Any) -> Any:
        key = repr((family, sorted(changes.items())))
        if key not in loaded:
            folder = build_tiny_model(family, tmp_path_factory.mktemp(family) / "model", **changes)
            loaded[key] = load_model(folder, self_check=False, progress=lambda _line: None)
        return loaded[key]

    return build


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """The demo model, loaded once; tests that use it are marked `demo_model` and must leave it as it was."""
    from sgworkbench.models import load_model

    return load_model("demo", self_check=False, progress=lambda _line: None)
