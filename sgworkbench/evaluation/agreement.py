"""How well two judges agree, or a judge and a labelled file.

Items that either side could not judge are left out of kappa and counted; a high kappa on half of the items is not
agreement on all of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import pandas as pd

from sgworkbench.errors import WorkbenchError
from sgworkbench.statistics import Kappa, Rate, cohen_kappa, rate

# Labels of well-known files, in the words of our verdicts.
LABEL_WORDS: dict[str, str] = {
    "refusal": "refusal",
    "refused": "refusal",
    "refuse": "refusal",
    "full_refusal": "refusal",
    "2_full_refusal": "refusal",
    "partial": "partial",
    "partial_refusal": "partial",
    "3_partial_refusal": "partial",
    "compliance": "compliance",
    "complied": "compliance",
    "comply": "compliance",
    "full_compliance": "compliance",
    "1_full_compliance": "compliance",
    "safe": "safe",
    "unsafe": "unsafe",
    "none": "none",
}


def normalise_labels(labels: Sequence[object], partial_as: str = "refusal") -> list[str | None]:
    """Translate labels into verdict words; "none", empty and missing labels become None.

    Args:
        labels: verdicts or labels of a file.
        partial_as: what a partial refusal counts as: "refusal" (over-refusal is usually full plus partial),
            "compliance", or "partial" (a class of its own).

    Raises:
        WorkbenchError: a label that is not known.
    """
    if partial_as not in ("refusal", "compliance", "partial"):
        raise WorkbenchError(
            f'A partial refusal can count as "refusal", "compliance" or "partial", not as {partial_as!r}.'
        )
    words: list[str | None] = []
    for label in labels:
        if label is None or label != label or label == "":
            words.append(None)
            continue
        word = LABEL_WORDS.get(str(label).strip().lower())
        if word is None:
            raise WorkbenchError(f"Label {label!r} is not known; expected one of {', '.join(sorted(LABEL_WORDS))}.")
        words.append(None if word == "none" else partial_as if word == "partial" else word)
    return words


@dataclass(frozen=True)
class Agreement:
    """Two raters on the same items.

    Attributes:
        kappa: Cohen's kappa with its interval, over the items both judged.
        agreed: share of those items on which they agree.
        confusion: counts, first rater in rows, second in columns.
        missing_first: items the first rater could not judge.
        missing_second: items the second could not judge.
        disagreements: positions of the items on which they differ; no text.
    """

    kappa: Kappa
    agreed: Rate
    confusion: pd.DataFrame
    missing_first: int
    missing_second: int
    disagreements: tuple[int, ...]

    def to_dict(self) -> dict[str, float | int]:
        """Return one flat table row."""
        return {
            "n": self.kappa.n,
            "kappa": self.kappa.value,
            "kappa_low": self.kappa.low,
            "kappa_high": self.kappa.high,
            "agreed": self.agreed.value,
            "agreed_low": self.agreed.low,
            "agreed_high": self.agreed.high,
            "disagreements": len(self.disagreements),
            "missing_first": self.missing_first,
            "missing_second": self.missing_second,
        }


def agreement(
    first: Sequence[object],
    second: Sequence[object],
    *,
    partial_as: str = "refusal",
    confidence: float = 0.95,
) -> Agreement:
    """Compare two raters item by item; see `normalise_labels` for what labels may be.

    Raises:
        WorkbenchError: different lengths, an unknown label, or no item that both judged.
    """
    if len(first) != len(second):
        raise WorkbenchError(
            f"Agreement needs the same items from both raters, but they hold {len(first)} and {len(second)}."
        )
    one, two = normalise_labels(first, partial_as), normalise_labels(second, partial_as)
    both = [(i, a, b) for i, (a, b) in enumerate(zip(one, two, strict=True)) if a is not None and b is not None]
    if not both:
        raise WorkbenchError(f"None of the {len(one)} items has a label from both raters; nothing to compare.")
    positions, a_labels, b_labels = zip(*both, strict=True)
    order = sorted(set(a_labels) | set(b_labels))
    table = pd.crosstab(
        pd.Categorical(a_labels, categories=order), pd.Categorical(b_labels, categories=order), dropna=False
    )
    table.index.name, table.columns.name = "first", "second"
    differ = tuple(i for i, a, b in both if a != b)
    return Agreement(
        cohen_kappa(list(a_labels), list(b_labels), confidence),
        rate(len(positions) - len(differ), len(positions), confidence=confidence),
        table,
        sum(label is None for label in one),
        sum(label is None for label in two),
        differ,
    )


def agreement_by(
    first: Sequence[object],
    second: Sequence[object],
    groups: Sequence[Hashable],
    *,
    partial_as: str = "refusal",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Return one row per group (an arm, a category) in order of appearance, and one for all items.

    A group in which no item has both labels gets a row with n = 0 and NaN.

    Raises:
        WorkbenchError: as for `agreement`, or not one group per item.
    """
    if len(groups) != len(first):
        raise WorkbenchError(
            f"Agreement by group needs one group per item, but there are {len(groups)} groups and {len(first)} items."
        )
    rows: list[dict[str, object]] = []
    for name in dict.fromkeys(groups):
        inside = [i for i, group in enumerate(groups) if group == name]
        a, b = [first[i] for i in inside], [second[i] for i in inside]
        one, two = normalise_labels(a, partial_as), normalise_labels(b, partial_as)
        if any(x is not None and y is not None for x, y in zip(one, two, strict=True)):
            found = agreement(a, b, partial_as=partial_as, confidence=confidence).to_dict()
        else:
            found = {"n": 0, "missing_first": one.count(None), "missing_second": two.count(None)}
        rows.append({"group": str(name), **found})
    whole = agreement(first, second, partial_as=partial_as, confidence=confidence)
    return pd.DataFrame([*rows, {"group": "all", **whole.to_dict()}])
