"""The one headless browser that turns figures into images.

kaleido's own background server waits for ever when its browser cannot start. Here the browser lives on an event
loop in a thread of its own, every wait has an end, and a failure is a sentence instead of an exception, because a
missing image never stops an analysis.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import importlib.util
import logging
import os
import signal
import subprocess
import threading
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

START_SECONDS = 60.0
RENDER_SECONDS = 60.0
CLOSE_SECONDS = 10.0

_lock = threading.Lock()
_running: _Browser | None = None
# Programs that did not start, with the sentence that says so: their long wait is not repeated for every figure.
_failed: dict[str, str] = {}


def find_browser() -> Path | None:
    """The Chrome or Chromium that images would be made with, or None.

    BROWSER_PATH decides when it is set; then a browser downloaded by ``plotly_get_chrome``, then the usual names
    and places of Chrome, Chromium, Edge and Brave.
    """
    named = os.environ.get("BROWSER_PATH")
    if named:
        return Path(named) if os.access(named, os.X_OK) and Path(named).is_file() else None
    chromium = importlib.import_module("choreographer.browsers.chromium")
    found = chromium.Chromium.find_browser(skip_local=False)
    return Path(found) if found else None


def unavailable() -> str | None:
    """Why static images cannot be made here, as a sentence; None when they can."""
    if importlib.util.find_spec("kaleido") is None:
        return "the package kaleido is not installed; run: pip install 'sgworkbench[images]'"
    if find_browser() is None:
        named = os.environ.get("BROWSER_PATH")
        if named:
            return f"BROWSER_PATH names {named}, which is not a program; correct it or unset it"
        return "no Chrome or Chromium was found; install one (Debian: apt-get install chromium) or set BROWSER_PATH"
    return None


def render(figure: go.Figure, image_format: str, *, width: float | int, scale: float | int) -> bytes | str:
    """The figure as bytes of ``image_format`` ("png", "svg", "pdf"), or a sentence that says why not.

    Args:
        figure: figure to draw; its own height is kept (450 pixels where it has none).
        image_format: any format of kaleido.
        width: width in pixels.
        scale: pixels of the image per pixel of the figure.
    """
    missing = unavailable()
    if missing is not None:
        return missing
    options = {"format": image_format, "width": width, "height": figure.layout.height or 450, "scale": scale}
    with _lock:
        reused = _running is not None
        image = _draw(figure.to_dict(), options)
        # A browser that served earlier figures may have died since: then, and only then, a fresh one is tried.
        return _draw(figure.to_dict(), options) if reused and isinstance(image, str) else image


def close() -> None:
    """Close the browser, if one runs; the next image starts a new one."""
    with _lock:
        _stop_running()
        _failed.clear()


def _draw(figure: dict[str, Any], options: dict[str, Any]) -> bytes | str:
    global _running
    path = str(find_browser())
    if path in _failed:
        return _failed[path]
    if _running is None:
        try:
            _running = _Browser(path)
        except Exception as error:  # whatever a foreign program does at its start
            _failed[path] = f"the browser {path} did not start ({_reason(error)})"
            return _failed[path]
    try:
        return _running.draw(figure, options)
    except Exception as error:
        _stop_running()
        return f"the browser could not draw it ({_reason(error)})"


def _stop_running() -> None:
    global _running
    if _running is not None:
        _running.stop()
        _running = None


def _reason(error: Exception) -> str:
    told = error.args[0] if error.args else ""
    text = " ".join(str(told[0] if isinstance(told, tuple) and told else told).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class _Browser:
    """A kaleido instance on an event loop of its own, so that it also works inside a notebook's running loop."""

    def __init__(self, path: str) -> None:
        kaleido = importlib.import_module("kaleido")
        # Its start and its shutdown are told at warning level; what matters here comes back as an exception.
        for name in ("kaleido", "choreographer"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._loop = asyncio.new_event_loop()
        # Futures that nobody waits for any more would print their tracebacks; the wait that failed has told already.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._thread = threading.Thread(target=self._loop.run_forever, name="figure browser", daemon=True)
        self._thread.start()
        self._kaleido: Any = None
        try:
            # mathjax=False: the default is fetched from a server, and no figure here uses it.
            self._kaleido = kaleido.Kaleido(path=path, n=1, timeout=RENDER_SECONDS, mathjax=False)
            self._wait(self._kaleido.open(), START_SECONDS)
        except BaseException:
            self.stop()
            raise

    def draw(self, figure: dict[str, Any], options: dict[str, Any]) -> bytes:
        """Render one figure; waits for at most `RENDER_SECONDS`, with some room for passing it on."""
        image: bytes = self._wait(self._kaleido.calc_fig(figure, opts=options), RENDER_SECONDS + 15)
        return image

    def stop(self) -> None:
        """Close the browser and end the thread; never raises, and leaves no process behind."""
        if self._kaleido is not None:
            with contextlib.suppress(Exception):
                self._wait(self._kaleido.close(), CLOSE_SECONDS)
            process = getattr(self._kaleido, "subprocess", None)
            if process is not None and process.poll() is None:
                _kill(process)
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()

    def _wait(self, coroutine: Any, seconds: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(seconds)
        except FutureTimeoutError as error:
            future.cancel()
            raise TimeoutError(f"no answer within {seconds:g} seconds") from error


async def _cancel_others() -> None:
    """Cancel what a failed browser left waiting on its loop, and let it end."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=3)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a browser that does not answer, with the processes it started (it leads a session of its own)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


atexit.register(close)
