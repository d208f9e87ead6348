"""Code in a completion: found with or without its fence, and whether it is Python at all. It is never executed.

HumanEval falls under safety prompting mostly because answers lose their code fence, so with and without are counted
apart. Whether the code passes its tests is outside this tool: nothing a model has written is run here.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass

_FENCE = re.compile(
    r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*[\w+#.-]*[ \t]*\n(?P<code>.*?)(?:^[ \t]*(?P=mark)[ \t]*$|\Z)", re.M | re.S
)
_OPENING = re.compile(r"^(?:def |async def |class |import |from \w|@\w)")
_GOES_ON = re.compile(r"^(?:\s|def |async def |class |import |from \w|@\w|#|\)|\]|\}|[A-Z_]+\s*=|$)")
_LONGEST = 50_000


@dataclass(frozen=True)
class CodeAnswer:
    """Code found in a completion.

    Attributes:
        code: the code, or None.
        fenced: whether it stood in a code fence.
        parses: whether it is valid Python.
        defines: whether it defines the function that was asked for, at the top level.
    """

    code: str | None
    fenced: bool
    parses: bool
    defines: bool


def find_code(text: str, entry_point: str) -> CodeAnswer:
    """Find the code of an answer: the first fence that defines the function, else the first fence, else bare lines.

    Bare code begins at the first line that opens a definition or an import and ends before the first line that cannot
    belong to it.
    """
    fences = [match["code"] for match in _FENCE.finditer(text)]
    candidates = [(code, *_parsed(code, entry_point)) for code in fences]
    if candidates:
        code, parses, defines = next((each for each in candidates if each[2]), candidates[0])
        return CodeAnswer(code, True, parses, defines)
    bare = _bare_code(text)
    if bare is None:
        return CodeAnswer(None, False, False, False)
    return CodeAnswer(bare, False, *_parsed(bare, entry_point))


def _bare_code(text: str) -> str | None:
    lines = text.splitlines()
    first = next((index for index, line in enumerate(lines) if _OPENING.match(line)), None)
    if first is None:
        return None
    last = next((index for index in range(first, len(lines)) if not _GOES_ON.match(lines[index])), len(lines))
    return "\n".join(lines[first:last]).rstrip() + "\n"


def _parsed(code: str, entry_point: str) -> tuple[bool, bool]:
    """Return whether code parses, and whether it defines the function at the top level."""
    if len(code) > _LONGEST:
        return False, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False, False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return bool(tree.body), any(isinstance(node, kinds) and node.name == entry_point for node in tree.body)
