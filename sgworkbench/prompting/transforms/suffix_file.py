"""Suffixes that others optimised (GCG) and rewritten prompts (PAIR, TAP), read from files as data.

A .txt file holds one suffix per line. A .jsonl, .json, .csv, .tsv, .yaml or .parquet file holds rows with a `suffix`,
or, for whole rewritten prompts, an `attack`; a row that also has an `id`, or a `goal` (the request, word for word),
belongs to that prompt alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from sgworkbench.errors import WorkbenchError
from sgworkbench.prompting.prompt_files import read_rows
from sgworkbench.prompting.prompt_set import Prompt, PromptSet
from sgworkbench.prompting.transforms.base import PromptTransform, register_transform

_SUFFIX_FIELDS = ("suffix", "adv_suffix", "control", "text")
_ATTACK_FIELDS = ("attack", "jailbreak", "adv_prompt")
_ID_FIELDS = ("id", "prompt_id", "item")
_GOAL_FIELDS = ("goal", "request", "behavior", "instruction")


@dataclass(frozen=True)
class _Row:
    text: str
    replaces: bool
    id: str
    goal: str


@register_transform
class SuffixFile(PromptTransform):
    """The request followed by a suffix from a file, or replaced by its rewritten form.

    Parameters: `path`; `choose` ("all": one prompt per suffix; "first"; "cycle": suffixes in turn; for suffixes that
    belong to no prompt); `separator` between request and suffix.
    """

    name: ClassVar[str] = "suffix-file"
    family: ClassVar[str] = "suffix file"

    path: str
    choose: Literal["all", "first", "cycle"] = "all"
    separator: str = " "

    @property
    def label(self) -> str:
        """Name and file."""
        return f"{self.name}-{Path(self.path).stem}"

    @cached_property
    def rows(self) -> tuple[_Row, ...]:
        """What the file holds.

        Raises:
            WorkbenchError: no such file, an unknown ending, broken or empty, or a row without suffix and attack.
        """
        found = tuple(_row(self.path, where, row) for where, row in read_rows(self.path))
        if not found:
            raise WorkbenchError(f"The suffix file {self.path!r} is empty; expected one suffix per line or row.")
        owned = sum(bool(row.id or row.goal) for row in found)
        if owned not in (0, len(found)):
            raise WorkbenchError(
                f"{self.path!r}: {owned} of {len(found)} rows name the prompt they belong to; expected all or none."
            )
        return found

    @property
    def per_prompt(self) -> bool:
        """Whether every row belongs to one prompt."""
        return bool(self.rows[0].id or self.rows[0].goal)

    def apply(self, prompts: PromptSet) -> PromptSet:
        """Return the prompts with their suffixes; one prompt may become several, numbered from 0.

        Raises:
            WorkbenchError: the file's rows belong to prompts and some prompt has none.
        """
        made: list[Prompt] = []
        lacking: list[str] = []
        for position, prompt in enumerate(prompts):
            rows = self._rows_for(prompt, position)
            if not rows:
                lacking.append(prompt.id)
            for number, row in enumerate(rows):
                text = row.text if row.replaces else f"{prompt.text}{self.separator}{row.text}"
                ending = f"-{number}" if len(rows) > 1 else ""
                made.append(replace(prompt, text=text, id=f"{prompt.id}+{self.label}{ending}"))
        if lacking:
            raise WorkbenchError(
                f"{self.path!r} has no row for {len(lacking)} of {len(prompts)} prompts (the first is {lacking[0]!r}); "
                f"add them, or leave those prompts out."
            )
        return PromptSet(f"{prompts.name}+{self.label}", tuple(made))

    def rewrite(self, prompt: Prompt, prompts: PromptSet) -> str:
        """Return the first text `apply` would make of one prompt."""
        return self.apply(PromptSet(prompts.name, (prompt,))).prompts[0].text

    def _rows_for(self, prompt: Prompt, position: int) -> tuple[_Row, ...]:
        if self.per_prompt:
            # The id a prompt had before any transform names it too.
            ids = {prompt.id, prompt.id.partition("+")[0]}
            return tuple(r for r in self.rows if (r.id in ids if r.id else r.goal.strip() == prompt.text.strip()))
        if self.choose == "all":
            return self.rows
        return (self.rows[0 if self.choose == "first" else position % len(self.rows)],)


def _row(path: str, where: str, row: Mapping[str, Any]) -> _Row:
    attack, suffix = _first(row, _ATTACK_FIELDS), _first(row, _SUFFIX_FIELDS)
    if not attack and not suffix:
        found = ", ".join(map(str, row)) or "no fields"
        raise WorkbenchError(f"{path!r}, {where}: expected a suffix or an attack, found {found}.")
    return _Row(attack or suffix, bool(attack), _first(row, _ID_FIELDS), _first(row, _GOAL_FIELDS))


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        value = row.get(name)
        if value is not None and str(value).strip():
            return str(value)
    return ""
