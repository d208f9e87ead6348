"""The interactive explorer: a notebook panel over prompts, safety prompts, steering and the gap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgworkbench.analysis import Directions
from sgworkbench.evaluation.direction_fitting import RefusalSource
from sgworkbench.explorer.code import code_of
from sgworkbench.explorer.readings import aligned_positions
from sgworkbench.explorer.session import HasModel, Session, open_session
from sgworkbench.explorer.state import ExplorerState
from sgworkbench.explorer.view import require_widgets
from sgworkbench.progress import ConsoleProgress, Reporter, silent
from sgworkbench.prompting import PromptCondition, PromptSet, contrast_set
from sgworkbench.prompting.prompt_files import everyday_set
from sgworkbench.steering import SteeringVector

if TYPE_CHECKING:
    from sgworkbench.explorer.panel import Panel

__all__ = ["ExplorerState", "Session", "aligned_positions", "code_of", "explore", "open_session", "require_widgets"]


def explore(
    workbench: HasModel,
    *,
    awareness: Directions | None = None,
    refusal: Directions | None = None,
    vector: SteeringVector | None = None,
    condition: PromptCondition | None = None,
    refusal_source: RefusalSource = "content",
    prompt: str | None = None,
    prompts: PromptSet | None = None,
    max_new_tokens: int = 48,
    report: Reporter | None = None,
) -> Panel:
    """Return the interactive explorer of a workbench's model; as the last line of a cell it displays itself.

    What is not given is fitted on training prompts of the built-in contrast set, with progress, once per model and
    Python process. The panel offers the prompts of the test split.

    Args:
        workbench: model and renderer.
        awareness: awareness directions, one per layer.
        refusal: refusal directions, one per layer.
        vector: the steering vector.
        condition: the safety prompt to fit the vector with and to start from; self-reminder by default.
        refusal_source: how a missing refusal direction is fitted: `content`, or `judged` from the model's own answers.
        prompt: the first prompt.
        prompts: further prompts to choose from.
        max_new_tokens: first length of the completions, 4 to 256.
        report: progress callback of the fits.

    Raises:
        WorkbenchError: ipywidgets or anywidget is missing, or directions or vector do not belong to the model.
    """
    require_widgets()
    from sgworkbench.explorer.panel import Panel

    quiet = report is not None or workbench.report is not silent
    with ConsoleProgress(quiet=quiet) as console:
        session = open_session(
            workbench,
            awareness=awareness,
            refusal=refusal,
            vector=vector,
            condition=condition,
            refusal_source=refusal_source,
            report=report or (workbench.report if quiet else console),
        )
    test = contrast_set().split("test")
    offered = {
        "harmful (contrast, test)": test.harmful,
        "harmless look-alikes (test)": test.harmless,
        "everyday (test)": everyday_set().split("test"),
    }
    if prompts is not None:
        offered = {prompts.name: prompts, **offered}
    first = next(iter(offered.values())).prompts[0].text
    middle = session.n_layers // 2
    start = ExplorerState(
        prompt=first if prompt is None else prompt,
        condition=session.condition,
        layers=(middle, middle),
        protocol=session.vector.protocol,
        focus_layer=min(session.n_layers - 1, (3 * session.n_layers) // 4),
        max_new_tokens=max_new_tokens,
    )
    return Panel(session, offered, start)
