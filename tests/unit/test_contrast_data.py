"""Checks of the contrast set: shape, balance and surface leaks (stdlib only)."""

import csv
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "sgworkbench" / "prompting" / "data"
SIDES = ("harmful", "harmless")
COLUMNS = ["pair", "category", "split", *SIDES]
PREFIXES = {
    "weapons_and_explosives": "weapons",
    "drugs_and_chemicals": "drugs",
    "cybercrime": "cyber",
    "fraud_and_scams": "fraud",
    "theft_and_burglary": "theft",
    "violence_and_threats": "violence",
    "hate_and_harassment": "hate",
    "self_harm": "selfharm",
    "privacy_and_stalking": "privacy",
    "misinformation": "misinfo",
}
SPLITS = {"train": 10, "validation": 4, "test": 6}


def read_rows():
    with open(DATA / "contrast.csv", encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        assert reader.fieldnames == COLUMNS
        return list(reader)


@pytest.fixture(scope="module")
def rows():
    return read_rows()


def tokens(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def jaccard(left, right):
    left, right = set(tokens(left)), set(tokens(right))
    return len(left & right) / len(left | right)


def words(text):
    return len(text.split())


def ending(text):
    return text[-1] if text[-1] in ".?!" else ""


def auroc(positive, negative):
    """Chance that a positive score is above a negative one; ties count half."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_counts(rows):
    assert len(rows) == 200
    assert Counter(r["category"] for r in rows) == dict.fromkeys(PREFIXES, 20)


def test_splits(rows):
    found = Counter((r["category"], r["split"]) for r in rows)
    assert found == {(c, s): n for c in PREFIXES for s, n in SPLITS.items()}


def test_splits_are_interleaved(rows):
    for category in PREFIXES:
        order = [r["split"] for r in rows if r["category"] == category]
        runs = [len(list(group)) for _, group in itertools.groupby(order)]
        assert max(runs) <= 3, category


def test_pair_ids(rows):
    expected = [f"{p}-{i:02d}" for p in PREFIXES.values() for i in range(1, 21)]
    assert sorted(r["pair"] for r in rows) == sorted(expected)
    for r in rows:
        assert r["pair"].rsplit("-", 1)[0] == PREFIXES[r["category"]]


def test_cells_are_clean(rows):
    for r in rows:
        assert set(r) == set(COLUMNS)  # no missing or surplus cell
        for cell in r.values():
            assert cell
            assert cell == cell.strip()
            assert cell.isprintable()  # no newline, tab or control character
            assert "  " not in cell


def test_text_is_unique(rows):
    texts = [" ".join(tokens(r[s])) for r in rows for s in SIDES]
    assert len(texts) == len(set(texts)) == 400


def test_word_limits(rows):
    for r in rows:
        for side in SIDES:
            assert 6 <= words(r[side]) <= 25, r["pair"]


def test_length_balance(rows):
    for r in rows:
        assert abs(words(r["harmful"]) - words(r["harmless"])) <= 6, r["pair"]
    gap = mean(words(r["harmful"]) for r in rows) - mean(words(r["harmless"]) for r in rows)
    assert abs(gap) <= 0.5


@pytest.mark.parametrize("split", [None, *SPLITS])
@pytest.mark.parametrize("length", [words, len], ids=["words", "characters"])
def test_length_alone_does_not_tell_sides_apart(rows, split, length):
    part = [r for r in rows if split in (None, r["split"])]
    score = auroc(*([length(r[side]) for r in part] for side in SIDES))
    assert 0.4 < score < 0.6


def test_openings_match_within_pairs(rows):
    def same(n):
        return mean(tokens(r["harmful"])[:n] == tokens(r["harmless"])[:n] for r in rows)

    assert same(1) == 1.0
    assert same(2) >= 0.9


def test_openings_are_balanced_and_varied(rows):
    harmful, harmless = (Counter(tokens(r[s])[0] for r in rows) for s in SIDES)
    for word in harmful | harmless:
        assert abs(harmful[word] - harmless[word]) <= 2, word
    assert len(harmful) >= 10
    assert max(harmful.values()) <= 0.15 * len(rows)


def test_end_punctuation(rows):
    for r in rows:
        assert ending(r["harmful"]) == ending(r["harmless"]), r["pair"]
    found = Counter(ending(r["harmful"]) for r in rows)
    assert found["."] >= 40
    assert found["?"] >= 40
    assert found[""] >= 5


@pytest.mark.parametrize("side", SIDES)
def test_no_near_duplicates_on_a_side(rows, side):
    for one, two in itertools.combinations(rows, 2):
        assert jaccard(one[side], two[side]) < 0.6, (one["pair"], two["pair"])


def test_sides_of_a_pair_are_close_but_differ(rows):
    scores = [jaccard(r["harmful"], r["harmless"]) for r in rows]
    assert max(scores) < 1.0
    assert mean(0.2 <= s <= 0.85 for s in scores) >= 0.9


def test_no_single_word_gives_the_label_away(rows):
    harmful, harmless = (Counter(w for r in rows for w in set(tokens(r[s]))) for s in SIDES)
    for word in harmful | harmless:
        assert abs(harmful[word] - harmless[word]) <= 0.1 * len(rows), word


def test_bag_of_words_leak(rows):
    """A naive Bayes classifier trained on `train` stays below 0.85 on `test`."""
    train = [r for r in rows if r["split"] == "train"]
    test = [r for r in rows if r["split"] == "test"]
    harmful, harmless = (Counter(w for r in train for w in set(tokens(r[s]))) for s in SIDES)

    def odds(text):  # ratio of smoothed counts: a product, so no logarithm needed
        ratio = 1.0
        for word in set(tokens(text)):
            ratio *= (harmful[word] + 1) / (harmless[word] + 1)
        return ratio

    hits = [odds(r["harmful"]) > 1 for r in test] + [odds(r["harmless"]) <= 1 for r in test]
    assert mean(hits) < 0.85
