"""Peak resident memory of a block of code; needs nothing but psutil, so that every environment can import it."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading

import psutil


class PeakMemory:
    """Resident memory above the level at entry, sampled every two milliseconds."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        # Freed memory stays with the allocator, where the next contestant would find it for nothing.
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._process = psutil.Process()
        self._base = self.peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def mib(self) -> float:
        """The peak in MiB."""
        return (self.peak - self._base) / 2**20
