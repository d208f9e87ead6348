"""The command that shows where a vector is read and written: audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sgworkbench.cli.common import (
    ContextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuietOption,
    SystemInUserOption,
    TemplateOption,
    ThinkingOption,
    app,
    one_sentence,
    open_model,
    print_json,
    read_condition,
)


@app.command(name="audit")
@one_sentence
def audit_command(
    vector: Annotated[Path, typer.Option(help="Steering vectors made by extract.")],
    prompt: Annotated[str, typer.Option(help="The instruction to look at.")],
    layers: Annotated[str, typer.Option(help="Layers to steer, such as 20, 10-14,20 or 50%.")],
    alpha: Annotated[float, typer.Option(help="Steering coefficient, raw.")] = 1.0,
    condition: Annotated[
        str | None, typer.Option("--condition", help="Safety prompt; the one of the vector by default.")
    ] = None,
    arm: Annotated[str, typer.Option(help="both steers the prompted run, steered the plain one.")] = "both",
    protocol: Annotated[
        str | None, typer.Option(help="Write the vector by another protocol than its own: same-site or official.")
    ] = None,
    decode: Annotated[int, typer.Option(help="Decode steps to look at.")] = 3,
    model: ModelOption = "demo",
    system_in_user: SystemInUserOption = False,
    chat_template: TemplateOption = None,
    thinking: ThinkingOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    context_length: ContextOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show, for a vector and a prompt, every token, index, layer and site that is read and written.

    The tables are recorded from the hooks while the prompt is extracted and steered.
    """
    import pandas as pd

    from sgworkbench.steering import SteeringVector
    from sgworkbench.steering.audit import audit

    steerer = SteeringVector.load(vector)
    steerer = steerer if protocol is None else steerer.with_protocol(protocol)
    chosen = None if condition is None else read_condition(condition, system_in_user)
    loaded, renderer = open_model(
        model,
        chat_template=chat_template,
        thinking=thinking,
        dtype=dtype,
        device=device,
        context_length=context_length,
        quiet=quiet,
    )
    found = audit(
        loaded,
        renderer,
        steerer,
        prompt,
        layers=layers,
        alpha=alpha,
        condition=chosen,
        arm=arm,
        n_decode=decode,
    )
    if json_output:
        print_json(found.to_dict())
        return
    console = Console()
    console.print(
        f"Protocol {found.protocol} on {found.model}: layers {', '.join(map(str, found.layers))}, coefficient "
        f"{found.alpha:g}, {found.condition}, arm {found.arm}",
        markup=False,
    )
    _print(console, "Read", found.reads[["rendering", "index", "token_id", "token", "role", "site"]])
    written = found.by_token()
    if written["sites"].nunique() == 1:
        console.print(f"Every token below is written at {written['sites'].iloc[0]}.", markup=False)
        written = written.drop(columns="sites")
    counts = ", ".join(f"{n} tokens seen in {phase}" for phase, n in found.n_tokens.items())
    _print(console, f"Written ({counts})", written)
    names = ["site", "hook_name", "hidden_states_index", "svec_key"]
    sites = pd.concat([found.reads[names].assign(action="read"), found.writes[names].assign(action="written")])
    _print(console, "The sites by their names elsewhere", sites.drop_duplicates()[["action", *names]])
    for note in found.notes:
        console.print(f"Note: {note}", markup=False)


def _print(console: Console, title: str, table: Any) -> None:
    shown = Table(title=title, title_justify="left")
    for column in table.columns:
        shown.add_column(str(column).replace("_", " "))
    for row in table.itertuples(index=False):
        shown.add_row(*(_cell(value) for value in row))
    console.print(shown)


def _cell(value: Any) -> str:
    import pandas as pd

    if value is None or pd.isna(value):
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.3f}"
    # Brackets would be read as markup, and line breaks would tear the table.
    return repr(value)[1:-1].replace("[", r"\[") if isinstance(value, str) else str(value)
