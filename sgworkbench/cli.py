"""The command line: thin commands over the same functions that notebooks call."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from sgworkbench.errors import WorkbenchError
from sgworkbench.progress import ConsoleProgress

app = typer.Typer(
    name="sgworkbench",
    help="Safety prompting, safety steering and the awareness-compliance gap, on TransformerLens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="demo, a TransformerLens name, a model folder or a .gguf file.")
]
ConditionOption = Annotated[
    str, typer.Option("--condition", help="Safety prompt: a preset's name, or a YAML or JSON file.")
]
ProtocolOption = Annotated[str, typer.Option(help="Where vectors are written: same-site or official.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a machine-readable summary to standard output.")]
TemplateOption = Annotated[
    Path | None, typer.Option("--chat-template", help="Jinja file used instead of the tokenizer's template.")
]
ThinkingOption = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="The chat template's thinking switch.")
]
SystemInUserOption = Annotated[
    bool, typer.Option("--system-in-user", help="Put the system message into the user turn (templates without one).")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
DeviceOption = Annotated[str | None, typer.Option(help="A torch device; by default CUDA when there is one.")]
ContextOption = Annotated[int | None, typer.Option("--context-length", help="Tokens to load the model for.")]
TextFieldOption = Annotated[str | None, typer.Option("--text-field", help="Field or column that holds the prompt.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

Command = TypeVar("Command", bound=Callable[..., Any])


def _one_sentence(command: Command) -> Command:
    """Turn a user's mistake into one sentence on standard error and exit status 2, without a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_note
            try:
                return command(*args, **kwargs)
            except WorkbenchError as error:
                _fail(str(error))
            except KeyboardInterrupt:
                print("Stopped; finished stages are kept, the same command goes on from there.", file=sys.stderr)
                raise typer.Exit(130) from None

    return wrapped  # type: ignore[return-value]


def _fail(message: str) -> None:
    print(f"Error: {message}", file=sys.stderr)
    raise typer.Exit(2)


def _show_note(message: Any, category: Any, *_: Any, **__: Any) -> None:
    # Only our own notes are for the user of a command; libraries' warnings are for their developers.
    if category is UserWarning and "chat template" in str(message):
        print(f"Note: {message}", file=sys.stderr)


def _open(
    model: str,
    *,
    chat_template: Path | None,
    thinking: bool | None,
    dtype: str = "float32",
    device: str | None = None,
    context_length: int | None = None,
    quiet: bool = False,
) -> tuple[Any, Any]:
    """Load the model and make its renderer."""
    from sgworkbench.downloads import print_progress
    from sgworkbench.models import load_model
    from sgworkbench.prompting import Renderer

    template = None
    if chat_template is not None:
        if not chat_template.is_file():
            raise WorkbenchError(f"The chat template file {str(chat_template)!r} does not exist.")
        template = chat_template.read_text(encoding="utf-8")
    loaded = load_model(
        model,
        dtype=dtype,
        device=device,
        context_length=context_length,
        progress=(lambda _: None) if quiet else print_progress,
    )
    return loaded, Renderer(loaded.tokenizer, template, thinking)


def _condition(name: str | None, system_in_user: bool) -> Any:
    from sgworkbench.prompting import PromptCondition

    condition = PromptCondition.load(name) if name else PromptCondition.plain()
    return condition.with_system_in_user_turn() if system_in_user else condition


def _prompts(source: str, text_field: str | None, label: str | None = None) -> Any:
    from sgworkbench.prompting import load_prompts

    return load_prompts(source, fields={"text": text_field} if text_field else None, label=label)  # type: ignore[arg-type]


def _print_json(summary: Any) -> None:
    print(json.dumps(summary, indent=2, default=lambda value: value.item() if hasattr(value, "item") else str(value)))


