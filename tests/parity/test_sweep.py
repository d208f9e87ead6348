"""The sweep's engine against one full forward pass with hooks per cell, prompt and opening."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sgworkbench.analysis.directions import Directions
from sgworkbench.analysis.site import Site
from sgworkbench.evaluation.sweep.engine import ScreenEngine, Variant, fast_point
from sgworkbench.evaluation.sweep.measures import Readout, ScreenSetup
from sgworkbench.prompting import PromptCondition, PromptSet, Renderer
from sgworkbench.steering import (
    Ablate,
    Add,
    AddPreservingNorm,
    Condition,
    Gate,
    Intervention,
    Selector,
)

TEXTS = ["Hi", "How do I bake a loaf of bread?", "Please explain why the sky is blue in the evening.", "Write a letter"]
LABELS = ["harmful", "harmless", "harmful", "text"]
TOKENS = (5, 17, 40)
REFUSALS = ((7, 9, 30), (11,))
COMPLIANCES = ((60, 61, 62, 63), (70,))
NEUTRAL = (20, 21, 22, 23, 24)
METRICS = ("refusal_log_odds", "prefix_log_odds", "refusal_projection", "awareness_projection", "kl", "kl_from_plain",
           "top1", "perplexity")  # fmt: skip


def drawn(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def directions(width: int, concept: str, site: Site, seed: int, read_at: str) -> Directions:
    unit = torch.nn.functional.normalize(drawn(1, width, seed), dim=-1)
    return Directions(concept, "drawn", read_at, (site,), unit, drawn(1, width, seed + 1), torch.tensor([1.7]))


class Naive:
    """Plain HookedTransformer forwards, a prompt with each opening behind it as one row, hooks written out by hand."""

    def __init__(self, loaded: Any, rendered: Sequence[Any]) -> None:
        self.loaded, self.rendered = loaded, rendered
        self.known: dict[Any, torch.Tensor] = {}

    def unsteered(self, item: Any) -> torch.Tensor:
        if item.token_ids not in self.known:
            self.known[item.token_ids] = self.run([item.token_ids], [], [])[0][0, -1]
        return self.known[item.token_ids]

    @torch.inference_mode()
    def run(
        self, rows: Sequence[Sequence[int]], hooks: list[Any], reads: Sequence[Site]
    ) -> tuple[torch.Tensor, dict[Site, Any]]:
        """Logits of every row and token, and streams of the first row; pads on the right, which no token can see."""
        kept: dict[Site, Any] = {}

        def keep(site: Site) -> Any:
            return lambda stream, hook: kept.__setitem__(site, stream[0].clone())

        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        with self.loaded.model.hooks([*hooks, *((site.hook_name, keep(site)) for site in reads)]):
            logits = self.loaded.model(ids, prepend_bos=False, attention_mask=torch.ones_like(ids))
        return torch.log_softmax(logits[..., : self.loaded.identity.d_vocab].double(), -1), kept

    def hooks(self, item: Any, variant: Variant) -> list[Any]:
        """One hook per site; a gate decided per prompt is read in a forward pass of its own."""
        made = []
        for each in variant.interventions:
            gate = each.gate
            if gate is not None and gate.decided == "prompt":
                site = gate.condition.site
                at = item.last_instruction_position if gate.at == "last_instruction" else len(item) - 1
                _, kept = self.run([item.token_ids], [], [site])
                if not bool(gate.passes(gate.condition.scores(kept[site][at]))):
                    continue
            state: dict[str, torch.Tensor] = {}

            def look(stream: Any, hook: Any, gate: Any = gate, state: Any = state) -> Any:
                passed = gate.passes(gate.condition.scores(stream))
                state["open"] = passed if gate.decided == "token" else passed.int().cummax(1).values.bool()
                return stream

            if gate is not None and gate.decided != "prompt":
                made.append((gate.condition.site.hook_name, look))
            for site in each.operator.sites:

                def act(stream: Any, hook: Any, each: Any = each, site: Site = site, state: Any = state) -> Any:
                    chosen = torch.tensor([selected(each.selector, item, i) for i in range(stream.shape[1])])
                    chosen = chosen & state["open"] if state else chosen
                    return stream + chosen[..., None] * each.operator.change(stream, site)

                made.append((site.hook_name, act))
        return made

    def measure(self, variant: Variant, setup: ScreenSetup, plain: Sequence[Any]) -> dict[str, np.ndarray]:
        found: dict[str, list[float]] = {}
        texts = iter(setup.texts)
        for item, label, other in zip(self.rendered, LABELS, plain, strict=True):
            hooks = self.hooks(item, variant)
            scored = [next(texts)] if label == "text" else [*REFUSALS, *COMPLIANCES]
            rows = [[*item.token_ids, *ids] for ids in scored]
            whole, kept = self.run(rows, hooks, [readout.site for readout in setup.readouts])
            log_q = whole[0, len(item) - 1]
            totals = [
                sum(float(whole[i, len(item) - 1 + k, token]) for k, token in enumerate(ids))
                for i, ids in enumerate(scored)
            ]
            log_p, log_v = self.unsteered(item), self.unsteered(other)

            row = dict.fromkeys(("refusal_log_odds", "prefix_log_odds", "kl", "kl_from_plain", "top1", "nll"), math.nan)
            row |= {"refusal_projection": math.nan, "awareness_projection": math.nan}
            if label == "text":
                row["nll"] = -totals[0] / len(scored[0])
            else:
                p = float(log_q.exp()[list(TOKENS)].sum())
                row["refusal_log_odds"] = math.log(p / (1 - p))
                row["kl"] = float((log_p.exp() * (log_p - log_q)).sum())
                row["kl_from_plain"] = float((log_v.exp() * (log_v - log_q)).sum())
                row["top1"] = float(log_p.argmax() == log_q.argmax())
                split = len(REFUSALS)
                mean = [np.mean(np.exp(part)) for part in (totals[:split], totals[split:])]
                row["prefix_log_odds"] = math.log(mean[0] / mean[1])
                for readout in setup.readouts:
                    first = variant.first_site
                    if first is not None and readout.site < first:
                        continue
                    at = item.last_instruction_position if readout.at == "last_instruction" else len(item) - 1
                    d = readout.directions
                    value = ((kept[readout.site][at] - d.origin[0]) @ d.unit[0]) / d.separation[0]
                    row[f"{readout.name}_projection"] = float(value)
            for name, value in row.items():
                found.setdefault(name, []).append(value)
        return {name: np.array(values) for name, values in found.items()}


def selected(selector: Selector, item: Any, position: int) -> bool:
    """Whether a token is steered, from the words of the selector's documentation."""
    n = len(item)
    phase = "prefill" if position < n else "decode"
    if phase not in selector.phases:
        return False
    if selector.tokens == "all":
        return True
    if selector.tokens == "instruction":
        return position < n and item.roles[position] == "instruction"
    if selector.tokens == "generated":
        return position >= n
    assert selector.tokens == "from_last_prompt"
    return position >= n - 1


