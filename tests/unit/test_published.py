"""The published numbers in the package equal those of the recount they were taken from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from sgworkbench.errors import WorkbenchError
from sgworkbench.paper import PUBLISHED_TABLES, published
from sgworkbench.statistics import rate

SHARED = Path(__file__).parents[3] / "shared" / "paper"
needs_recount = pytest.mark.skipif(
    not (SHARED / "results.json").is_file(), reason="the recount of the published files is not beside the project"
)


@pytest.fixture(scope="module")
def recount() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SHARED / "results.json").read_text())
    return loaded


def same(found: Any, expected: Any) -> bool:
    if expected is None:
        return bool(pd.isna(found))
    return (
        bool(found == expected) if isinstance(expected, str) else bool(np.isclose(found, expected, rtol=0, atol=1e-9))
    )


@needs_recount
class TestAgainstTheRecount:
    def test_safety(self, recount: dict[str, Any]) -> None:
        table = published("safety")
        records = {record["path"]: record for record in recount["records"] if "pca_diff" not in record["method"]}
        rates = [path for path, record in records.items() if record["metric"] in ("ASR", "fulfilment")]
        assert sorted(table.loc[table["subset"] == "all", "file"]) == sorted(rates)
        assert (table["subset"] != "all").sum() == sum(len(records[path].get("subsets", {})) for path in rates)
        for row in table.to_dict("records"):
            record = records[row["file"]]
            assert row["model"] == record["model"].removesuffix("-star1")
            assert row["published_name"] == record["method"]
            assert (row["arm"] == "star1-sft") == (
                "star1" in (record["model"] + record["method"]).replace("star1000", "")
            )
            assert row["metric"] == record["metric"]
            assert row["judge"] == record["judge"]
            labels, text = record["labels"], record["text"]
            if row["subset"] == "all":
                expected = (labels["unsafe"] + labels["safe"], labels["unsafe"], record["value"], *record["ci95"])
                assert row["unparsed"] == labels.get("none", 0) + labels.get("non_binary", 0)
            else:
                part = record["subsets"][row["subset"]]
                expected = (part["n"], part["unsafe"], part["rate"], None, None)
            for column, value in zip(("n", "count", "value", "low", "high"), expected, strict=True):
                assert same(row[column], value), (row["file"], column)
            for column, value in (
                ("closed_reasoning", text.get("closed_think")),
                ("degenerate", text.get("degenerate_zlib_lt_0.15")),
                ("temperature", record.get("temperature")),
                ("max_length", record.get("max_length")),
            ):
                assert same(row[column], value), (row["file"], column)
            for column, field in (("system_wording", "system"), ("suffix_wording", "suffix")):
                wordings = list(record.get("prompt", {}).get(field, {}))
                assert same(row[column], "+".join(wordings) or None), (row["file"], column)

    def test_over_refusal(self, recount: dict[str, Any]) -> None:
        table = published("over_refusal")
        records = {record["path"]: record for record in recount["records"] if "over_refusal" in record["metric"]}
        assert sorted(table["file"]) == sorted(records)
        for row in table.to_dict("records"):
            record = records[row["file"]]
            labels = record["labels"]
            graded = "safe:1_full_compliance" in labels
            refused = labels["safe:2_full_refusal" if graded else "safe_refusal"]
            n = sum(count for label, count in labels.items() if label.startswith("safe"))
            assert (row["count"], row["n"]) == (refused, n)
            assert same(row["value"], record["value"])
            assert same(row["low"], record["ci95"][0])
            assert same(row["high"], record["ci95"][1])
            assert row["unparsed"] == labels.get("other", 0)
            assert (row["metric"] == "full_refusal_rate") == graded
            if not graded and row["benchmark"] == "XSTest":
                assert row["unsafe_refused"] == labels["unsafe_refusal"]
                assert row["unsafe_complied"] == labels["unsafe_compliance"]

    def test_behavioural_gap(self, recount: dict[str, Any]) -> None:
        records = {record["path"]: record for record in recount["records"]}
        for row in published("behavioural_gap").to_dict("records"):
            record = records[row["file"]]
            aware, both = record["text"]["proxy_aware_in_think"], record["proxy_aware_and_unsafe"]
            assert same(row["aware_share"], aware)
            assert same(row["aware_and_complied_share"], both)
            assert row["complied"] == record["labels"]["unsafe"]
            assert same(row["complied_share"], record["value"])
            assert row["complied_given_aware"] == pytest.approx(both / aware, abs=6e-5)
            assert same(row["aware_given_complied"], record["proxy_aware_given_unsafe"])
            assert same(row["aware_given_refused"], record["proxy_aware_given_safe"])
            assert same(row["refusal_phrase_in_answer"], record["text"]["proxy_refusal_in_answer"])

    def test_utility(self, recount: dict[str, Any]) -> None:
        table = published("utility")
        records = {record["path"]: record for record in recount["utility"]}
        assert sorted(table["file"]) == sorted(records)
        for row in table.to_dict("records"):
            record = records[row["file"]]
            assert (row["n"], row["count"]) == (record["n_in_code"], record["implied_correct"])
            assert row["value"] == pytest.approx(record["score"], abs=1e-6)
            assert row["stamp"] == record["stamp"]
            assert row["max_tokens"] == record["max_tokens"]
            assert same(row["with_code_fence"], record.get("python_fence"))
            extracted = record["answer_extracted"]
            assert same(row["answer_extracted"], None if extracted is None else round(extracted, 6))

    def test_paired(self, recount: dict[str, Any]) -> None:
        table = published("paired")
        expected = [
            (p["model"], p["a"], p["b"], p["n"], p["both_unsafe"], p["a_unsafe_b_safe"], p["a_safe_b_unsafe"],
             p["both_safe"], p["mcnemar_p"])
            for p in recount["paired"]
        ]  # fmt: skip
        columns = ["model", "published_name_a", "published_name_b", "n", "both_unsafe", "only_a_unsafe"]
        found = table[[*columns, "only_b_unsafe", "both_safe", "p_value"]].itertuples(index=False, name=None)
        assert list(found) == expected

    def test_sweep(self, recount: dict[str, Any]) -> None:
        published_sweep = recount["sweep_qwen3_8b_star1000_thinkingi_pca_diff_harmbench"]
        table = published("sweep")
        cells = table[table["arm"] == "steer-only-pca"].set_index(["strength", "layer"])
        assert len(cells) == sum(len(layers) for layers in published_sweep["grid"].values())
        names = {"value": "asr", "n": "n", "degenerate": "degenerate", "closed_reasoning": "closed_think",
                 "zlib_ratio": "zlib", "aware": "aware", "refusal_phrase": "refuse",
                 "median_chars": "median_chars"}  # fmt: skip
        for strength, layers in published_sweep["grid"].items():
            for layer, cell in layers.items():
                row = cells.loc[(float(strength), int(layer))]
                for column, key in names.items():
                    assert same(row[column], cell[key])
                assert row["count"] == round(cell["asr"] * cell["n"])
        reference = table[table["layer"].isna()].set_index("arm")["value"]
        baseline = published_sweep["baseline"]
        assert reference["vanilla"] == baseline["vanilla_asr_on_subset"]
        assert reference["thinking-intervention"] == baseline["thinkingi_asr_on_subset"]

    def test_attention(self, recount: dict[str, Any]) -> None:
        items, means = published("attention"), published("attention_means").set_index("file")
        assert sorted(means.index) == sorted(record["path"] for record in recount["attention"])
        assert len(items) == sum(record["n"] for record in recount["attention"])
        for record in recount["attention"]:
            row = means.loc[record["path"]]
            assert same(row["mean"], record["mean_of_means"])
            assert same(row["n"], record["n"])
            assert same(row["token_weighted_mean"], record["token_weighted_mean"])
            assert same(row["mean_cumulative"], record["mean_cumulative"])
            assert same(row["mean_tokens"], record["mean_tokens"])
            assert (row["arm"] == "self-guard") == ("_steering" in record["path"])
            assert (row["version"] == "earlier") == ("_old" in record["path"])
            mine = items[items["file"] == record["path"]].sort_values("item")
            for found, expected in zip(mine.to_dict("records"), record["rows"], strict=True):
                for column in ("tokens", "mean", "cumulative", "first_quarter_mean", "last_quarter_mean",
                               "first100_mean", "first200_mean", "max"):  # fmt: skip
                    assert same(found[column], expected[column])
                assert found["closed_reasoning"] == expected["closed_think"]

    def test_vectors(self) -> None:
        (expected,) = json.loads((SHARED / "svec_stats_qwen3_4b.json").read_text())["files"].values()
        table = published("vectors")
        names = {"norm": "l2_norm", "max_abs": "max_abs", "largest_dimension": "argmax_abs_dim",
                 "share_of_largest_dimension": "share_of_sq_norm_in_top1_dim",
                 "participation_ratio": "participation_ratio_dims"}  # fmt: skip
        for column, key in names.items():
            assert list(table[column]) == expected[key]
        assert list(table["cosine_with_previous"][1:]) == expected["cos_consecutive"]
        assert list(table["read_site"][[0, 34, 35]]) == ["resid_post[0]", "resid_post[34]", "after final norm"]

    def test_the_source_is_named(self, recount: dict[str, Any]) -> None:
        source = published("safety").attrs["source"]
        assert source["commit"] == recount["commit"]
        assert recount["source"].split(":")[1] in source["repository"]


class TestTheTablesThemselves:
    @pytest.mark.parametrize("name", PUBLISHED_TABLES)
    def test_described_without_texts(self, name: str) -> None:
        table = published(name)
        assert table.attrs["name"] == name
        assert table.attrs["caveats"]
        assert table.attrs["unit"]
        assert set(table.attrs["columns"]) <= set(table.columns)
        words = {str(cell) for column in table.select_dtypes(exclude="number") for cell in table[column].unique()}
        # Numbers only: the longest text is a file name.
        assert max(map(len, words)) < 160
        assert not any("\n" in word for word in words)

    def test_rates_follow_from_their_counts(self) -> None:
        for name in ("safety", "over_refusal", "utility", "sweep"):
            table = published(name)
            assert np.abs(table["count"] / table["n"] - table["value"]).max() < 6e-5
        for row in published("safety", subset="all").to_dict("records"):
            wilson = rate(int(row["count"]), int(row["n"]))
            assert (wilson.low, wilson.high) == pytest.approx((row["low"], row["high"]), abs=6e-5)

    def test_p_values_follow_from_their_tables(self) -> None:
        for row in published("paired").to_dict("records"):
            a, b = row["only_a_unsafe"], row["only_b_unsafe"]
            assert row["both_unsafe"] + a + b + row["both_safe"] == row["n"]
            exact = binomtest(a, a + b).pvalue if a + b else 1.0
            assert row["p_value"] == pytest.approx(exact, rel=6e-3, abs=1e-12)

    def test_the_main_comparison_has_one_row_per_cell(self) -> None:
        for name in ("safety", "over_refusal", "utility", "behavioural_gap"):
            main = published(name, main=True)
            assert not main.duplicated(["model", "benchmark", "subset", "arm"]).any()
        guard = published("safety", main=True, arm="self-guard", benchmark="HarmBench", subset="all")
        assert dict(zip(guard["model"], guard["value"], strict=True)) == {
            "Qwen3-4B": 0.0475, "Qwen3-8B": 0.05, "Qwen3-14B": 0.03,
        }  # fmt: skip
        assert set(guard["layers"]) == {"20", "30,31,32"}
        assert set(guard["alpha"]) == {0.3, 0.5}

    def test_wrong_names_get_the_nearest(self) -> None:
        with pytest.raises(WorkbenchError, match=r"Unknown published table 'saftey'. Did you mean 'safety'"):
            published("saftey")
        with pytest.raises(WorkbenchError, match=r"Unknown column 'modell'. Did you mean 'model'"):
            published("safety", modell="Qwen3-4B")
        with pytest.raises(WorkbenchError, match=r"Unknown model .*'Qwen3-4b'. Did you mean 'Qwen3-4B'"):
            published("safety", model="Qwen3-4b")
        with pytest.raises(WorkbenchError, match="n = 7"):
            published("safety", n=7)

    def test_a_caller_cannot_change_the_data(self) -> None:
        table = published("sweep")
        table["value"] = 0.0
        table.attrs["caveats"].clear()
        assert published("sweep")["value"].max() > 0.9
        assert published("sweep").attrs["caveats"]
