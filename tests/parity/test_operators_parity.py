"""Every operator equals an independent implementation on plain transformers: one row, no cache, full recompute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import plain_steering as plain
import pytest
import torch
from plain_steering import Readings, Step
from torch import Tensor

from sgworkbench.analysis.directions import Directions, mean_difference_directions
from sgworkbench.analysis.site import Site
from sgworkbench.models import LoadedModel
from sgworkbench.models.engine_checks import slow_path
from sgworkbench.prompting import RenderedPrompt, Renderer
from sgworkbench.prompting.token_batch import current_batch
from sgworkbench.steering import (
    Ablate,
    Add,
    AddPreservingNorm,
    AffineConceptEdit,
    Clamp,
    Condition,
    Gate,
    GenerationSettings,
    Intervention,
    NullSpace,
    Operator,
    Rotate,
    Selector,
    generate,
    steering,
)

D = 32
N_TOKENS = 4
TEXTS = (
    "Why is the sky blue?",
    "How do I bake a loaf of bread at home, and how long?",
    "Hi",
)
PRE, POST = Site(1, "resid_pre"), Site(1)
FAMILIES = ("llama", "gpt2")
PHASES = (("prefill",), ("decode",), ("prefill", "decode"))

_generator = torch.Generator().manual_seed(7)
V, W, R, S = torch.randn(4, D, generator=_generator)
ONE, ZERO = torch.randn(6, 2, D, generator=_generator), torch.randn(6, 2, D, generator=_generator) - 0.4


@contextmanager
def recorded_logits(loaded: LoadedModel) -> Iterator[dict[int, list[Tensor]]]:
    """The logits every prompt's tokens are chosen from, by prompt."""
    kept: dict[int, list[Tensor]] = {}

    def record(_module: Any, _inputs: Any, output: Tensor) -> None:
        batch = current_batch()
        assert batch is not None
        for local, row in enumerate(batch.rows.tolist()):
            kept.setdefault(row, []).append(output[local, -1].clone())

    handle = loaded.model.unembed.register_forward_hook(record)
    try:
        yield kept
    finally:
        handle.remove()


def render(loaded: LoadedModel) -> list[RenderedPrompt]:
    renderer = Renderer(loaded.tokenizer)
    return [renderer.render(text) for text in TEXTS]


SETTINGS = GenerationSettings(max_new_tokens=N_TOKENS, stop_at_end_of_turn=False)
References = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def references() -> References:
    return {}


def reference_model(loaded: LoadedModel, references: References) -> Any:
    key = str(loaded.folder)
    if key not in references:
        references[key] = plain.load_plain(loaded.folder)
    return references[key]


