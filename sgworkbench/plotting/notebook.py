"""Showing figures in notebooks so that they also show where nothing runs."""

from __future__ import annotations

import base64
import json
from typing import Any

import plotly.graph_objects as go

from sgworkbench.plotting import browser


def show(figure: go.Figure, *, width: int = 960) -> None:
    """Display a figure interactively, with a static image stored beside it where a browser is found.

    Both are alternatives of one output: JupyterLab, Notebook 7 and VS Code draw the interactive one with the plotly
    they ship, offline; pages that only show stored outputs use the image.
    """
    from IPython.display import display

    bundle: dict[str, Any] = {"application/vnd.plotly.v1+json": json.loads(figure.to_json())}
    if browser.unavailable() is None:
        image = browser.render(figure, "png", width=width, scale=1)
        if isinstance(image, bytes):
            bundle["image/png"] = base64.b64encode(image).decode()
    display(bundle, raw=True)