@app.command()
@_one_sentence
def demo(
    out: Annotated[Path, typer.Option(help="Run directory; a run that was stopped there goes on.")] = Path("demo_run"),
    quick: Annotated[bool, typer.Option(help="Few prompts: to see that everything works, not for numbers.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a run with other settings.")] = False,
    images: Annotated[bool, typer.Option(help="Also write PNG files where a browser is found.")] = True,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole study on the demo model and the built-in prompts, and write a report."""
    settings: dict[str, Any] = {"harmful": "builtin:contrast/harmful", "harmless": "builtin:contrast/harmless"}
    if quick:
        settings |= {"n_train": 12, "n_validation": 6, "n_test": 8, "n_answers": 4, "n_causal": 4, "n_map": 4}
    _study({"model": "demo", **settings}, out, overwrite, images, json_output, quiet)


@app.command()
@_one_sentence
def gap(
    harmful: Annotated[str, typer.Option(help="Harmful prompts: a file, builtin:contrast/harmful or hub:ORG/NAME.")],
    harmless: Annotated[str, typer.Option(help="Harmless prompts, likewise.")],
    out: Annotated[Path, typer.Option(help="Run directory; a run that was stopped there goes on.")],
    model: ModelOption = "demo",
    condition: ConditionOption = "self-reminder",
    layers: Annotated[str | None, typer.Option(help="Layers to steer, such as 20 or 10-14,20.")] = None,
    alpha: Annotated[float, typer.Option(help="Steering coefficient, raw.")] = 0.5,
    protocol: ProtocolOption = "same-site",
    refusal_source: Annotated[str, typer.Option(help="judged, content or unembedding.")] = "judged",
    judge: Annotated[str, typer.Option(help="Judge of answers.")] = "arditi-substrings",
    n_train: Annotated[int, typer.Option(help="Training prompts per class at most.")] = 60,
    n_test: Annotated[int, typer.Option(help="Test prompts per class at most.")] = 100,
    n_answers: Annotated[int, typer.Option(help="Test prompts per class answered in every arm; 0 for none.")] = 30,
    answer_tokens: Annotated[int, typer.Option(help="Length of those answers.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of samples, splits, nulls and intervals.")] = 0,
    system_in_user: SystemInUserOption = False,
    chat_template: TemplateOption = None,
    thinking: ThinkingOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    context_length: ContextOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run with other settings.")] = False,
    images: Annotated[bool, typer.Option(help="Also write PNG files where a browser is found.")] = True,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure the awareness-compliance gap of a model on your prompts: tables, pictures and a report."""
    settings = {
        "model": model,
        "harmful": harmful,
        "harmless": harmless,
        "condition": condition,
        "system_in_user": system_in_user,
        "layers": layers,
        "alpha": alpha,
        "protocol": protocol,
        "refusal_source": refusal_source,
        "judge": judge,
        "n_train": n_train,
        "n_test": n_test,
        "n_answers": n_answers,
        "answer_tokens": answer_tokens,
        "seed": seed,
        "thinking": thinking,
        "chat_template": None if chat_template is None else str(chat_template),
        "dtype": dtype,
        "device": device,
        "context_length": context_length,
    }
    _study(settings, out, overwrite, images, json_output, quiet)


def _study(settings: dict[str, Any], out: Path, overwrite: bool, images: bool, json_output: bool, quiet: bool) -> None:
    from sgworkbench.evaluation.study import run_study
    from sgworkbench.evaluation.study_config import StudyConfig
    from sgworkbench.prompting import load_prompts
    from sgworkbench.reporting import write_study
    from sgworkbench.runs import RunDirectory

    config = StudyConfig.build(**settings)
    harmful, harmless = load_prompts(config.harmful), load_prompts(config.harmless)
    config.prompt_condition()  # a misspelt preset should not cost the loading of a model
    loaded, renderer = _open(
        config.model,
        chat_template=None if config.chat_template is None else Path(config.chat_template),
        thinking=config.thinking,
        dtype=config.dtype,
        device=config.device,
        context_length=config.context_length,
        quiet=quiet,
    )
    # Results depend on contents, not on file names: a changed prompt file or model is another run.
    contents = {
        "harmful_sha256": harmful.content_hash,
        "harmless_sha256": harmless.content_hash,
        "weights_sha256": loaded.identity.weights_sha256,
        "template_sha256": renderer.template_sha256,
    }
    run = RunDirectory.open(out, {**config.model_dump(mode="json"), **contents}, overwrite=overwrite)
    with ConsoleProgress(quiet=quiet) as progress:
        result = run_study(config, loaded, renderer, harmful, harmless, run, report=progress)
        page, notes = write_study(result, run, images=images, report=progress)
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)
    if json_output:
        _print_json({**result.summary(), "report": str(page)})
    else:
        _print_study(result)
        print(f"Report: {page.resolve()}")


