"""The Python code that reproduces a state of the panel with the package's ordinary functions, not with the panel's."""

from __future__ import annotations

from sgworkbench.explorer.session import N_TRAIN, Session
from sgworkbench.explorer.state import ExplorerState
from sgworkbench.prompting import PRESETS, PromptCondition
from sgworkbench.steering import InterventionSpec, SelectorSpec


def code_of(state: ExplorerState, session: Session) -> str:
    """Return a script that ends with the panel's numbers.

    It leaves `gap` (a GapResult), `tokens` (the coloured projections), `grid` (the map), `next_token` (logits of the
    first answer token per arm) and `answers` (per arm). What was given to `wb.explore(...)` is expected under the names
    `awareness`, `refusal` and `vector`; what was fitted is fitted again.
    """
    lines = [
        "from sgworkbench import GenerationSettings, PromptCondition, PromptSet, Workbench, contrast_set",
        "from sgworkbench.analysis import all_sites, capture, measure_gap, read_for_gap",
        "from sgworkbench.explorer import aligned_positions",
        "from sgworkbench.steering import InterventionSpec, SelectorSpec, generate",
        "from sgworkbench.steering.generation import last_logits",
        "",
        *_workbench(session),
        *_sources(session),
        "",
        f"prompt = {state.prompt!r}",
        f"condition = {_condition(state.condition)}",
        f"steering = {_spec(state.spec())}",
        'sources = {"vector": vector, "refusal": refusal, "awareness": awareness}',
        "intervention = steering.build(sources, wb.n_layers)",
        "plain = PromptCondition.plain()",
        "arms = {",
        '    "plain": (plain, []),',
        '    "prompted": (condition, []),',
        '    "steered": (plain, [intervention]),',
        '    "both": (condition, [intervention]),',
        "}",
        "",
        f"sites = all_sites(wb.n_layers, {session.refusal.sites[0].kind!r})",
        "readings, next_token, answers, projected, rendered = {}, {}, {}, {}, {}",
        f"settings = GenerationSettings(max_new_tokens={state.max_new_tokens}, temperature={state.temperature!r}, "
        f"seed={state.seed})",
        "for arm, (around, steps) in arms.items():",
        "    rendered[arm] = wb.render(prompt, around)",
        "    with wb.intervene(*steps):",
        "        readings[arm] = read_for_gap(wb.loaded, [rendered[arm]], sites)",
        '        everything = capture(wb.loaded, [rendered[arm]], sites, "all").values',
        "        next_token[arm] = next(iter(last_logits(wb.loaded, [rendered[arm]])))[1][0]",
        "        answers[arm] = generate(wb.loaded, [rendered[arm]], settings)[0].text",
        f"    projected[arm] = {state.concept}.in_separation_units(everything)  # token x layer",
        "",
        'gap = measure_gap(readings, PromptSet.from_texts([prompt], label="harmful"), awareness, refusal)',
        f"tokens = projected[{state.arm!r}][:, {state.focus_layer}]",
        *_grid(state),
    ]
    return "\n".join(lines) + "\n"


def _workbench(session: Session) -> list[str]:
    identity, renderer = session.loaded.identity, session.renderer
    options = [repr(identity.source), f"dtype={identity.dtype!r}", f"context_length={identity.context_length}"]
    if renderer.chat_template is not None:
        options.append(f"chat_template={renderer.chat_template!r}")
    if renderer.thinking is not None:
        options.append(f"thinking={renderer.thinking!r}")
    return [f"wb = Workbench.load({', '.join(options)})"]


def _sources(session: Session) -> list[str]:
    given = [name for name in ("awareness", "refusal", "vector") if name not in session.fitted]
    lines = [f"# {', '.join(given)}: as given to wb.explore(...)"] if given else []
    if session.fitted:
        lines.append(f'train = contrast_set().split("train").sample({N_TRAIN})')
    if "awareness" in session.fitted:
        lines.append("awareness = wb.awareness_direction(train.harmful, train.harmless)")
    condition = _condition(session.condition)
    if "refusal" in session.fitted:
        source = session.refusal_source
        lines.append(f"refusal = wb.refusal_direction(train.harmful, train.harmless, {condition}, source={source!r})")
    if "vector" in session.fitted:
        lines.append(f"vector = wb.shift(train.harmful, {condition}).steering_vector()")
    return lines


def _condition(condition: PromptCondition) -> str:
    if PRESETS.get(condition.name) == condition:
        return f"PromptCondition.preset({condition.name!r})"
    fields = {name: value for name, value in condition.to_dict().items() if name != "name" and value}
    written = "".join(f", {name}={value!r}" for name, value in fields.items())
    return f"PromptCondition({condition.name!r}{written})"


def _spec(spec: InterventionSpec) -> str:
    parts = [
        f"{name}={value!r}" for name, value in spec.model_dump(exclude_defaults=True, exclude={"selector"}).items()
    ]
    if spec.selector != SelectorSpec():
        chosen = spec.selector.model_dump(exclude_defaults=True)
        parts.append(f"selector=SelectorSpec({', '.join(f'{name}={value!r}' for name, value in chosen.items())})")
    return f"InterventionSpec({', '.join(parts)})"


def _grid(state: ExplorerState) -> list[str]:
    if state.arm == "plain":
        return ['grid = projected["plain"].T  # layer x token']
    return [
        f'first, second = aligned_positions(rendered["plain"], rendered[{state.arm!r}])',
        f'grid = (projected[{state.arm!r}][list(second)] - projected["plain"][list(first)]).T  # layer x token',
    ]
