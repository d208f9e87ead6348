"""The commands that make and use steering vectors: extract and generate."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sgworkbench.cli.common import (
    ConditionOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ProtocolOption,
    QuietOption,
    SystemInUserOption,
    TemplateOption,
    TextFieldOption,
    ThinkingOption,
    app,
    one_sentence,
    open_model,
    print_json,
    read_condition,
    read_prompts,
)
from sgworkbench.errors import WorkbenchError
from sgworkbench.progress import ConsoleProgress


@app.command()
@one_sentence
def extract(
    prompts: Annotated[str, typer.Option(help="Prompts: a file, builtin:contrast/harmful/train or hub:ORG/NAME.")],
    condition: ConditionOption,
    out: Annotated[Path, typer.Option(help="Where the vectors go (.safetensors).")],
    model: ModelOption = "demo",
    protocol: ProtocolOption = "same-site",
    text_field: TextFieldOption = None,
    system_in_user: SystemInUserOption = False,
    chat_template: TemplateOption = None,
    thinking: ThinkingOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    context_length: ContextOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Extract steering vectors: the mean shift a safety prompt causes at the last prompt token, for every layer."""
    from sgworkbench.analysis import safety_shift
    from sgworkbench.errors import unknown_name
    from sgworkbench.steering import PROTOCOLS

    if protocol not in PROTOCOLS:
        raise unknown_name("protocol", protocol, PROTOCOLS)
    chosen, prompt_set = read_condition(condition, system_in_user), read_prompts(prompts, text_field)
    loaded, renderer = open_model(
        model,
        chat_template=chat_template,
        thinking=thinking,
        dtype=dtype,
        device=device,
        context_length=context_length,
        quiet=quiet,
    )
    with ConsoleProgress(quiet=quiet) as progress:
        shift = safety_shift(loaded, renderer, prompt_set, chosen, report=progress)
    vector = shift.steering_vector(protocol)
    vector.save(out)
    table = vector.to_dataframe()
    if json_output:
        print_json({"out": str(out), "protocol": protocol, **vector.provenance, "layers": table.to_dict("records")})
    else:
        console = Console()
        shown = Table(title=f"{chosen.name}: mean shift over {len(prompt_set)} prompts, last prompt token")
        for column in table.columns:
            shown.add_column(str(column))
        for row in table.itertuples(index=False):
            shown.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
        console.print(shown)
        print(f"Written: {out}")


@app.command(name="generate")
@one_sentence
def generate_command(
    prompts: Annotated[str, typer.Option(help="Prompts: a file, builtin:... or hub:ORG/NAME.")],
    out: Annotated[Path, typer.Option(help="Answers, one JSON object a line, in the order of the prompts.")],
    model: ModelOption = "demo",
    condition: Annotated[str | None, typer.Option("--condition", help="Safety prompt; none by default.")] = None,
    vector: Annotated[Path | None, typer.Option(help="Steering vectors made by extract.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to steer, such as 20 or 10-14,20.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Steering coefficient, raw.")] = None,
    protocol: Annotated[str | None, typer.Option(help="same-site or official; the vector's own by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 is everything.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    text_field: TextFieldOption = None,
    system_in_user: SystemInUserOption = False,
    chat_template: TemplateOption = None,
    thinking: ThinkingOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    context_length: ContextOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Generate answers, with or without a safety prompt and steering. Answers go to the file, not to the screen."""
    from sgworkbench.analysis import parse_layers
    from sgworkbench.steering import GenerationSettings, SteeringVector, generate, steering
    from sgworkbench.tensor_files import write_text

    settings = GenerationSettings(max_new_tokens, temperature, top_p, seed)
    chosen, prompt_set = read_condition(condition, system_in_user), read_prompts(prompts, text_field)
    if (vector is None) != (layers is None) or (vector is None and alpha is not None):
        raise WorkbenchError("Steering needs --vector, --layers and --alpha together; give all of them or none.")
    if vector is not None and alpha is None:
        raise WorkbenchError("Steering needs a coefficient: give --alpha.")
    steerer = None if vector is None else SteeringVector.load(vector)
    if steerer is not None and protocol is not None:
        steerer = steerer.with_protocol(protocol)
    loaded, renderer = open_model(
        model,
        chat_template=chat_template,
        thinking=thinking,
        dtype=dtype,
        device=device,
        context_length=context_length,
        quiet=quiet,
    )
    interventions, steered = [], None
    if steerer is not None and layers is not None and alpha is not None:
        for note in steerer.check_model(loaded):
            print(f"Note: {note}", file=sys.stderr)
        indices = parse_layers(layers, loaded.identity.n_layers)
        interventions = [steerer.intervention(indices, alpha)]
        sites = [str(steerer.write_site(layer)) for layer in indices]
        steered = {"layers": list(indices), "alpha": alpha, "protocol": steerer.protocol, "written_to": sites}
    rendered = [renderer.render(prompt, chosen) for prompt in prompt_set]
    with ConsoleProgress(quiet=quiet) as progress, steering(loaded, interventions):
        answers = generate(loaded, rendered, settings, report=progress)
    common = {"model": loaded.identity.name, "condition": chosen.name, "steering": steered, **asdict(settings)}
    lines = [
        json.dumps(
            {
                "id": prompt.id,
                "prompt": prompt.text,
                "text": answer.text,
                "token_ids": list(answer.token_ids),
                "finished": answer.finished,
                "settings": common,
            },
            ensure_ascii=False,
        )
        for prompt, answer in zip(prompt_set, answers, strict=True)
    ]
    write_text(out, "\n".join(lines) + "\n")
    finished = sum(answer.finished for answer in answers)
    summary = {"out": str(out), "n": len(answers), "finished": finished, "settings": common}
    if json_output:
        print_json(summary)
    else:
        print(f"{len(answers)} answers ({finished} ended by the model) written to {out}")