def _print_study(result: Any) -> None:
    summary = result.summary()
    area = summary["awareness_auroc"]
    console = Console()
    console.print(
        f"Awareness, held-out AUROC at {summary['awareness_site']}: {area['value']:.2f} "
        f"({area['low']:.2f} to {area['high']:.2f}), n = {area['n']}"
    )
    table = Table(title=f"{summary['model']}, {summary['condition']}, test prompts")
    for column in ("arm", f"gap at {summary['shown_site']}", "refused, harmful", "refused, harmless"):
        table.add_column(column)
    rates = {(row["arm"], row["content"]): row for row in summary["refusal_rates"]}
    for arm, row in summary["gap"].items():
        cells = [f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"]
        for content in ("harmful", "harmless"):
            r = rates.get((arm, content))
            cells.append(
                "-" if r is None else f"{r['refused']}/{r['n']} ({100 * r['low']:.0f} to {100 * r['high']:.0f} %)"
            )
        table.add_row(arm, *cells)
    console.print(table)
    direction = summary["refusal_direction"]
    state = "validated" if direction["validated"] else "NOT validated by the causal check"
    console.print(f"Refusal direction: {direction['source']}; {state}")


@app.command()
@_one_sentence
def doctor(
    model: Annotated[
        str, typer.Argument(help="demo, a TransformerLens name, a model folder or a .gguf file.")
    ] = "demo",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the table to this file.")] = None,
    chat_template: TemplateOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    context_length: ContextOption = None,
    quiet: QuietOption = False,
) -> None:
    """Check reading, steering and generation of a model against transformers; exit status 1 when a check fails."""
    from sgworkbench.downloads import print_progress
    from sgworkbench.evaluation.doctor import doctor_summary, run_doctor
    from sgworkbench.models import load_model
    from sgworkbench.prompting import Renderer
    from sgworkbench.tensor_files import write_text

    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    # The checks themselves are the comparison, so the one at loading is turned off: its failure would hide the others.
    loaded = load_model(
        model,
        dtype=dtype,
        device=device,
        context_length=context_length,
        self_check=False,
        progress=(lambda _: None) if quiet else print_progress,
    )
    with ConsoleProgress(quiet=quiet) as progress:
        checks = run_doctor(loaded, Renderer(loaded.tokenizer, template), report=progress)
    summary = doctor_summary(loaded, checks)
    table = Table(title=f"{loaded.identity.name} ({loaded.identity.architecture}, {loaded.identity.dtype})")
    for column in ("check", "result", "detail"):
        table.add_column(column)
    colours = {"pass": "green", "FAIL": "bold red", "note": "yellow"}
    for check in checks:
        table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", check.detail)
    Console().print(table)
    if json_file is not None:
        write_text(json_file, json.dumps(summary, indent=2) + "\n")
    if not summary["passed"]:
        raise typer.Exit(1)


@app.command()
@_one_sentence
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
    chosen, prompt_set = _condition(condition, system_in_user), _prompts(prompts, text_field)
    loaded, renderer = _open(
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
        _print_json({"out": str(out), "protocol": protocol, **vector.provenance, "layers": table.to_dict("records")})
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
@_one_sentence
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
    chosen, prompt_set = _condition(condition, system_in_user), _prompts(prompts, text_field)
    if (vector is None) != (layers is None) or (vector is None and alpha is not None):
        raise WorkbenchError("Steering needs --vector, --layers and --alpha together; give all of them or none.")
    if vector is not None and alpha is None:
        raise WorkbenchError("Steering needs a coefficient: give --alpha.")
    steerer = None if vector is None else SteeringVector.load(vector)
    if steerer is not None and protocol is not None:
        steerer = steerer.with_protocol(protocol)
    loaded, renderer = _open(
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
        _print_json(summary)
    else:
        print(f"{len(answers)} answers ({finished} ended by the model) written to {out}")


@app.command()
@_one_sentence
def render(
    prompt: Annotated[str, typer.Option(help="The instruction.")],
    model: ModelOption = "demo",
    condition: Annotated[str | None, typer.Option("--condition", help="Safety prompt; none by default.")] = None,
    system_in_user: SystemInUserOption = False,
    chat_template: TemplateOption = None,
    thinking: ThinkingOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the tokens of a rendered prompt with their roles."""
    from sgworkbench.models import load_tokenizer
    from sgworkbench.prompting import Renderer
    from sgworkbench.prompting.inspection import rendered_text

    if chat_template is not None and not chat_template.is_file():
        raise WorkbenchError(f"The chat template file {str(chat_template)!r} does not exist.")
    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    chosen = _condition(condition, system_in_user)
    rendered = Renderer(load_tokenizer(model), template, thinking).render(prompt, chosen)
    if json_output:
        tokens = [
            {"index": index, "id": rendered.token_ids[index], "text": text, "role": rendered.roles[index]}
            for index, text in enumerate(rendered.tokens)
        ]
        _print_json(
            {
                "model": model,
                "condition": chosen.name,
                "text": rendered.text,
                "last_instruction_position": rendered.last_instruction_position,
                "last_prompt_position": rendered.last_prompt_position,
                "tokens": tokens,
            }
        )
    else:
        Console().print(rendered_text(rendered))


def main() -> None:
    """Run the command line."""
    app()
