"""Which instruction tokens of two conditions are the same token.

Two renderings of one instruction differ around it, and sometimes at its edges, where a tokenizer merges a character of
the instruction with one of the safety prompt. Tokens are matched by their character range within the instruction and
by id; what does not match is excluded and counted, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgworkbench.errors import WorkbenchError
from sgworkbench.prompting.rendering import RenderedPrompt


@dataclass(frozen=True)
class Alignment:
    """Matched instruction tokens of two renderings of one instruction.

    Attributes:
        first: token indices in the first rendering.
        second: token indices in the second rendering, one to one with `first`.
        excluded_first: instruction tokens of the first rendering without a partner.
        excluded_second: instruction tokens of the second rendering without a partner.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    excluded_first: tuple[int, ...]
    excluded_second: tuple[int, ...]

    @property
    def n_excluded(self) -> int:
        """How many instruction tokens, over both renderings, have no partner."""
        return len(self.excluded_first) + len(self.excluded_second)


def align(first: RenderedPrompt, second: RenderedPrompt) -> Alignment:
    """Match the instruction tokens of two renderings.

    Raises:
        WorkbenchError: the renderings hold different instructions, or no token matches.
    """
    if first.prompt.text != second.prompt.text:
        raise WorkbenchError(
            "Only two renderings of the same instruction can be aligned; found "
            f"{first.prompt.text[:40]!r} and {second.prompt.text[:40]!r}."
        )

    def keyed(rendered: RenderedPrompt) -> dict[tuple[int, int, int, int], int]:
        keys: dict[tuple[int, int, int, int], int] = {}
        for position in rendered.positions_of("instruction"):
            start, end = rendered.offsets[position]
            origin = rendered.instruction_start
            # Byte-level tokens of one character share its range: the running count keeps them apart, in order.
            repeat = 0
            base = (start - origin, end - origin, rendered.token_ids[position])
            while (*base, repeat) in keys:
                repeat += 1
            keys[(*base, repeat)] = position
        return keys

    left, right = keyed(first), keyed(second)
    shared = [key for key in left if key in right]
    if not shared:
        raise WorkbenchError(
            f"No instruction token of conditions {first.condition.name!r} and {second.condition.name!r} matches; "
            "the tokenizer merges the instruction with its surroundings."
        )
    return Alignment(
        tuple(left[key] for key in shared),
        tuple(right[key] for key in shared),
        tuple(position for key, position in left.items() if key not in right),
        tuple(position for key, position in right.items() if key not in left),
    )
