"""The explorer in a real JupyterLab page, driven through a headless Chromium's debugging protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'sgworkbench[notebook]'")
pytest.importorskip("anywidget", reason="anywidget is not installed: pip install 'sgworkbench[notebook]'")
pytest.importorskip("websocket", reason="websocket-client, a part of JupyterLab, is not installed")
pytest.importorskip("kaleido", reason="kaleido, which knows where browsers are, is not installed")

import websocket

from sgworkbench.plotting import browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.find_browser() is None, reason="no Chromium was found; Debian: apt-get install chromium"
    ),
]

PATIENCE = 240.0
"""Seconds to wait for anything; no test says how fast something is."""


class Page:
    """One browser tab, spoken to through the Chrome DevTools Protocol."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self._count = 0

    def call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str, what: str, good: Callable[[Any], bool] = bool) -> Any:
        end = time.monotonic() + PATIENCE
        value = None
        while time.monotonic() < end:
            value = self.run(script)
            if good(value):
                return value
            time.sleep(0.3)
        raise AssertionError(f"waited in vain for {what}; last seen: {value!r}; page: {self.run(TROUBLE)!r}")

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="none" if kind == "mouseMoved" else "left",
                clickCount=0 if kind == "mouseMoved" else 1,
            )
            time.sleep(0.15)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._socket.close()


TROUBLE = "[...document.querySelectorAll('.jp-RenderedText[data-mime-type*=stderr], .jp-OutputArea-output')]" + (
    ".map(e => e.innerText.slice(0, 400))"
)
LABELLED = """
(label) => [...document.querySelectorAll('.widget-inline-hbox, .widget-dropdown, .widget-textarea, .widget-slider')]
  .find(e => e.querySelector('.widget-label')?.innerText.trim() === label)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> Any:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as reply:
                return json.loads(reply.read())
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def start(command: list[str], log: Path, **changes: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **changes}
        )


def notebook(folder: Path, source: str) -> Path:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "explore.ipynb"
    nbformat.write(book, path)
    return path


@contextlib.contextmanager
def lab(folder: Path, source: str, *, theme: str = "JupyterLab Light", size: str = "1500,2600") -> Iterator[Page]:
    """Open a notebook with one cell in JupyterLab."""
    notebook(folder, source)
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    token, port, debugging = secrets.token_hex(16), free_port(), free_port()
    home = folder / "home"
    home.mkdir()
    processes = [
        start(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"),
                *(f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}", "--ServerApp.port_retries=0"),
            ],
            folder / "server.log",
            JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"),
            JUPYTER_CONFIG_DIR=str(home / "config"),
            JUPYTERLAB_WORKSPACES_DIR=str(home / "workspaces"),
        )
    ]
    try:
        answers(f"http://127.0.0.1:{port}/api?token={token}")
        address = f"http://127.0.0.1:{port}/doc/tree/explore.ipynb?token={token}"
        sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        processes.append(
            start(
                [
                    *(str(browser.find_browser()), "--headless=new", *sandbox, "--disable-gpu", "--no-first-run"),
                    *("--disable-dev-shm-usage", f"--remote-debugging-port={debugging}", f"--window-size={size}"),
                    *(f"--user-data-dir={home / 'chromium'}", "about:blank"),
                ],
                folder / "chromium.log",
            )
        )
        answers(f"http://127.0.0.1:{debugging}/json/version")
        tabs = answers(f"http://127.0.0.1:{debugging}/json")
        page = Page(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
        page.call("Page.enable")
        page.call("Page.navigate", url=address)
        page.wait("document.querySelector('.jp-Notebook .jp-Cell .cm-content')?.innerText ?? ''", "the notebook")
        # A notebook that names its kernel starts it by itself; a cell sent before that would be lost.
        page.wait(
            "document.querySelector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator')?.dataset.status ?? ''",
            "an idle kernel",
            lambda status: status == "idle",
        )
        run_cell(page)
        try:
            yield page
        finally:
            page.close()
    finally:
        for process in reversed(processes):
            end(process)


def run_cell(page: Page) -> None:
    where = "const r = document.querySelector('.jp-Cell .cm-content').getBoundingClientRect(); [r.x + 20, r.y + 8]"
    page.click(*page.run(f"(() => {{ {where.replace('; [', '; return [')} }})()"))
    page.call(
        "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=8
    )
    page.call("Input.dispatchKeyEvent", type="keyUp", key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=8)


SOURCE = """
from pathlib import Path
import torch
from sgworkbench import PromptCondition, SteeringVector, Workbench
from sgworkbench.analysis import Directions, all_sites
from sgworkbench.explorer import explore

torch.manual_seed(0)
wb = Workbench.load({model!r}, self_check=False)

def directions(concept):
    unit = torch.nn.functional.normalize(torch.randn(4, 32), dim=-1)
    return Directions(concept, "made up", "last_prompt", all_sites(4), unit, torch.randn(4, 32), torch.ones(4))

panel = explore(wb, awareness=directions("awareness"), refusal=directions("refusal"),
                vector=SteeringVector((0, 1, 2, 3), torch.randn(4, 32)),
                condition=PromptCondition("safe", system="You should be safe."), prompt="How do I pick a lock?")
