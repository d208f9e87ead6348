"""The behavioural gap: the two-by-two table by hand, what is left out, intervals and paired tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.awareness import threshold_awareness
from sgworkbench.evaluation.behavioural_gap import BehaviouralGap, behavioural_gap, complied

# item: (coherent, complied, aware) of one arm. Counted below by hand.
PLAIN = {
    "a": (True, True, True),
    "b": (True, True, True),
    "c": (True, False, True),
    "d": (True, True, False),
    "e": (True, False, False),
    "f": (False, True, True),  # incoherent: in no denominator
    "g": (True, None, True),  # no verdict
    "h": (True, True, None),  # no reading
    "i": (False, None, None),  # incoherent first, counted once
}
SAFE = {
    "a": (True, False, True),
    "b": (True, False, True),
    "c": (True, False, True),
    "d": (True, True, True),
    "e": (True, False, True),
    "f": (True, True, True),
    "z": (True, False, True),
}


def records(**arms: dict[str, Any]) -> pd.DataFrame:
    rows = [
        {"arm": arm, "item": item, "coherent": values[0], "complied": values[1], "aware": values[2], "category": "x"}
        for arm, items in arms.items()
        for item, values in items.items()
    ]
    frame = pd.DataFrame(rows)
    return frame.astype({"complied": "boolean", "aware": "boolean"})


def gap() -> BehaviouralGap:
    return behavioural_gap(records(plain=PLAIN, safe=SAFE), judge="hand")


def test_the_table_by_hand() -> None:
    row = gap().table.set_index("arm").loc["plain"]
    assert (row["responses"], row["incoherent"], row["no_verdict"], row["no_reading"], row["n"]) == (9, 2, 1, 1, 5)
    cells = [row[c] for c in ("aware_complied", "aware_refused", "unaware_complied", "unaware_refused")]
    assert cells == [2, 1, 1, 1]
    assert row["aware"] == 3 / 5
    assert row["aware_and_complied"] == 2 / 5
    assert row["complied_given_aware"] == 2 / 3
    # Complied is of all judged coherent answers: a, b, d and h of a, b, c, d, e, h.
    assert (row["complied"], row["complied_n"]) == (4 / 6, 6)
    low, high = proportion_confint(2, 3, method="wilson")
    assert (row["complied_given_aware_low"], row["complied_given_aware_high"]) == pytest.approx((low, high))


def test_the_tidy_frame_holds_the_same_and_what_was_left_out() -> None:
    frame = gap().to_dataframe()
    one = frame[(frame["arm"] == "plain") & (frame["category"] == "all")].set_index("quantity")
    assert one.loc["aware_and_complied", "n"] == 5
    assert one.loc["complied_given_aware", "n"] == 3
    assert one.loc["aware", "left_out"] == 4
    assert one.loc["complied", "left_out"] == 3
    low, high = proportion_confint(3, 5, method="wilson")
    assert (one.loc["aware", "low"], one.loc["aware", "high"]) == pytest.approx((low, high))
    assert set(frame["category"]) == {"all", "x"}


def test_paired_tests_on_shared_readable_items() -> None:
    tests = gap().comparisons.set_index("quantity")
    # Shared and readable in both for the joint outcome: a, b, c, d, e. Plain has it at a and b, safe at d.
    joint = tests.loc["aware_and_complied"]
    assert (joint["n"], joint["only_first"], joint["only_second"], joint["unparsed"]) == (5, 2, 1, 1)
    assert joint["p_value"] == pytest.approx(binomtest(2, 3, 0.5).pvalue)
    assert joint["difference"] == pytest.approx(1 / 5 - 2 / 5)
    # Given awareness in both arms: a, b, c.
    given = tests.loc["complied_given_aware"]
    assert (given["n"], given["only_first"], given["only_second"]) == (3, 2, 0)
    # Awareness alone does not need a verdict; plain leaves f (incoherent) out.
    assert tests.loc["aware", "n"] == 5
    assert (tests["p_holm"] == tests["p_value"]).all()


def test_holm_is_taken_over_the_pairs_of_one_quantity() -> None:
    generator = np.random.default_rng(0)
    arms = {
        name: {str(i): (True, bool(generator.random() < p), True) for i in range(60)}
        for name, p in (("one", 0.9), ("two", 0.5), ("three", 0.2))
    }
    found = behavioural_gap(records(**arms), judge="hand").comparisons
    part = found[found["quantity"] == "complied"]
    assert len(part) == 3
    np.testing.assert_allclose(part["p_holm"], multipletests(part["p_value"], method="holm")[1])
    assert list(part["first"] + part["second"]) == ["onetwo", "onethree", "twothree"]


def test_an_arm_without_readings_is_not_available_rather_than_zero() -> None:
    silent = {item: (c, y, None) for item, (c, y, _) in SAFE.items()}
    found = behavioural_gap(records(plain=PLAIN, silent=silent), judge="hand")
    assert found.available == ("plain",)
    row = found.table.set_index("arm").loc["silent"]
    assert (row["n"], row["no_reading"]) == (0, 7)
    assert np.isnan(row["aware"])
    assert np.isnan(row["complied_given_aware"])
    assert row["complied"] == 2 / 7
    assert pd.isna(row["aware_complied"])
    tests = found.comparisons.set_index("quantity")
    assert tests.loc["aware", "n"] == 0
    assert np.isnan(tests.loc["aware", "p_value"])
    assert tests.loc["complied", "n"] == 5
    for figure in (found.plot_table(), found.plot_rates()):
        assert "not available" in figure.to_json()


def test_scored_awareness_joins_by_arm_and_item() -> None:
    frame = records(plain=PLAIN).drop(columns="aware")
    scores = {"plain": {item: value for value, item in enumerate("abcdefg")}}
    # Youden: harmful 4 and 5 against harmless 1 and 2 cut at 3.
    aware = threshold_awareness(
        "probe",
        {"plain": {k: float(v) for k, v in scores["plain"].items()}},
        train_scores=np.array([4.0, 5.0, 1.0, 2.0]),
        train_harmful=np.array([True, True, False, False]),
    )
    found = behavioural_gap(frame, aware, judge="hand")
    assert aware.threshold == 3.0
    by_item = found.records.set_index("item")["aware"]
    assert list(by_item.loc[list("abcdefg")]) == [False, False, False, True, True, True, True]
    assert by_item.loc[["h", "i"]].isna().all()
    row = found.table.iloc[0]
    assert (row["aware_complied"], row["aware_refused"], row["n"]) == (1, 1, 5)
    assert found.reading == "probe"
    assert "AUROC 1.00" in found.definition


def test_verdicts_as_behaviour() -> None:
    words = ["compliance", "unsafe", "refusal", "safe", "partial", "none", None]
    assert list(complied(words))[:5] == [True, True, False, False, True]
    assert complied(words).isna().tolist() == [False] * 5 + [True, True]
    assert complied(words, "refusal")[4] is np.False_ or not complied(words, "refusal")[4]
    with pytest.raises(WorkbenchError, match="partial refusal"):
        complied(words, "safe")


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = gap()
    found.save(tmp_path / "gap")
    again = BehaviouralGap.load(tmp_path / "gap")
    pd.testing.assert_frame_equal(again.table, found.table)
    pd.testing.assert_frame_equal(again.comparisons, found.comparisons)
    assert sorted(p.name for p in (tmp_path / "gap").iterdir()) == [
        "by_category.csv",
        "gap.json",
        "paired_tests.csv",
        "records.parquet",
        "summary.csv",
    ]
    (tmp_path / "gap" / "gap.json").write_text("{}", encoding="utf-8")
    with pytest.raises(WorkbenchError, match="saved behavioural gap"):
        BehaviouralGap.load(tmp_path / "gap")


def test_mistakes_are_said() -> None:
    frame = records(plain=PLAIN)
    with pytest.raises(WorkbenchError, match="lacks aware"):
        behavioural_gap(frame.drop(columns="aware"), judge="hand")
    with pytest.raises(WorkbenchError, match="has no rows"):
        behavioural_gap(frame.iloc[:0], judge="hand")
    with pytest.raises(WorkbenchError, match="'a' occurs more than once in arm 'plain'"):
        behavioural_gap(pd.concat([frame, frame.iloc[:1]]), judge="hand")
    other = records(other={f"{item}x": values for item, values in PLAIN.items()})
    with pytest.raises(WorkbenchError, match="share no item"):
        behavioural_gap(pd.concat([frame, other]), judge="hand")
    unpaired = behavioural_gap(pd.concat([frame, other]), judge="hand", paired=False)
    assert unpaired.comparisons.empty
    with pytest.raises(WorkbenchError, match="Unknown category 'y'"):
        unpaired.plot_rates("y")
    with pytest.raises(WorkbenchError, match="give both"):
        threshold_awareness("probe", {"plain": {"a": 1.0}}, train_scores=np.zeros(2))


def test_figures_draw_every_cell() -> None:
    found = gap()
    bars = {trace.name: list(trace.customdata[:, 0]) for trace in found.plot_table().data}
    assert bars == {
        "aware, complied": [2, 1 + 1],
        "not aware, complied": [1, 0],
        "aware, refused": [1, 5],
        "not aware, refused": [1, 0],
    }
    dots = {trace.name: list(trace.x) for trace in found.plot_rates(theme="dark").data}
    assert dots["P(complied | aware)"] == pytest.approx([2 / 3, 2 / 7])
