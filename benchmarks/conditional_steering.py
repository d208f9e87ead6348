"""Refusal and over-refusal of prompt-only, always-on and awareness-gated steering on the demo model.

Directions, vector and threshold come from the training split of the built-in set; answers are measured on its test
split and on StrongREJECT prompts, which nothing was fitted on. Prints a Markdown table.

    python benchmarks/conditional_steering.py [--strongreject 60] [--tokens 32]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch

from sgworkbench import PromptCondition, PromptSet, Workbench, contrast_set, load_prompts
from sgworkbench.analysis import Site, read_for_gap
from sgworkbench.downloads import fetch_strongreject
from sgworkbench.evaluation.behaviour import ArmSpec, answer, refusal_rates
from sgworkbench.progress import ConsoleProgress
from sgworkbench.steering import Condition, GenerationSettings, awareness_gated, fit_threshold


def main() -> None:
    """Fit, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=17, help="layer steered")
    parser.add_argument("--gate-layer", type=int, default=14, help="layer at which awareness is read")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--strongreject", type=int, default=60, help="StrongREJECT prompts")
    parser.add_argument("--tokens", type=int, default=32, help="length of the answers")
    parser.add_argument("--judge", default="arditi-substrings")
    parser.add_argument("--out", type=Path, help="write the records (parquet)")
    arguments = parser.parse_args()

    wb = Workbench.load("demo")
    safe = PromptCondition.preset("self-reminder")
    train, test = contrast_set().split("train"), contrast_set().split("test")
    strong = load_prompts(fetch_strongreject(), label="harmful", name="StrongREJECT")
    sets: dict[str, PromptSet] = {"built-in test": test, "StrongREJECT": strong.sample(arguments.strongreject)}

    vector = wb.shift(train.harmful, safe).steering_vector()
    awareness = wb.awareness_direction(train.harmful, train.harmless)
    site = Site(arguments.gate_layer)
    readings = read_for_gap(wb.loaded, [wb.render(prompt) for prompt in train], (site,))
    harmful = torch.tensor([prompt.label == "harmful" for prompt in train])
    values = readings.instruction[:, 0]
    threshold = fit_threshold(Condition(awareness, site), values[harmful], values[~harmful])

    plain = PromptCondition.plain()
    arms = [ArmSpec("plain", plain), ArmSpec("prompt only", safe)]
    for alpha in arguments.alpha:
        always = vector.intervention(arguments.layer, alpha)
        gated = awareness_gated(vector, arguments.layer, alpha, awareness, site, threshold)
        arms.append(ArmSpec(f"always on, alpha {alpha:g}", plain, (always,)))
        arms.append(ArmSpec(f"awareness-gated, alpha {alpha:g}", plain, (gated,)))
    settings = GenerationSettings(max_new_tokens=arguments.tokens)
    frames = []
    with ConsoleProgress() as progress:
        for name, prompts in sets.items():
            for arm in arms:
                frame = answer(
                    wb.loaded, wb.renderer, prompts, arm, settings, arguments.judge, report=progress, task=name
                )
                frames.append(frame.assign(label=f"{name}, " + frame["label"]))
    records = pd.concat(frames, ignore_index=True)
    if arguments.out:
        records.to_parquet(arguments.out)
    rates = refusal_rates(records)
    rates["cell"] = [
        f"{row.refused}/{row.n} = {100 * row.rate:.0f} % ({100 * row.low:.0f} to {100 * row.high:.0f})"
        for row in rates.itertuples()
    ]
    wide = rates.pivot(index="arm", columns="content", values="cell").loc[[arm.name for arm in arms]]
    print(f"Gate: awareness at {site}, threshold {threshold.threshold:.2f} in separation units", file=sys.stderr)
    print("| refused | " + " | ".join(wide.columns) + " |\n|" + "---|" * (len(wide.columns) + 1))
    for arm, row in wide.iterrows():
        print(f"| {arm} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
