"""The drawing half of the panel: one widget that shows what it is sent and remembers it only in Python."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

import plotly.graph_objects as go

from sgworkbench.errors import WorkbenchError


def require_widgets() -> None:
    """Say what to install when the notebook extra is missing.

    Raises:
        WorkbenchError: ipywidgets or anywidget is not installed.
    """
    missing = [name for name in ("ipywidgets", "anywidget") if importlib.util.find_spec(name) is None]
    if missing:
        raise WorkbenchError(
            f"The explorer needs {' and '.join(missing)}, which this Python lacks; run: pip install "
            "'sgworkbench[notebook]' and reload the notebook page."
        )


@cache
def _widget_class() -> Any:
    anywidget = importlib.import_module("anywidget")
    files = resources.files("sgworkbench.explorer")
    parts = {
        name: files.joinpath(file).read_text(encoding="utf-8")
        for name, file in (("_esm", "view.js"), ("_css", "view.css"))
    }
    return type("ExplorerView", (anywidget.AnyWidget,), parts)


@cache
def _packed_plotly() -> bytes:
    from plotly.offline import get_plotlyjs

    return gzip.compress(get_plotlyjs().encode())


class View:
    """Sections of HTML, figures and completions, sent as custom messages.

    Messages are no widget state: a saved notebook holds neither figures nor completions. What a page that opens later
    needs is kept here, newest message of every place only.

    Attributes:
        widget: what is displayed.
        shown: the newest message of every place, by kind and name.
        theme: "light" or "dark", as the page reports it.
    """

    def __init__(self, received: Callable[[Mapping[str, Any]], None]) -> None:
        """Make an empty view.

        Args:
            received: called with the page's messages: a clicked `cell` or `layer`, and `theme` after it changed.
        """
        self.widget = _widget_class()()
        self.shown: dict[tuple[str, str], dict[str, Any]] = {}
        self.theme = "light"
        self._received = received
        self.widget.on_msg(self._on_message)

    def html(self, name: str, text: str) -> None:
        """Fill a section."""
        self._put({"kind": "html", "name": name, "html": text})

    def title(self, name: str, text: str) -> None:
        """Set the heading of a section, as HTML."""
        self._put({"kind": "title", "name": name, "html": text})

    def figure(self, name: str, figure: go.Figure | None) -> None:
        """Draw a figure, or clear its place."""
        self._put({"kind": "figure", "name": name, "figure": None if figure is None else json.loads(figure.to_json())})

    def answer(self, arm: str, heading: str, state: str, text: str | None) -> None:
        """Show an arm's completion so far; a text of None says that it is hidden."""
        self._put({"kind": "answer", "name": arm, "arm": arm, "heading": heading, "state": state, "text": text})

    def copy(self, text: str) -> None:
        """Put a text into the clipboard of the page, where the browser allows it."""
        self.widget.send({"kind": "copy", "text": text})

    def _put(self, message: dict[str, Any]) -> None:
        self.shown[(message["kind"], message["name"])] = message
        self.widget.send(message)

    def _on_message(self, _widget: Any, content: Mapping[str, Any], _buffers: Any) -> None:
        kind = content.get("kind")
        if kind in ("ready", "theme"):
            before, self.theme = self.theme, "dark" if content.get("theme") == "dark" else "light"
            if kind == "ready":
                if content.get("plotly"):
                    self.widget.send({"kind": "plotly"}, [_packed_plotly()])
                for message in list(self.shown.values()):
                    self.widget.send(message)
            if before != self.theme:
                self._received({"kind": "theme"})
            return
        self._received(content)
