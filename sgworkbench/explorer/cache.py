"""Results by their key, the ones least recently asked for dropped first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

from sgworkbench.errors import WorkbenchError

Value = TypeVar("Value")


class ResultCache:
    """A bounded store of results that cost a forward pass or more.

    Attributes:
        hits: how often a result was there.
        misses: how often it had to be made.
    """

    def __init__(self, capacity: int = 64) -> None:
        """Make an empty store.

        Args:
            capacity: number of results kept.

        Raises:
            WorkbenchError: a capacity below 1.
        """
        if capacity < 1:
            raise WorkbenchError(f"A cache holds at least one result, found a capacity of {capacity}.")
        self._capacity = capacity
        self._kept: OrderedDict[Hashable, object] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the result of `key`, made by `make` when it is not there; a failure is not kept."""
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]  # type: ignore[return-value]
        self.misses += 1
        value = make()
        self.put(key, value)
        return value

    def put(self, key: Hashable, value: object) -> None:
        """Keep a result, and drop the oldest one when there are too many."""
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
