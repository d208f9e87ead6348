"""One exception for every mistake a user can make, so that the command line can print it as a sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorkbenchError(Exception):
    """Bad input: the message says what was expected, what was found and what to do next.

    The command line prints the message alone and exits with status 2; in Python it is an ordinary exception.
    """


def require_type(value: object, kind: type | tuple[type, ...], expected: str, advice: str) -> None:
    """Refuse a value of another type with a sentence.

    Args:
        value: what the user passed.
        kind: the types accepted.
        expected: the accepted types in words ("a PromptSet").
        advice: what to do instead, without a full stop.

    Raises:
        WorkbenchError: the value is of none of the types.
    """
    if not isinstance(value, kind):
        raise WorkbenchError(f"Expected {expected}, found {type(value).__name__}; {advice}.")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> WorkbenchError:
    """Build the error for a name that is not on a list, with the nearest known name as a suggestion.

    Args:
        kind: what the name stands for, in the singular ("preset", "protocol").
        name: what the user wrote.
        known: every name that would have been accepted.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return WorkbenchError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(choices)}.")