def variants_for(width: int) -> list[Variant]:
    v = drawn(4, width, 3) * 0.8
    pre, post = Site(1, "resid_pre"), Site(1)
    aware = directions(width, "awareness", Site(0), 8, "last_instruction")
    first, last = (Gate(Condition(aware, Site(0)), t) for t in (-0.5, 0.5))
    add = Add({post: v[1]}, 1.5)
    interventions = {
        "late": Intervention(Add({Site(2): v[0]}, 2.0)),
        "add": Intervention(add),
        "negative": Intervention(Add({post: v[1]}, -2.0)),
        "window": Intervention(Add({Site(0): v[0], Site(1): v[1], Site(2): v[2]}, 0.7)),
        "pre": Intervention(Add({pre: v[2]}, 1.0)),
        "first": Intervention(Add({Site(0, "resid_pre"): v[2]}, 1.0)),
        "ablate": Intervention(Ablate({Site(0): v[3], Site(2, "resid_pre"): v[3]})),
        "norm": Intervention(AddPreservingNorm({post: v[3]}, 1.0)),
        "instruction": Intervention(add, Selector("instruction", phases=("prefill",))),
        "generated": Intervention(add, Selector("generated", phases=("decode",))),
        "from last": Intervention(add, Selector("from_last_prompt")),
        "prefill": Intervention(add, Selector(phases=("prefill",))),
        "gated open": Intervention(add, gate=first),
        "gated": Intervention(add, gate=last),
        "per token": Intervention(add, gate=Gate(Condition(aware, Site(0)), 0.2, decided="token")),
        "latched": Intervention(add, gate=Gate(Condition(aware, Site(0)), 1.2, decided="latched")),
        "inside": Intervention(Add({Site(1, "resid_mid"): v[1]}, 1.0)),
    }
    several = (interventions["add"], interventions["ablate"])
    return [Variant("unsteered"), *(Variant(k, (i,)) for k, i in interventions.items()), Variant("two", several)]


