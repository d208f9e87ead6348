"""The command that compares protocols, wordings, data sets and methods: protocols."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sgworkbench.cli.common import JsonOption, QuietOption, app, one_sentence, open_configured, print_json
from sgworkbench.progress import ConsoleProgress


@app.command()
@one_sentence
def protocols(
    out: Annotated[Path, typer.Option(help="Run directory; a run that was stopped there goes on.")],
    config: Annotated[Path | None, typer.Argument(help="YAML or JSON file with the settings; options win.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="demo, a name, a folder or a .gguf file.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", help="Prompts the vectors are read on; repeat for more data sets.")
    ] = None,
    harmless: Annotated[str | None, typer.Option(help="Harmless prompts for KL and top-1.")] = None,
    wording: Annotated[
        list[str] | None, typer.Option("--wording", help="Safety prompt; repeat for more wordings.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to steer one at a time, such as 20 or 40%,60%.")] = None,
    alpha: Annotated[list[float] | None, typer.Option("--alpha", help="Raw coefficient; repeat for more.")] = None,
    prompted: Annotated[
        bool | None, typer.Option("--prompted/--plain", help="Steer on top of the safety prompt, or plain prompts.")
    ] = None,
    n_train: Annotated[int | None, typer.Option(help="Prompts each vector is read on at most.")] = None,
    n_test: Annotated[int | None, typer.Option(help="Held-out prompts per class at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of samples, splits, control and intervals.")] = None,
    thinking: Annotated[bool | None, typer.Option("--thinking/--no-thinking", help="The template's switch.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="A torch device; by default CUDA when there is one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run with other settings.")] = False,
    images: Annotated[bool, typer.Option(help="Also write PNG files where a browser is found.")] = True,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare protocols, wordings, data sets and methods: cosines, norms, refusal shift and KL; tables and a page."""
    from sgworkbench.evaluation.protocol_study import ProtocolStudyConfig, run_protocol_study
    from sgworkbench.evaluation.study_config import read_settings
    from sgworkbench.prompting import PromptCondition, load_prompts
    from sgworkbench.reporting.protocol_report import comparisons, write_protocol_study
    from sgworkbench.runs import RunDirectory

    given: dict[str, Any] = {
        "model": model,
        "sources": prompts,
        "harmless": harmless,
        "wordings": wording,
        "layers": layers,
        "alphas": alpha,
        "prompted": prompted,
        "n_train": n_train,
        "n_test": n_test,
        "seed": seed,
        "thinking": thinking,
        "dtype": dtype,
        "device": device,
    }
    options = {name: value for name, value in given.items() if value not in (None, [])}
    settings = ProtocolStudyConfig.build(**{**({} if config is None else read_settings(config)), **options})
    for name in settings.wordings:
        PromptCondition.load(name)  # a misspelt preset should not cost the loading of a model
    sources = {source: load_prompts(source) for source in settings.sources}
    harmless_prompts = load_prompts(settings.harmless)
    loaded, renderer = open_configured(settings, quiet=quiet)
    contents = {
        "sources_sha256": [each.content_hash for each in sources.values()],
        "harmless_sha256": harmless_prompts.content_hash,
        "weights_sha256": loaded.identity.weights_sha256,
        "template_sha256": renderer.template_sha256,
    }
    run = RunDirectory.open(out, {**settings.model_dump(mode="json"), **contents}, overwrite=overwrite)
    with ConsoleProgress(quiet=quiet) as progress:
        study = run_protocol_study(settings, loaded, renderer, sources, harmless_prompts, run, report=progress)
        page, notes = write_protocol_study(study, run, images=images, report=progress)
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)
    table = comparisons(study)
    if json_output:
        print_json({"report": str(page), "comparisons": table.to_dict("records")})
        return
    shown = ["vector", "layer", "cosine", "norm_ratio", "refusal_shift_change", "kl_change"]
    print(table[shown].to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"Report: {page.resolve()}")
