"""Prompt sets: instructions with their labels, categories and splits, under one content hash."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args, overload

import pandas as pd

from sgworkbench.errors import WorkbenchError, require_type, unknown_name

Label = Literal["harmful", "harmless", "unlabelled"]
Split = Literal["train", "validation", "test", "unsplit"]
LABELS: tuple[Label, ...] = get_args(Label)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Prompt:
    """One instruction as a user would type it, without any safety prompt around it.

    Attributes:
        text: the instruction.
        id: unique within its set.
        label: harmful, harmless or unlabelled.
        category: topic, or an empty string.
        pair: id shared by a harmful request and its harmless look-alike, or an empty string.
        split: train, validation, test or unsplit.
    """

    text: str
    id: str
    label: Label = "unlabelled"
    category: str = ""
    pair: str = ""
    split: Split = "unsplit"


@dataclass(frozen=True)
class PromptSet:
    """A named, ordered, immutable collection of prompts.

    Iterating gives `Prompt` objects; `texts` gives the instructions alone.
    """

    name: str
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise WorkbenchError(f"The prompt set {self.name!r} is empty; at least one prompt is needed.")
        seen: set[str] = set()
        for prompt in self.prompts:
            require_type(prompt, Prompt, "Prompt objects", "wrap plain texts with PromptSet.from_texts([...])")
            if not prompt.text.strip():
                raise WorkbenchError(f"Prompt {prompt.id!r} of {self.name!r} has no text.")
            if any("\ud800" <= character <= "\udfff" for character in prompt.text):
                raise WorkbenchError(
                    f"Prompt {prompt.id!r} of {self.name!r} holds half a surrogate pair, which is not a character; "
                    "write the text as UTF-8."
                )
            if prompt.id in seen:
                raise WorkbenchError(f"The prompt id {prompt.id!r} occurs twice in {self.name!r}; ids must differ.")
            seen.add(prompt.id)

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, name: str = "prompts", label: Label = "unlabelled") -> PromptSet:
        """Wrap plain strings; ids are 0-based positions.

        Raises:
            WorkbenchError: no texts, an empty text, or a single string where a list was expected.
        """
        if isinstance(texts, str):
            raise WorkbenchError("Expected a list of prompts, found one string; put it into a list.")
        require_type(texts, Iterable, "a list of prompts", "files are read with load_prompts(...)")
        prompts = []
        for index, text in enumerate(texts):
            require_type(text, str, f"text as prompt {index}", "give the instructions as strings")
            prompts.append(Prompt(text, str(index)))
        return cls(name, tuple(prompts)).labelled(label)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...

    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        if isinstance(index, slice):
            return PromptSet(self.name, self.prompts[index])
        return self.prompts[index]

    @property
    def texts(self) -> list[str]:
        """The instructions, in order."""
        return [prompt.text for prompt in self.prompts]

    @property
    def content_hash(self) -> str:
        """SHA-256 over every field of every prompt in order; the set's name does not count."""
        rows = [[p.text, p.id, p.label, p.category, p.pair, p.split] for p in self.prompts]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def harmful(self) -> PromptSet:
        """The prompts labelled harmful."""
        return self._where(lambda p: p.label == "harmful", "harmful")

    @property
    def harmless(self) -> PromptSet:
        """The prompts labelled harmless."""
        return self._where(lambda p: p.label == "harmless", "harmless")

    def split(self, split: str) -> PromptSet:
        """Return the prompts of one split.

        Raises:
            WorkbenchError: unknown split name, or no prompt of this set is in it.
        """
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        return self._where(lambda p: p.split == split, split)

    def has_split(self, split: Split) -> bool:
        """Whether any prompt belongs to `split`."""
        return any(prompt.split == split for prompt in self.prompts)

    def labelled(self, label: Label) -> PromptSet:
        """Return the same prompts, all with one label.

        Raises:
            WorkbenchError: unknown label.
        """
        if label not in LABELS:
            raise unknown_name("label", str(label), LABELS)
        return PromptSet(self.name, tuple(replace(p, label=label) for p in self.prompts))

    def sample(self, count: int, *, seed: int = 0) -> PromptSet:
        """Return `count` prompts chosen by a hash of seed and pair (or text), in their original order.

        The choice is spread evenly over categories, and depends on neither the platform nor the set's order. Pairs stay
        together (an odd count splits one), and a set and its look-alikes sampled with one seed hold the same pairs.
        """
        if count >= len(self):
            return self
        if count < 1:
            raise WorkbenchError(f"A sample needs at least one prompt, found a request for {count}.")
        units: dict[str, list[Prompt]] = {}
        for prompt in sorted(self.prompts, key=lambda prompt: prompt.id):
            units.setdefault(prompt.pair or prompt.text, []).append(prompt)
        shuffled = sorted(units, key=lambda unit: hashlib.sha256(f"{seed}:{unit}".encode()).hexdigest())
        # Round robin over categories keeps a small sample as broad as the set it stands for.
        seen: Counter[str] = Counter()
        ranked: list[tuple[int, str]] = []
        for unit in shuffled:
            category = units[unit][0].category
            ranked.append((seen[category], unit))
            seen[category] += 1
        order = [prompt.id for _, unit in sorted(ranked, key=lambda item: item[0]) for prompt in units[unit]]
        chosen = set(order[:count])
        return self._where(lambda p: p.id in chosen, f"sample of {count}")

    def with_split(self, *, train: float = 0.5, validation: float = 0.0, seed: int = 0) -> PromptSet:
        """Assign splits by a hash of seed and pair (or text), so that pairs stay together and order does not matter.

        Args:
            train: share of train items.
            validation: share of validation items; the rest is test.
            seed: changes the assignment.

        Raises:
            WorkbenchError: shares that leave no test items, or too few prompts for the splits asked for.
        """
        if not (0 < train < 1 and 0 <= validation < 1 and train + validation < 1):
            raise WorkbenchError(
                f"Split shares must be positive and leave room for test; found train={train}, validation={validation}."
            )
        keys = {p.pair or p.text for p in self.prompts}
        ordered = sorted(keys, key=lambda k: hashlib.sha256(f"{seed}:{k}".encode()).hexdigest())
        n_train = max(1, round(train * len(ordered)))
        n_validation = max(1, round(validation * len(ordered))) if validation else 0
        if len(ordered) < n_train + n_validation + 1:
            raise WorkbenchError(
                f"{self.name!r} has {len(ordered)} distinct prompts or pairs, too few to split into "
                f"train{', validation' if validation else ''} and test; at least {3 if validation else 2} are needed."
            )
        assigned: dict[str, Split] = {}
        for rank, item in enumerate(ordered):
            assigned[item] = "train" if rank < n_train else "validation" if rank < n_train + n_validation else "test"
        return PromptSet(self.name, tuple(replace(p, split=assigned[p.pair or p.text]) for p in self.prompts))

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per prompt: id, label, category, pair, split, text."""
        columns = ["id", "label", "category", "pair", "split", "text"]
        return pd.DataFrame([{c: getattr(p, c) for c in columns} for p in self.prompts], columns=columns)

    def summary(self) -> dict[str, str | int]:
        """Return name, size and content hash, as manifests record them."""
        return {"name": self.name, "n": len(self), "sha256": self.content_hash}

    def _where(self, keep: Callable[[Prompt], bool], what: str) -> PromptSet:
        kept = tuple(prompt for prompt in self.prompts if keep(prompt))
        if not kept:
            labels, splits = (
                ", ".join(sorted({getattr(p, part) for p in self.prompts})) for part in ("label", "split")
            )
            raise WorkbenchError(
                f"No prompt of {self.name!r} is marked {what}: its {len(self)} prompts are labelled {labels} and in "
                f"split {splits}; use labelled(...) or with_split() if they should be."
            )
        return PromptSet(f"{self.name}/{what}", kept)

    def __repr__(self) -> str:
        return f"PromptSet({self.name!r}, n={len(self)}, sha256={self.content_hash[:12]})"

    def _repr_html_(self) -> str:
        from sgworkbench.prompting.inspection import prompt_set_html

        return prompt_set_html(self)


def concatenate(name: str, sets: Sequence[PromptSet]) -> PromptSet:
    """Join prompt sets in order; ids are prefixed with their set's position when they would collide."""
    ids = [prompt.id for prompt_set in sets for prompt in prompt_set]
    if len(set(ids)) == len(ids):
        return PromptSet(name, tuple(prompt for prompt_set in sets for prompt in prompt_set))
    return PromptSet(
        name,
        tuple(
            replace(prompt, id=f"{index}:{prompt.id}") for index, prompt_set in enumerate(sets) for prompt in prompt_set
        ),
    )