def assert_equal_answers(
    loaded: LoadedModel,
    references: References,
    interventions: Sequence[Intervention],
    steps_of: Callable[[int, RenderedPrompt], Sequence[Step]],
) -> None:
    """Greedy tokens are equal, logits within 1e-4, and steering changed something for at least one prompt."""
    rendered = render(loaded)
    unsteered = generate(loaded, rendered, SETTINGS)
    with steering(loaded, interventions), recorded_logits(loaded) as ours:
        answers = generate(loaded, rendered, SETTINGS)
    model = reference_model(loaded, references)
    moved = 0.0
    for row, (item, answer) in enumerate(zip(rendered, answers, strict=True)):
        steps = steps_of(row, item)
        tokens, logits, _ = plain.plain_generate(model, item.token_ids, steps, N_TOKENS)
        assert list(answer.token_ids) == tokens
        for mine, theirs in zip(ours[row], logits, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
        still, _ = plain.plain_logits(model, [*item.token_ids, *tokens[:-1]], len(item), ())
        moved = max(moved, float((still - logits[-1]).abs().max()))
    assert moved > 0.05, "the operator must do something, or the test shows nothing"
    assert [a.token_ids for a in generate(loaded, rendered, SETTINGS)] == [a.token_ids for a in unsteered]


def fitted(read_at: str = "last_instruction", sites: tuple[Site, ...] = (PRE, POST)) -> Directions:
    return mean_difference_directions(ONE, ZERO, concept="test", source="random", read_at=read_at, sites=sites)


def _ace_reference(index: int) -> plain.TokenChange:
    zero, one = ZERO[:, index].mean(0), ONE[:, index].mean(0)
    return plain.ace(one - zero, zero, one, 1.5)


OPERATORS: dict[str, tuple[Operator, plain.TokenChange, plain.TokenChange]] = {
    "add": (Add({PRE: V, POST: W}, 0.6), plain.add(V, 0.6), plain.add(W, 0.6)),
    "ablate": (Ablate({PRE: R, POST: S}), plain.ablate(R), plain.ablate(S)),
    "clamp": (
        Clamp({PRE: R, POST: S}, {PRE: 0.3, POST: -0.1}, {POST: 0.2}),
        plain.clamp(R, 0.3, None),
        plain.clamp(S, -0.1, 0.2),
    ),
    "ace": (AffineConceptEdit.from_directions(fitted(), (PRE, POST), 1.5), _ace_reference(0), _ace_reference(1)),
    "add_preserving_norm": (
        AddPreservingNorm({PRE: V, POST: W}, 0.6),
        plain.add_preserving_norm(V, 0.6),
        plain.add_preserving_norm(W, 0.6),
    ),
    "rotate to": (
        Rotate({PRE: R, POST: V}, {PRE: S, POST: R}, 110.0),
        plain.rotate(R, S, 110.0, False),
        plain.rotate(V, R, 110.0, False),
    ),
    "rotate by": (
        Rotate({PRE: R, POST: V}, {PRE: S, POST: R}, -75.0, "relative"),
        plain.rotate(R, S, -75.0, True),
        plain.rotate(V, R, -75.0, True),
    ),
    "null_space": (
        NullSpace({PRE: V, POST: W}, {PRE: 0.2 * R, POST: 0.2 * S}, 0.5),
        plain.linear_map(torch.outer(V, 0.2 * R).double(), 0.5),
        plain.linear_map(torch.outer(W, 0.2 * S).double(), 0.5),
    ),
}


CASES = [pytest.param(family, phases, id=f"{family}-{'+'.join(phases)}") for family in FAMILIES for phases in PHASES]


@pytest.mark.parametrize(("family", "phases"), CASES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_equals_plain_transformers(
    name: str, phases: Any, family: str, tiny_model: Any, references: References
) -> None:
    operator, at_pre, at_post = OPERATORS[name]
    steps = [Step(1, "pre", at_pre, phases), Step(1, "post", at_post, phases)]
    interventions = [Intervention(operator, Selector(phases=phases))]
    assert_equal_answers(tiny_model(family), references, interventions, lambda _row, _item: steps)


def test_the_engines_slow_path_steers_alike(tiny_model: Any, references: References) -> None:
    operator, at_pre, at_post = OPERATORS["ace"]
    with slow_path():
        assert_equal_answers(
            tiny_model("llama"),
            references,
            [Intervention(operator)],
            lambda _row, _item: [Step(1, "pre", at_pre), Step(1, "post", at_post)],
        )


def _selections(item: RenderedPrompt) -> dict[str, tuple[Selector, Callable[[int, int], bool]]]:
    instruction = [index for index, role in enumerate(item.roles) if role == "instruction"]
    template = [index for index, role in enumerate(item.roles) if role == "template"]
    return {
        "instruction": (Selector("instruction"), lambda position, _n: position in instruction),
        "from_last_prompt": (Selector("from_last_prompt"), lambda position, n: position >= n - 1),
        "generated": (Selector("generated"), lambda position, n: position >= n),
        "roles": (
            Selector("roles", roles=("template", "answer")),
            lambda position, n: position in template or position >= n,
        ),
        "positions": (
            Selector("positions", positions=(0, 3, 11, 40)),
            lambda position, _n: position in (0, 3, 11, 40),
        ),
    }


@pytest.mark.parametrize("name", ["instruction", "from_last_prompt", "generated", "roles", "positions"])
def test_selectors_mean_tokens_and_not_columns(name: str, tiny_model: Any, references: References) -> None:
    loaded = tiny_model("llama")
    rendered = render(loaded)
    selector = _selections(rendered[0])[name][0]
    assert_equal_answers(
        loaded,
        references,
        [Intervention(Add({POST: V}, 0.8), selector)],
        lambda _row, item: [Step(1, "post", plain.add(V, 0.8), selects=_selections(item)[name][1])],
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_interventions_at_one_site_act_in_the_stated_order(
    order: tuple[int, int], tiny_model: Any, references: References
) -> None:
    operators = [Add({POST: V}, 0.8), Rotate({POST: R}, {POST: V}, 60.0)]
    changes = [plain.add(V, 0.8), plain.rotate(R, V, 60.0, False)]
    assert_equal_answers(
        tiny_model("llama"),
        references,
        [Intervention(operators[index]) for index in order],
        lambda _row, _item: [Step(1, "post", changes[index]) for index in order],
    )


@pytest.mark.parametrize("kind", ["add", "add_preserving_norm", "ace", "rotate", "null_space"])
def test_coefficients_per_prompt_reach_their_own_prompt(kind: str, tiny_model: Any, references: References) -> None:
    each = torch.tensor([0.0, 0.9, -0.7])
    zero, one = ZERO[:, 1].mean(0), ONE[:, 1].mean(0)
    made: dict[str, tuple[Operator, Callable[[float], plain.TokenChange]]] = {
        "add": (Add({POST: V}, each), lambda a: plain.add(V, a)),
        "add_preserving_norm": (AddPreservingNorm({POST: V}, each), lambda a: plain.add_preserving_norm(V, a)),
        "ace": (
            AffineConceptEdit.from_directions(fitted(), (POST,), each),
            lambda a: plain.ace(one - zero, zero, one, a),
        ),
        "rotate": (Rotate({POST: R}, {POST: S}, 100 * each), lambda a: plain.rotate(R, S, 100 * a, False)),
        "null_space": (
            NullSpace({POST: V}, {POST: 0.2 * R}, each),
            lambda a: plain.linear_map(torch.outer(V, 0.2 * R).double(), a),
        ),
    }
    operator, change = made[kind]
    assert_equal_answers(
        tiny_model("llama"),
        references,
        [Intervention(operator)],
        lambda row, _item: [Step(1, "post", change(float(each[row])))],
    )


READ = Site(0)
AWARE = fitted("last_instruction", (READ, POST))
ZERO_AT, SEPARATION = float(AWARE.zero[0]), float(AWARE.separation[0])


def _score(h: Tensor) -> float:
    return (float(AWARE.unit[0].double() @ h.double()) - ZERO_AT) / SEPARATION


def _scores_of_tokens(loaded: LoadedModel, references: References) -> list[list[float]]:
    """Scores of the prompts' tokens in an unsteered run, to place thresholds where gates differ."""
    model = reference_model(loaded, references)
    scores = []
    for item in render(loaded):
        _, readings = plain.plain_logits(model, item.token_ids, len(item), ())
        scores.append([_score(h) for h in readings[0, "post"]])
    return scores


@pytest.mark.parametrize("phases", PHASES, ids="+".join)
@pytest.mark.parametrize("comparison", ["at_least", "at_most"])
def test_a_gate_decides_once_per_prompt_and_remembers(
    comparison: Any, phases: Any, tiny_model: Any, references: References
) -> None:
    loaded = tiny_model("llama")
    last = [item.last_instruction_position for item in render(loaded)]
    scores = [row[at] for row, at in zip(_scores_of_tokens(loaded, references), last, strict=True)]
    threshold = sum(sorted(scores)[1:]) / 2
    gate = Gate(Condition(AWARE, READ), threshold, comparison)

    def steps(row: int, _item: RenderedPrompt) -> list[Step]:
        def is_open(_position: int, readings: Readings) -> bool:
            score = _score(readings[0, "post"][last[row]])
            return score >= threshold if comparison == "at_least" else score <= threshold

        return [Step(1, "post", plain.add(V, 0.9), phases, is_open)]

    intervention = Intervention(Add({POST: V}, 0.9), Selector(phases=phases), gate)
    assert_equal_answers(loaded, references, [intervention], steps)


@pytest.mark.parametrize(("family", "phases"), CASES)
def test_a_gate_decides_per_token(phases: Any, family: str, tiny_model: Any, references: References) -> None:
    loaded = tiny_model(family)
    every = sorted(score for row in _scores_of_tokens(loaded, references) for score in row)
    threshold = sum(every[len(every) // 2 :][:2]) / 2
    gate = Gate(Condition(AWARE, READ), threshold, decided="token")

    def is_open(position: int, readings: Readings) -> bool:
        return _score(readings[0, "post"][position]) >= threshold

    assert_equal_answers(
        loaded,
        references,
        [Intervention(Add({POST: V}, 3.0), Selector(phases=phases), gate)],
        lambda _row, _item: [Step(1, "post", plain.add(V, 3.0), phases, is_open)],
    )


@pytest.mark.parametrize("watched", ["all", "generated"])
def test_a_latched_gate_stays_open_from_the_first_token_that_passes(
    watched: str, tiny_model: Any, references: References
) -> None:
    loaded = tiny_model("llama")
    rendered, scores = render(loaded), _scores_of_tokens(loaded, references)
    if watched == "all":
        # Above the highest score of one prompt, so that it stays closed in prefill.
        highest = sorted(max(row) for row in scores)
        threshold = (highest[0] + highest[1]) / 2
    else:
        model = reference_model(loaded, references)
        runs = [plain.plain_generate(model, item.token_ids, (), N_TOKENS)[2][0, "post"] for item in rendered]
        written = sorted(_score(h) for item, run in zip(rendered, runs, strict=True) for h in run[len(item) :])
        threshold = sum(written[len(written) // 2 :][:2]) / 2
    gate = Gate(Condition(AWARE, READ), threshold, decided="latched", watch=Selector(watched))  # type: ignore[arg-type]

    def steps(row: int, _item: RenderedPrompt) -> list[Step]:
        first = 0 if watched == "all" else len(rendered[row])

        def is_open(position: int, readings: Readings) -> bool:
            return any(_score(readings[0, "post"][p]) >= threshold for p in range(first, position + 1))

        return [Step(1, "post", plain.add(V, 1.2), is_open=is_open)]

    assert_equal_answers(loaded, references, [Intervention(Add({POST: V}, 1.2), Selector(), gate)], steps)


def test_a_gate_reads_what_earlier_interventions_left_and_not_its_own(tiny_model: Any, references: References) -> None:
    loaded = tiny_model("llama")
    aware = fitted("last_prompt", (READ, POST))
    unit, zero, separation = aware.unit[1].double(), float(aware.zero[1]), float(aware.separation[1])

    def score(h: Tensor) -> float:
        return (float(unit @ h.double()) - zero) / separation

    model = reference_model(loaded, references)
    first = Step(1, "post", plain.add(W, 0.7))
    after = []
    for item in render(loaded):
        _, readings = plain.plain_logits(model, item.token_ids, len(item), [first])
        after.append(score(readings[1, "post"][-1]))
    threshold = sum(sorted(after)[1:]) / 2
    gate = Gate(Condition(aware, POST), threshold)

    def steps(row: int, item: RenderedPrompt) -> list[Step]:
        # The decision is taken on the stream after the first step; the reference gets it from the run above.
        return [first, Step(1, "post", plain.add(V, 2.0), is_open=lambda _p, _r: after[row] >= threshold)]

    assert_equal_answers(
        loaded,
        references,
        [Intervention(Add({POST: W}, 0.7)), Intervention(Add({POST: V}, 2.0), Selector(), gate)],
        steps,
    )
