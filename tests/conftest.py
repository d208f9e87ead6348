"""Shared test setup: shapes checked at run time, one thread budget, tiny models built in the test."""

from __future__ import annotations

import os

# Parallel workers share the machine; each gets its fair part of the cores, and never more.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = max(1, (os.cpu_count() or 1) // _WORKERS)
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook  # noqa: E402

# Every annotated tensor shape of the package is checked by beartype while the tests run.
install_import_hook("sgworkbench", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(_THREADS)
