"""Readable names for tokens: visible spaces and line ends, visible control characters, bounded length."""

from __future__ import annotations

import unicodedata

_VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}


def visible(token: str) -> str:
    """``token`` with every space, line end and invisible character shown; an empty token becomes "∅".

    Control and formatting characters (zero-width spaces, direction overrides) are written as ``\\u200b``, so that
    no token can hide itself or reorder the text around it.
    """
    if not token:
        return "∅"
    shown = []
    for character in token:
        if character in _VISIBLE:
            shown.append(_VISIBLE[character])
        elif unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp"):
            shown.append(f"\\u{ord(character):04x}")
        else:
            shown.append(character)
    return "".join(shown)


def shortened(label: str, length: int) -> str:
    """``label`` cut to at most ``length`` characters, the cut shown by an ellipsis."""
    return label if len(label) <= length else label[: length - 1] + "…"