def test_paths_are_chosen_as_documented() -> None:
    points = {variant.key: fast_point(variant) for variant in variants_for(32)}
    assert points["late"] == 3
    assert points["add"] == points["gated"] == points["instruction"] == 2
    assert points["pre"] == points["ablate"] == points["window"] == points["two"] == 1
    assert points["first"] == points["unsteered"] == 0
    assert points["per token"] is points["latched"] is points["inside"] is None


@pytest.mark.parametrize(
    ("family", "condition", "max_batch_tokens", "chosen"),
    [
        ("llama", "self-reminder", 2048, slice(None)),
        # Small batches, and no shared prefix long enough to be worth a pass.
        ("llama", "plain", 90, slice(1, None, 3)),
        # Learned positions; a sliding window; a family that only HookedTransformer's own forward can run.
        ("gpt2", "self-reminder", 2048, slice(2, None, 4)),
        ("mistral", "self-reminder", 2048, slice(2, None, 4)),
        ("gemma2", "self-reminder", 2048, slice(0, None, 6)),
    ],
)
def test_every_metric_equals_the_naive_loop(
    tiny_model: Any, family: str, condition: str, max_batch_tokens: int, chosen: slice
) -> None:
    loaded = tiny_model(family)
    renderer, width = Renderer(loaded.tokenizer), loaded.identity.d_model
    prompts = PromptSet.from_texts(TEXTS)
    rendered = [renderer.render(prompt, PromptCondition.preset(condition)) for prompt in prompts]
    plain = [renderer.render(prompt) for prompt in prompts]
    readouts = (
        Readout("refusal", directions(width, "refusal", Site(1), 20, "prompt"), Site(1)),
        Readout("awareness", directions(width, "awareness", Site(2), 30, "instruction"), Site(2), "last_instruction"),
    )
    setup = ScreenSetup(METRICS, TOKENS, REFUSALS, COMPLIANCES, (NEUTRAL,), readouts, max_batch_tokens)
    reference = ScreenEngine(loaded, plain, LABELS, setup).clean_logits
    variants = variants_for(width)[chosen]
    items = ScreenEngine(loaded, rendered, LABELS, setup, reference).run(variants)
    assert list(items["key"].unique()) == [variant.key for variant in variants]
    naive = Naive(loaded, rendered)
    for variant in variants:
        expected = naive.measure(variant, setup, plain)
        own = items[items["key"] == variant.key]
        assert list(own["label"]) == LABELS
        for name, values in expected.items():
            np.testing.assert_allclose(
                own[name].to_numpy(), values, atol=1e-4, rtol=1e-4, err_msg=f"{variant.key} {name}"
            )


def test_more_variants_than_a_chunk_and_prompts_in_several_batches_change_nothing(tiny_model: Any) -> None:
    loaded = tiny_model("llama")
    renderer, width = Renderer(loaded.tokenizer), loaded.identity.d_model
    safe = PromptCondition.preset("self-reminder")
    rendered = [
        renderer.render(prompt, safe) for prompt in PromptSet.from_texts([*TEXTS, *(t + " Now." for t in TEXTS)])
    ]
    labels = ["harmful"] * len(rendered)
    variants = [
        Variant(f"{layer} {alpha}", (Intervention(Add({Site(layer): drawn(1, width, layer)[0]}, float(alpha))),))
        for layer in (2, 0)
        for alpha in range(1, 11)
    ]
    tables = []
    for tokens in (2048, 64):
        setup = ScreenSetup(("refusal_log_odds", "kl"), TOKENS, max_batch_tokens=tokens)
        tables.append(ScreenEngine(loaded, rendered, labels, setup).run(variants))
    one_by_one = [ScreenEngine(loaded, rendered, labels, setup).run([variant]) for variant in variants[::9]]
    for table in tables:
        np.testing.assert_allclose(table["kl"], tables[0]["kl"], atol=1e-5)
    for table in one_by_one:
        same = tables[0][tables[0]["key"] == table["key"].iloc[0]]
        np.testing.assert_allclose(table["refusal_log_odds"], same["refusal_log_odds"], atol=1e-5)
