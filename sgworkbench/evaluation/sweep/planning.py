"""The order of the work: cells that can be run side by side form chunks, and chunks are dealt out by their cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.sweep.cells import Cell
from sgworkbench.evaluation.sweep.engine import CHUNK


@dataclass(frozen=True)
class Chunk:
    """Cells that are screened side by side.

    Attributes:
        condition: their safety prompt.
        cells: their indices.
        point: number of blocks that they leave unsteered, and so are not run again.
        general: whether they take the general path.
        cost: blocks run, summed over cells, as a share of full forward passes.
    """

    condition: str
    cells: tuple[int, ...]
    point: int
    general: bool
    cost: float


def plan(cells: Sequence[Cell], n_layers: int) -> list[Chunk]:
    """Return the chunks of a grid, in the order in which the unsteered stream of each condition passes them.

    The plan depends on the whole grid and on nothing else, so that an interrupted run, a shard and another machine
    batch the same cells together and get the same numbers.
    """
    groups: dict[tuple[int, bool, int, str], list[int]] = {}
    order = {condition: i for i, condition in enumerate(dict.fromkeys(cell.condition for cell in cells))}
    for index, cell in enumerate(cells):
        general = cell.gate is not None and cell.gate.decided != "prompt"
        gate = "" if cell.gate is None else repr(cell.gate)
        key = (order[cell.condition], general, _point(cell), gate)
        groups.setdefault(key, []).append(index)
    chunks = []
    for (_, general, point, _), members in sorted(groups.items(), key=lambda item: item[0]):
        for start in range(0, len(members), CHUNK):
            part = tuple(members[start : start + CHUNK])
            share = 1.0 if general else (n_layers - point) / n_layers
            # A cell that runs no block still unembeds a token for every prompt.
            chunks.append(Chunk(cells[part[0]].condition, part, point, general, len(part) * (share + 1 / n_layers)))
    return chunks


def _point(cell: Cell) -> int:
    return 0 if not cell.is_steered else min(cell.layers) + (cell.protocol == "same-site")


def share_of(chunks: Sequence[Chunk], shard: tuple[int, int] | None) -> list[Chunk]:
    """Return the chunks of shard i of n, in their order: the costliest first go to the shard with the least so far.

    Raises:
        WorkbenchError: not 1 <= i <= n.
    """
    if shard is None:
        return list(chunks)
    number, total = shard
    if not 1 <= number <= total:
        raise WorkbenchError(f"A shard is written i/n with 1 <= i <= n, found {number}/{total}.")
    loads = [0.0] * total
    mine = []
    for index in sorted(range(len(chunks)), key=lambda i: (-chunks[i].cost, i)):
        lightest = loads.index(min(loads))
        loads[lightest] += chunks[index].cost
        if lightest == number - 1:
            mine.append(index)
    return [chunks[index] for index in sorted(mine)]
