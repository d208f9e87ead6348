"""Agreement of the offline judges with labelled responses, by arm; and the fit of our own judge.

    python benchmarks/judge_agreement.py LABELLED.jsonl
    python benchmarks/judge_agreement.py LABELLED.jsonl --also HUMAN.csv --also HUMAN2.csv --fit weights.json

A labelled file is any response file with a `label` column (or `final_label`, as in the annotated completions of
XSTest, Röttger et al. 2024) and, where there are several, an `arm` column; files given with --also are one more
group each, named after the file. Every number of "refusal (held out)" comes from weights fitted without the group
it is measured on. Partial refusals count as refusals when measuring and are left out when fitting.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from sgworkbench.evaluation.agreement import agreement, agreement_by, normalise_labels
from sgworkbench.evaluation.judges import SubstringJudge, get_judge, judge_names, judge_table
from sgworkbench.evaluation.judges.fitting import cue_matrix, fit_weights, held_out_scores
from sgworkbench.evaluation.responses import read_responses

# A file labelled by people on other models teaches, but the labels to be met are those of the main file.
ALSO_IMPORTANCE = 0.5


def load(path: Path, group: str | None) -> pd.DataFrame:
    table = read_responses(path)
    label = "label" if "label" in table.columns else "final_label"
    if label not in table.columns:
        raise SystemExit(f"{path.name} has no column label or final_label.")
    arm = table["arm"] if group is None and "arm" in table.columns else pd.Series(group or path.stem, index=table.index)
    return pd.DataFrame(
        {"prompt": table["prompt"], "text": table["text"], "label": table[label], "arm": arm.astype(str)}
    )


def offline_judges() -> dict[str, object]:
    """Every offline judge, and each list also on the answer alone, which is how it does best on reasoning models."""
    judges: dict[str, object] = {}
    for name in judge_names():
        judge = get_judge(name)
        if isinstance(judge, SubstringJudge):
            judges[name] = judge
            judges[f"{name} (answer)"] = SubstringJudge(name, judge.substrings, judge.ignore_case, "answer")
    return {"refusal": get_judge("refusal"), **judges}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labelled", type=Path)
    parser.add_argument("--also", type=Path, action="append", default=[])
    parser.add_argument("--fit", type=Path, help="write weights fitted on all files here")
    parser.add_argument("--disagreements", action="store_true", help="list positions where our judge differs")
    options = parser.parse_args()

    files = [load(options.labelled, None), *(load(path, path.stem) for path in options.also)]
    table = pd.concat(files, ignore_index=True)
    labels = table["label"].tolist()
    arms = table["arm"].tolist()

    columns = {}
    for name, judge in offline_judges().items():
        verdicts = judge_table(table[["prompt", "text"]], judge)["verdict"].tolist()
        columns[name] = agreement_by(labels, verdicts, arms).set_index("group")["kappa"]
        if name == "refusal":
            print(agreement(labels, verdicts).confusion.rename_axis(index="label", columns="judge"), "\n")
            print(agreement_by(labels, verdicts, arms).round(3).to_string(index=False), "\n")
            print("verdicts:", pd.Series(verdicts).value_counts().to_dict())
            if options.disagreements:
                print("disagreements:", *agreement(labels, verdicts).disagreements)

    words = normalise_labels(labels, partial_as="partial")
    cues = cue_matrix(table["prompt"].tolist(), table["text"].tolist())
    answered = ~np.isnan(cues).any(axis=1)
    clear = np.array([word in ("refusal", "compliance") for word in words]) & answered
    refused = np.array([word == "refusal" for word in words])
    importance = np.where(np.arange(len(table)) < len(files[0]), 1.0, ALSO_IMPORTANCE)
    if len(set(arms)) > 1:
        scores = held_out_scores(
            cues[answered], refused[answered], table["arm"][answered].tolist(), clear[answered] * importance[answered]
        )
        verdicts = pd.Series(None, index=table.index, dtype=object)
        verdicts[answered] = np.where(scores >= 0.5, "refusal", "compliance")
        columns["refusal (held out)"] = agreement_by(labels, verdicts.tolist(), arms).set_index("group")["kappa"]
    print("\nCohen's kappa with the labels:\n", pd.DataFrame(columns).T.round(3).to_string(), sep="")

    if options.fit:
        weights = fit_weights(cues[clear], refused[clear], importance[clear])
        stored = {
            "about": "Weights of the offline refusal judge: log-odds of a refusal per unit of each cue.",
            "fitted_on": {str(arm): int(((table["arm"] == arm) & clear).sum()) for arm in dict.fromkeys(arms)},
            "fitted_by": "benchmarks/judge_agreement.py --fit",
            "threshold": weights.threshold,
            "partial_band": weights.partial_band,
            "intercept": round(weights.intercept, 4),
            "weights": {name: round(value, 4) for name, value in weights.weights.items()},
        }
        options.fit.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        print(f"\nwrote {options.fit}")


if __name__ == "__main__":
    main()
