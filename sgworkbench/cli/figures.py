"""The command that makes the paper figures: figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sgworkbench.cli.common import (
    ConditionOption,
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
)
from sgworkbench.errors import WorkbenchError
from sgworkbench.progress import ConsoleProgress


@app.command()
@one_sentence
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="Figures to make; all by default. See --list.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
    runs: Annotated[Path, typer.Option(help="Folder of the measurements; what is there is not measured again.")] = Path(
        "figure_runs"
    ),
    model: ModelOption = "demo",
    published_only: Annotated[
        bool, typer.Option("--published-only", help="Only what was published; loads no model.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="Few prompts: to see that everything works, not for numbers.")] = False,
    list_figures: Annotated[bool, typer.Option("--list", help="List the figures and stop.")] = False,
    harmful: Annotated[str, typer.Option(help="Harmful prompts: a file, a built-in name or hub:ORG/NAME.")] = (
        "builtin:contrast/harmful"
    ),
    harmless: Annotated[str, typer.Option(help="Harmless prompts, likewise.")] = "builtin:contrast/harmless",
    condition: ConditionOption = "self-reminder",
    layers: Annotated[str | None, typer.Option(help="Layers to steer, such as 20 or 10-14,20.")] = None,
    alpha: Annotated[float, typer.Option(help="Steering coefficient, raw.")] = 0.5,
    judge: Annotated[str, typer.Option(help="Judge of answers.")] = "arditi-substrings",
    seed: Annotated[int, typer.Option(help="Seed of samples, splits, nulls and maps.")] = 0,
    images: Annotated[bool, typer.Option(help="Also write PNG files where a browser is found.")] = True,
    system_in_user: SystemInUserOption = False,
    chat_template: TemplateOption = None,
    thinking: ThinkingOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    context_length: ContextOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make the paper figures: published numbers and a model's own, side by side, with tables and an index page."""
    from sgworkbench.paper.figures import FIGURES, choose_figures
    from sgworkbench.paper.measured import FigureSettings, Measured, Sizes
    from sgworkbench.paper.render import check_folder, draw, write_figures

    chosen = choose_figures(names or ())
    if list_figures:
        if json_output:
            print_json([{"name": recipe.name, "title": recipe.title} for recipe in chosen])
        else:
            width = max(len(recipe.name) for recipe in chosen)
            for recipe in chosen:
                print(f"{recipe.name:{width}}  {recipe.title}")
        return
    check_folder(out)
    with ConsoleProgress(quiet=quiet) as progress:
        measured = None
        if not published_only:
            settings = FigureSettings.build(
                model=model,
                harmful=harmful,
                harmless=harmless,
                condition=condition,
                system_in_user=system_in_user,
                layers=layers,
                alpha=alpha,
                judge=judge,
                seed=seed,
                thinking=thinking,
                chat_template=None if chat_template is None else str(chat_template),
                dtype=dtype,
                device=device,
                context_length=context_length,
                sizes=Sizes.quick() if quick else Sizes.model_validate({}),
            )
            measured = Measured(
                settings,
                runs,
                lambda: open_model(
                    model,
                    chat_template=chat_template,
                    thinking=thinking,
                    dtype=dtype,
                    device=device,
                    context_length=context_length,
                    quiet=quiet,
                ),
                report=progress,
            )
        drawn, absent = draw(chosen, measured)
        if not drawn:
            raise WorkbenchError(
                f"The {'figure has' if len(chosen) == 1 else 'figures have'} no published side; leave out "
                "--published-only."
            )
        written = write_figures(drawn, out, recipes=FIGURES, absent=absent, images=images, report=progress)
    for note in written.notes:
        print(f"Note: {note}", file=sys.stderr)
    for name, reason in absent.items():
        print(f"Note: {name} was not drawn: {reason}", file=sys.stderr)
    if json_output:
        runs_folder = None if measured is None else str(measured.folder)
        print_json({"index": str(written.index), "figures": list(written.names), "absent": absent, "runs": runs_folder})
    else:
        print(f"{len(written.names)} figures: {written.index.resolve()}")
