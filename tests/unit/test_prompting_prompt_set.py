"""Prompt sets: identity by content, samples and splits that depend on the content alone."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sgworkbench.errors import WorkbenchError
from sgworkbench.prompting import Prompt, PromptSet, concatenate, contrast_set


def paired(n: int = 20, categories: int = 4) -> PromptSet:
    prompts = []
    for i in range(n):
        for label in ("harmful", "harmless"):
            prompts.append(Prompt(f"{label} text {i}", f"{i}-{label}", label, f"c{i % categories}", f"p{i}"))
    return PromptSet("paired", tuple(prompts))


def shuffled(prompts: PromptSet, seed: int = 1) -> PromptSet:
    order = list(prompts.prompts)
    random.Random(seed).shuffle(order)
    return PromptSet(prompts.name, tuple(order))


def test_the_contrast_set_is_complete_and_split_by_pair() -> None:
    contrast = contrast_set()
    assert len(contrast.harmful) == len(contrast.harmless) == 200
    assert len({p.category for p in contrast}) >= 8
    assert Counter(p.split for p in contrast) == {"train": 200, "validation": 80, "test": 120}
    by_pair: dict[str, list[Prompt]] = {}
    for prompt in contrast:
        by_pair.setdefault(prompt.pair, []).append(prompt)
    for pair in by_pair.values():
        assert sorted(p.label for p in pair) == ["harmful", "harmless"]
        assert len({p.split for p in pair}) == len({p.category for p in pair}) == 1
    assert len(set(contrast.texts)) == 400


def test_the_content_hash_is_stable() -> None:
    prompts = PromptSet("any", (Prompt("Wie backe ich Brot? 🙂", "1", "harmless", "food", "p", "train"),))
    text = '[["Wie backe ich Brot? 🙂", "1", "harmless", "food", "p", "train"]]'
    assert prompts.content_hash == hashlib.sha256(text.encode("utf-8")).hexdigest()
    assert prompts.content_hash == "4de715aec5febe10abb122dc742a7f82a53b77796774e882771cf881b24cd1bf"
    assert prompts.summary() == {"name": "any", "n": 1, "sha256": prompts.content_hash}


@pytest.mark.parametrize(
    "change",
    [{"text": "b"}, {"id": "9"}, {"label": "harmful"}, {"category": "x"}, {"pair": "x"}, {"split": "test"}],
    ids=lambda change: next(iter(change)),
)
def test_the_content_hash_sees_every_field(change: dict[str, str]) -> None:
    base = PromptSet.from_texts(["a", "c"])
    changed = PromptSet("prompts", (replace(base.prompts[0], **change), base.prompts[1]))  # type: ignore[arg-type]
    assert changed.content_hash != base.content_hash
    assert PromptSet("another name", base.prompts).content_hash == base.content_hash
    assert PromptSet("prompts", base.prompts[::-1]).content_hash != base.content_hash
    # Fields do not run into one another.
    one, two = (PromptSet("x", (Prompt("t", "i", category=c, pair=p),)) for c, p in (("ab", "c"), ("a", "bc")))
    assert one.content_hash != two.content_hash


def test_a_sample_depends_on_seed_and_content_only() -> None:
    prompts = paired()
    sample = prompts.sample(7, seed=3)
    assert len(sample) == 7
    assert {p.id for p in shuffled(prompts).sample(7, seed=3)} == {p.id for p in sample}
    assert {p.id for p in prompts.sample(7, seed=4)} != {p.id for p in sample}
    assert [p.id for p in prompts if p.id in {q.id for q in sample}] == [p.id for p in sample]  # original order
    assert prompts.sample(len(prompts)) is prompts
    assert prompts.sample(10**6) is prompts


@pytest.mark.parametrize("count", range(1, 40, 3))
def test_every_sample_is_the_same_in_any_order(count: int) -> None:
    # Both members of a pair have the same rank, so only a fixed order between them keeps odd samples stable.
    prompts = paired()
    expected = {p.id for p in prompts.sample(count)}
    for seed in range(3):
        assert {p.id for p in shuffled(prompts, seed).sample(count)} == expected


@pytest.mark.parametrize("count", [1, 4, 7, 13])
def test_harmful_and_harmless_samples_hold_the_same_pairs(count: int) -> None:
    for prompts in (paired(), contrast_set(), contrast_set().split("test")):
        assert {p.pair for p in prompts.harmful.sample(count)} == {p.pair for p in prompts.harmless.sample(count)}


def test_a_small_sample_is_spread_over_categories() -> None:
    counts = Counter(p.category for p in contrast_set().harmful.sample(20))
    assert len(counts) == 10
    assert set(counts.values()) == {2}


@pytest.mark.parametrize("count", [0, -3])
def test_an_empty_sample_is_an_error(count: int) -> None:
    with pytest.raises(WorkbenchError, match=f"at least one prompt, found a request for {count}"):
        paired().sample(count)


def test_splits_keep_pairs_together_and_ignore_the_order() -> None:
    prompts = paired(50)
    split = prompts.with_split(train=0.5, validation=0.2, seed=5)
    assert Counter(p.split for p in split) == {"train": 50, "validation": 20, "test": 30}
    of_pair = {p.pair: p.split for p in split}
    assert all(of_pair[p.pair] == p.split for p in split)
    again = shuffled(prompts).with_split(train=0.5, validation=0.2, seed=5)
    assert {p.id: p.split for p in again} == {p.id: p.split for p in split}
    assert {p.id: p.split for p in prompts.with_split(train=0.5, validation=0.2, seed=6)} != {
        p.id: p.split for p in split
    }
    assert [p.id for p in split] == [p.id for p in prompts]


def test_the_two_classes_split_apart_from_each_other_still_share_no_pair() -> None:
    prompts = paired(30)
    harmful, harmless = (part.with_split(train=0.6, seed=2) for part in (prompts.harmful, prompts.harmless))
    assert {p.pair for p in harmful.split("train")} == {p.pair for p in harmless.split("train")}


def test_equal_texts_fall_into_one_split() -> None:
    prompts = PromptSet("d", tuple(Prompt(f"t{i % 10}", str(i)) for i in range(40))).with_split(train=0.5)
    of_text = {p.text: p.split for p in prompts}
    assert all(of_text[p.text] == p.split for p in prompts)


def test_every_split_that_was_asked_for_is_made() -> None:
    few = PromptSet.from_texts(["a", "b", "c", "d"]).with_split(train=0.5, validation=0.1)
    assert Counter(p.split for p in few) == {"train": 2, "validation": 1, "test": 1}
    with pytest.raises(WorkbenchError, match=r"has 2 distinct prompts or pairs, too few .* at least 3 are needed"):
        PromptSet.from_texts(["a", "b"]).with_split(train=0.5, validation=0.1)
    with pytest.raises(WorkbenchError, match="too few to split into train and test"):
        PromptSet.from_texts(["a"]).with_split()


@pytest.mark.parametrize("shares", [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (-0.1, 0.2), (0.5, -0.1), (2.0, 0.0)])
def test_shares_without_room_for_test_are_an_error(shares: tuple[float, float]) -> None:
    with pytest.raises(WorkbenchError, match="must be positive and leave room for test"):
        paired().with_split(train=shares[0], validation=shares[1])


def test_parts_and_their_names() -> None:
    prompts = paired(3)
    assert [p.label for p in prompts.harmful] == ["harmful"] * 3
    assert prompts.harmless.name == "paired/harmless"
    assert prompts.labelled("unlabelled").to_dataframe()["label"].unique().tolist() == ["unlabelled"]
    assert not prompts.has_split("train")
    with pytest.raises(WorkbenchError, match=r"No prompt of 'paired' is marked test: its 6 prompts .*with_split\(\)"):
        prompts.split("test")
    with pytest.raises(WorkbenchError, match=r"No prompt of 'prompts' is marked harmful.*labelled unlabelled"):
        _ = PromptSet.from_texts(["a"]).harmful
    with pytest.raises(WorkbenchError, match=r"Unknown split 'tets'\. Did you mean 'test'\?"):
        prompts.split("tets")


def test_a_table_has_one_row_per_prompt() -> None:
    frame = paired(2).to_dataframe()
    assert list(frame.columns) == ["id", "label", "category", "pair", "split", "text"]
    assert frame["text"].tolist() == paired(2).texts
    assert "paired" in repr(paired(2))


def test_bad_sets_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="'s' is empty; at least one prompt is needed"):
        PromptSet("s", ())
    with pytest.raises(WorkbenchError, match="'prompts' is empty"):
        PromptSet.from_texts([])
    with pytest.raises(WorkbenchError, match="The prompt id '1' occurs twice in 's'"):
        PromptSet("s", (Prompt("a", "1"), Prompt("b", "1")))
    with pytest.raises(WorkbenchError, match="Prompt '1' of 'prompts' has no text"):
        PromptSet.from_texts(["a", " \n"])
    with pytest.raises(WorkbenchError, match="found one string; put it into a list"):
        PromptSet.from_texts("How do I bake bread?")
    with pytest.raises(WorkbenchError, match="Prompt '0' of 'prompts' holds half a surrogate pair"):
        PromptSet.from_texts(["bad \ud83d end"])


def test_texts_may_come_from_any_iterable() -> None:
    assert PromptSet.from_texts(np.array(["a", "b"])).texts == ["a", "b"]
    assert PromptSet.from_texts(text for text in ("a", "b")).texts == ["a", "b"]
    assert [p.id for p in PromptSet.from_texts(("a", "b"), label="harmful")] == ["0", "1"]


def test_joining_keeps_ids_where_it_can() -> None:
    one, two = PromptSet.from_texts(["a", "b"]), PromptSet.from_texts(["c"])
    assert [p.id for p in concatenate("both", [one, two])] == ["0:0", "0:1", "1:0"]
    other = PromptSet("x", (Prompt("d", "z"),))
    assert [p.id for p in concatenate("both", [one, other])] == ["0", "1", "z"]
    assert concatenate("both", [one, two]).texts == ["a", "b", "c"]
    with pytest.raises(WorkbenchError, match="'none' is empty"):
        concatenate("none", [])


def test_indexing_gives_a_prompt_and_slicing_a_set() -> None:
    prompts = PromptSet.from_texts(["one", "two", "three"], label="harmful")
    assert prompts[1].text == "two"
    assert prompts[-1].text == "three"
    assert prompts[1:].texts == ["two", "three"]
    assert isinstance(prompts[1:], PromptSet)
    with pytest.raises(WorkbenchError, match="prompt"):
        prompts[3:]
