"""The panel: controls, the work a change sets off, and the views it fills."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import ipywidgets as widgets

from sgworkbench.analysis import ARMS
from sgworkbench.analysis.gap import text_hash
from sgworkbench.errors import WorkbenchError
from sgworkbench.explorer import readings, views
from sgworkbench.explorer.cache import ResultCache
from sgworkbench.explorer.code import code_of
from sgworkbench.explorer.controls import Controls
from sgworkbench.explorer.readings import PromptRun, TokenGrid
from sgworkbench.explorer.session import Session
from sgworkbench.explorer.state import ExplorerState
from sgworkbench.explorer.streaming import CompletionStep, Scheduler, stream_completion
from sgworkbench.explorer.view import View
from sgworkbench.prompting import PromptCondition, PromptSet, RenderedPrompt
from sgworkbench.steering import GenerationSettings, Intervention

# A figure is redrawn after every round of this many tokens, texts after every token.
_REDRAW_EVERY = 4


class Panel:
    """The interactive explorer of one model.

    Attributes:
        session: model, directions and vector.
        controls: the widgets that set the state.
        view: the drawing half.
        cache: runs and completions by their settings.
        runs: the newest run of every arm.
        completions: the steps of every arm's completion so far.
    """

    def __init__(self, session: Session, prompts: dict[str, PromptSet], start: ExplorerState) -> None:
        """Make the panel and fill it.

        Args:
            session: model, directions and vector.
            prompts: the built-in prompts by the name shown.
            start: first settings.
        """
        self.session = session
        self.cache = ResultCache()
        self.runs: dict[str, PromptRun] = {}
        self.completions: dict[str, list[CompletionStep]] = {}
        self._grid: TokenGrid | None = None
        self._written_for: tuple[Any, ...] | None = None
        self.message = widgets.HTML()
        self.progress = widgets.IntProgress(layout=widgets.Layout(width="180px", display="none"))
        self.generate = widgets.Button(description="Generate", icon="play", button_style="primary")
        self.stop = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.follow = widgets.Checkbox(
            value=True,
            description="generate after every change",
            indent=False,
            layout=widgets.Layout(width="auto", margin="0 12px"),
        )
        self.show = widgets.ToggleButton(
            value=False, description="Show completions", icon="eye", layout=widgets.Layout(width="auto")
        )
        self.copy = widgets.Button(description="Copy as code", icon="copy")
        self.code = widgets.Textarea(rows=16, layout=widgets.Layout(width="99%", display="none"))
        self.view = View(self._received)
        self.scheduler = Scheduler(self._failed, self._busy)
        self.controls = Controls(session, prompts, start, self.refresh)
        self.generate.on_click(lambda _: self.refresh(generate=True))
        self.stop.on_click(lambda _: self._stopped())
        self.show.observe(lambda _: self._show_answers(), "value")
        self.copy.on_click(lambda _: self._copy())
        self.follow.observe(lambda change: self.refresh() if change["new"] else None, "value")
        self.box = self._layout()
        self.refresh()

    @property
    def state(self) -> ExplorerState:
        """The current settings."""
        return self.controls.state

    def refresh(self, *, generate: bool = False) -> None:
        """Bring the views up to date with the controls; a mistake becomes a message.

        Args:
            generate: write the completions even where they do not follow changes.
        """
        try:
            state = self.state
            state.check(self.session.n_layers)
        except WorkbenchError as error:
            self.scheduler.stop()
            self._failed(error)
            return
        self._tell(self._note(state))
        if not self.code.layout.display:
            self.code.value = code_of(state, self.session)
        self.scheduler.start(self._work(state, generate or bool(self.follow.value)))

    def _work(self, state: ExplorerState, generate: bool) -> Iterator[None]:
        """Do what a state asks for, quickest views first; between two steps it may be given up."""
        yield from self._read(state)
        key = self._completion_key(state)
        if key == self._written_for:
            self._draw_trajectories(state)
        elif generate:
            yield from self._write(state, key)
        else:
            self._title_answers(state, "of earlier settings; press Generate" if self.completions else "press Generate")

    def _read(self, state: ExplorerState) -> Iterator[None]:
        session = self.session
        items = self._items(state)
        steps = self._interventions(state)
        runs: dict[str, PromptRun] = {}
        # The plain arm is part of the map; the arm shown comes next, the others afterwards.
        for done, arm in enumerate(dict.fromkeys(("plain", state.arm, *ARMS)), 1):
            runs[arm] = self._run(items[arm], steps if arm in ("steered", "both") else [], state)
            self._report(done, len(ARMS))
            if arm == state.arm:
                self._draw_tokens(state, runs)
            yield
        self.runs = runs = {str(arm): runs[arm] for arm in ARMS}
        table = readings.gap_by_layer(runs, session.awareness, session.refusal)
        kind = session.refusal.sites[0].kind
        self.view.title("gap", f"Gap of this prompt by layer <small>{kind}, 0 acts on what it knows</small>")
        self.view.figure("gap", views.gap_figure(table, state, kind, theme=self.view.theme))
        self._draw_focus(state, runs)
        self._draw_next_tokens(state, runs)
        yield

    def _items(self, state: ExplorerState) -> dict[str, RenderedPrompt]:
        plain = self.session.renderer.render(state.prompt, PromptCondition.plain())
        safe = self.session.renderer.render(state.prompt, state.condition)
        return {"plain": plain, "prompted": safe, "steered": plain, "both": safe}

    def _interventions(self, state: ExplorerState) -> list[Intervention]:
        made = state.spec().build(self.session.sources, self.session.n_layers)
        made.check(self.session.loaded)
        return [made]

    def _run(self, item: RenderedPrompt, steps: list[Intervention], state: ExplorerState) -> PromptRun:
        kind = self.session.refusal.sites[0].kind
        loaded = self.session.loaded
        base: PromptRun = self.cache.get(
            ("run", item.token_ids, item.roles, None), lambda: readings.run_prompt(loaded, item, kind)
        )
        if not steps:
            return base
        key = ("run", item.token_ids, item.roles, state.spec().model_dump_json())
        return self.cache.get(key, lambda: readings.run_prompt(loaded, item, kind, interventions=steps, base=base))

    def _draw_tokens(self, state: ExplorerState, runs: Mapping[str, PromptRun]) -> None:
        directions = self.session.directions(state.concept)
        steered = f", {html.escape(state.strength)}" if state.arm in ("steered", "both") else ""
        self.view.title("tokens", f"Tokens <small>arm {views.arm_heading(state.arm)}{steered}</small>")
        self.view.html("tokens", views.tokens_html(runs[state.arm], directions, state))
        self._grid = readings.token_grid(runs["plain"], None if state.arm == "plain" else runs[state.arm], directions)
        what = f"{state.arm} minus plain" if self._grid.is_shift else "plain arm"
        described = html.escape(directions.describe())
        self.view.title("map", f"Shift by layer and token <small>{what}; {described}; click a cell to focus it</small>")
        self.view.figure("map", views.map_figure(self._grid, directions, state, theme=self.view.theme))

    def _draw_focus(self, state: ExplorerState, runs: Mapping[str, PromptRun]) -> None:
        directions = self.session.directions(state.concept)
        table = readings.focus_table(runs, directions, state.focus_layer, state.focus_token)
        where = "last prompt token" if state.focus_token is None else f"token {state.focus_token} of the plain prompt"
        self.view.title("focus", f"Focus <small>{directions.sites[state.focus_layer]}, {where}</small>")
        self.view.html("focus", views.focus_html(table, directions, state.focus_layer))

    def _draw_next_tokens(self, state: ExplorerState, runs: Mapping[str, PromptRun]) -> None:
        before, after = ("prompted", "both") if state.arm in ("prompted", "both") else ("plain", "steered")
        one, two = (readings.next_token_logits_of(self.session.loaded, runs[arm]) for arm in (before, after))
        table = readings.next_token_changes(one, two, self.session.loaded.tokenizer)
        self.view.title("next", f"First answer token <small>{after} against {before}</small>")
        self.view.html("next", views.next_token_html(table, before, after))

    def _completion_key(self, state: ExplorerState) -> tuple[Any, ...]:
        # What only the views depend on does not make completions outdated.
        seen = replace(state, arm="both", focus_token=None, focus_layer=0, shown=None, concept="refusal")
        return seen, state.spec()

    def _write(self, state: ExplorerState, key: tuple[Any, ...]) -> Iterator[None]:
        """Write all four completions side by side, one token each in turn."""
        items, steps = self._items(state), self._interventions(state)
        settings = GenerationSettings(state.max_new_tokens, state.temperature, seed=state.seed)
        concepts = (self.session.refusal, self.session.awareness)
        self._written_for = None
        self.completions = {arm: [] for arm in ARMS}
        self._title_answers(state, state.strength)
        streams: dict[str, Iterator[CompletionStep]] = {}
        keys = {}
        for name in ARMS:
            arm = str(name)
            used = steps if arm in ("steered", "both") else []
            spec = state.spec().model_dump_json() if used else None
            keys[arm] = ("answer", items[arm].token_ids, spec, settings)
            if keys[arm] in self.cache:
                self.completions[arm] = list(self.cache.get(keys[arm], list))
            else:
                streams[arm] = stream_completion(self.session.loaded, items[arm], settings, concepts, used)
            self._show_answer(arm)
        self._draw_trajectories(state)
        rounds = 0
        while streams:
            for arm in list(streams):
                step = next(streams[arm], None)
                if step is None:
                    del streams[arm]
                    self.cache.put(keys[arm], tuple(self.completions[arm]))
                else:
                    self.completions[arm].append(step)
                self._show_answer(arm)
                yield
            rounds += 1
            self._report(rounds, settings.max_new_tokens + 1)
            if rounds % _REDRAW_EVERY == 0 or not streams:
                self._draw_trajectories(state)
        self._written_for = key

    def _draw_trajectories(self, state: ExplorerState) -> None:
        directions = self.session.directions(state.concept)
        values = {
            arm: [float(step.projections[directions.concept][state.focus_layer]) for step in steps]
            for arm, steps in self.completions.items()
            if steps
        }
        site = directions.sites[state.focus_layer]
        self.view.title("trajectory", f"Along the completions <small>{state.concept} at {site}, by token</small>")
        figure = views.trajectory_figure(values, state.concept, str(site), theme=self.view.theme) if values else None
        self.view.figure("trajectory", figure)

    def _title_answers(self, state: ExplorerState, note: str) -> None:
        self.view.title("answers", f"Completions <small>{html.escape(note)}</small>")

    def _show_answers(self) -> None:
        for arm in self.completions:
            self._show_answer(arm)

    def _show_answer(self, arm: str) -> None:
        steps = self.completions[arm]
        written = sum(step.token_id is not None for step in steps)
        ended = any(step.finished for step in steps)
        state = f"{written} tokens{', ended' if ended else ''}"
        text = (steps[-1].text if steps else "") if self.show.value else None
        self.view.answer(arm, views.arm_heading(arm), state, text)

    def _received(self, message: Mapping[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "cell" and self._grid is not None:
            column, layer = int(message["column"]), int(message["layer"])
            if 0 <= column < len(self._grid.plain_positions) and 0 <= layer < self.session.n_layers:
                self.controls.focus(layer, self._grid.plain_positions[column])
        elif kind == "layer":
            layer = round(float(message["layer"]))
            if 0 <= layer < self.session.n_layers:
                self.controls.focus(layer, self.controls.focus_token)
        elif kind == "theme":
            self.refresh()

    def _note(self, state: ExplorerState) -> str:
        fitted: set[str] = set()
        for directions in (self.session.awareness, self.session.refusal):
            fitted |= set(directions.provenance.get("train_texts_sha256", []))
        if text_hash(state.prompt) in fitted:
            return "This prompt is one of those the directions were fitted on; its projections are not held out."
        return ""

    def _copy(self) -> None:
        self.code.value = code_of(self.state, self.session)
        self.code.layout.display = None
        self.view.copy(self.code.value)

    def _stopped(self) -> None:
        self.scheduler.stop()
        self._tell("Stopped; change a setting or press Generate to go on.")

    def _busy(self, busy: bool) -> None:
        self.stop.disabled = not busy
        self.progress.layout.display = None if busy else "none"

    def _report(self, done: int, total: int) -> None:
        self.progress.max, self.progress.value = total, min(done, total)

    def _failed(self, error: Exception) -> None:
        text = str(error) if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
        self._tell(text, mistake=True)

    def _tell(self, text: str, *, mistake: bool = False) -> None:
        colour = "var(--jp-error-color1, #b02a37)" if mistake else "var(--jp-ui-font-color2, inherit)"
        shown = html.escape(text)
        self.message.value = f"<div role='status' style='color:{colour};line-height:1.5'>{shown}</div>" if text else ""

    def _layout(self) -> Any:
        session = self.session
        origin = (session.vector.provenance.get("condition") or {}).get("name", "unknown condition")
        prompts = session.vector.provenance.get("prompts")
        n = f", {prompts['n']} prompts" if isinstance(prompts, dict) and "n" in prompts else ""
        facts = f"{session.loaded.identity.name}, {session.n_layers} layers · vector: shift of {origin}{n}"
        heading = widgets.HTML(f"<b>Explorer</b> · {html.escape(facts)}")
        buttons = widgets.HBox(
            [self.generate, self.stop, self.follow, self.show, self.copy, self.progress],
            layout=widgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        return widgets.VBox([heading, self.controls.box, buttons, self.message, self.code, self.view.widget])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)