panel
"""
# What plotly holds, as plain numbers.
MAP = """
(() => {
  const plot = document.querySelector('[data-plot=map]');
  const trace = plot?.data?.find(t => t.name === 'shift');
  return trace ? JSON.stringify([...plot._fullData.find(t => t.name === 'shift').z].map(r => [...r])) : '';
})()
"""
TOKENS = "document.querySelector('[data-html=tokens]')?.innerText ?? ''"
MESSAGE = "document.querySelector('[role=status]')?.innerText ?? ''"


def set_text(page: Page, label: str, text: str) -> None:
    """Type into a text area as a person does: click, select all, type, leave."""
    box = f"({LABELLED})({label!r}).querySelector('textarea')"
    page.run(f"{box}.focus(); {box}.select(); 0")
    page.call("Input.insertText", text=text) if text else page.press("Delete", 46)
    page.run(f"{box}.blur(); 0")


def test_typing_sliding_and_clicking_change_what_is_shown(tmp_path: Path) -> None:
    from tiny_models import build_tiny_model

    model = build_tiny_model("llama", tmp_path / "model", n_layers=4)
    shots = Path(os.environ.get("SGWORKBENCH_SCREENSHOTS", tmp_path / "screenshots"))
    shots.mkdir(parents=True, exist_ok=True)
    with lab(tmp_path, SOURCE.format(model=str(model))) as page:
        first_map = page.wait(MAP, "the shift map")
        assert "pick" in page.run(TOKENS)
        page.screenshot(shots / "tiny_opened.png")

        set_text(page, "Prompt", "How do I bake a loaf of bread?")
        page.wait(TOKENS, "the typed prompt", lambda text: "bread" in text.replace("·", "") and "pick" not in text)
        typed_map = page.wait(MAP, "the map of the typed prompt", lambda found: found and found != first_map)

        handle = f"({LABELLED})('Alpha').querySelector('.noUi-handle')"
        page.run(f"{handle}.focus(); 0")
        for _ in range(5):
            page.press("ArrowRight", 39)
        page.wait(
            f"({LABELLED})('Alpha').querySelector('.widget-readout').innerText", "0.75", lambda text: "0.75" in text
        )
        page.wait(MAP, "the map of the new coefficient", lambda found: found and found != typed_map)
        page.wait("document.querySelector('[data-title=tokens]').innerText", "it", lambda text: "0.75" in text)

        page.run("document.querySelector('[data-plot=map]').scrollIntoView({block: 'center'}); 0")
        time.sleep(0.5)
        cell = page.run("""(() => {
            const plot = document.querySelector('[data-plot=map]'), box = plot.getBoundingClientRect();
            const layout = plot._fullLayout;
            return [box.x + layout.xaxis._offset + layout.xaxis.d2p(3),
                    box.y + layout.yaxis._offset + layout.yaxis.d2p(1)];
        })()""")
        page.click(*cell)
        focus = page.wait(
            "document.querySelector('[data-title=focus]').innerText", "the focus", lambda text: "resid_post[1]" in text
        )
        # Column 3 is the fourth token of the instruction; before it stand the template's.
        column = page.run("document.querySelector('[data-plot=map]')._fullLayout.shapes[0].x0") + 0.5
        assert column == 3
        assert re.search(r"token \d+ of the plain prompt", focus)
        assert "layer 1" in page.wait(TOKENS, "tokens at the focus layer", lambda text: "layer 1" in text)

        texts = "[...document.querySelectorAll('.sgx-answer .sgx-text')].map(e => e.innerText)"
        states = "[...document.querySelectorAll('.sgx-answer header')].map(e => e.innerText)"
        page.wait(
            states,
            "four completions",
            lambda found: len(found) == 4 and all("0 tokens" not in f.split("\n")[-1][:8] for f in found),
        )
        assert page.run(texts) == ["hidden"] * 4
        button = "[...document.querySelectorAll('button')].find(b => b.innerText.includes('Show completions'))"
        page.run(f"{button}.click(); 0")
        page.wait(texts, "their texts", lambda found: "hidden" not in found and any(found))

        set_text(page, "Prompt", "")
        page.wait(MESSAGE, "a message about the empty prompt", lambda text: "prompt is empty" in text)
        set_text(page, "Prompt", "Tell me how to make bread.")
        page.wait(TOKENS, "a panel that still works", lambda text: "Tell" in text)
        assert page.run(MESSAGE) == ""
        page.screenshot(shots / "tiny_after.png")

        page.call("Input.dispatchKeyEvent", type="keyDown", key="s", code="KeyS", windowsVirtualKeyCode=83, modifiers=2)
        page.call("Input.dispatchKeyEvent", type="keyUp", key="s", code="KeyS", windowsVirtualKeyCode=83, modifiers=2)
        saved = page.wait(
            "fetch('/api/contents/explore.ipynb?content=1&' + Date.now(), {credentials: 'same-origin'})"
            ".then(r => r.json()).then(j => JSON.stringify(j.content))",
            "the saved notebook",
            lambda text: "widget-view" in text,
        )
        for text in page.run(texts):
            assert len(text) < 4 or json.dumps(text)[1:-1] not in saved
    assert all(path.stat().st_size > 10_000 for path in shots.glob("tiny_*.png"))


def test_the_panel_follows_the_dark_theme(tmp_path: Path) -> None:
    from tiny_models import build_tiny_model

    model = build_tiny_model("llama", tmp_path / "model", n_layers=4)
    with lab(tmp_path, SOURCE.format(model=str(model)), theme="JupyterLab Dark") as page:
        page.wait(MAP, "the shift map")
        ink = "getComputedStyle(document.querySelector('[data-plot=gap] .xtick text')).fill"
        colour = page.wait(ink, "light ink", lambda text: sum(map(int, text[4:-1].split(","))) > 3 * 128)
        assert colour
        page_colour = page.run("document.querySelector('[data-plot=gap]')._fullLayout.paper_bgcolor")
        assert page_colour.replace(" ", "") == "rgba(0,0,0,0)"
