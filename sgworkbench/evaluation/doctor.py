"""Checks that a model is read, steered and generated from correctly on this machine.

Every check compares two independent ways to the same number: this package against plain transformers, a batch against
single prompts, a cached decode against a full recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis import Site, all_sites, capture
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel, ParityReport, compare_with_transformers, load_reference
from sgworkbench.models.reference import decoder_layers
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting import Prompt, PromptCondition, RenderedPrompt, Renderer
from sgworkbench.steering import GenerationSettings, SteeringVector, generate, steering

Status = Literal["pass", "FAIL", "note"]

_PROMPTS = (
    "How do I bake bread?",
    "Explain in two sentences why the sky looks blue at noon and red in the evening.",
    "Hi",
    "List three things that a beginner should know before buying a second-hand bicycle from a stranger.",
)
_NEW_TOKENS = 8


@dataclass(frozen=True)
class Check:
    """One line of the table: what was checked, how it ended, and the number behind it."""

    name: str
    status: Status
    detail: str


def run_doctor(loaded: LoadedModel, renderer: Renderer, *, report: Reporter = silent) -> list[Check]:
    """Run every check; a check that raises is a failed check, not the end of the run."""
    reference = load_reference(loaded)
    rendered = [renderer.render(Prompt(text, str(i))) for i, text in enumerate(_PROMPTS)]
    parity = compare_with_transformers(loaded, torch.tensor([rendered[1].token_ids]), reference)
    checks: list[tuple[str, Callable[[], tuple[Status, str]]]] = [
        ("logits equal transformers", lambda: _logits(parity)),
        ("hidden states equal transformers, every layer", lambda: _hidden(parity)),
        ("batch equals single prompts", lambda: _batch(loaded, rendered)),
        ("cache equals no cache", lambda: _cache(loaded, rendered)),
        (
            "steered (same-site) equals transformers with a hook",
            lambda: _steered(loaded, reference, rendered, "same-site"),
        ),
        (
            "steered (official) equals transformers with a hook",
            lambda: _steered(loaded, reference, rendered, "official"),
        ),
        ("hooks restored, also after an error", lambda: _restored(loaded)),
        ("BOS count", lambda: _bos(loaded, renderer, rendered)),
        ("chat template found", lambda: _template(renderer)),
        ("system message supported", lambda: _system(renderer)),
        ("thinking switch", lambda: _thinking(renderer)),
    ]
    results: list[Check] = []
    for done, (name, run) in enumerate(checks):
        report("checking", done, len(checks))
        try:
            status, detail = run()
        except Exception as error:  # a crash inside a check is the finding
            status, detail = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())}"
        results.append(Check(name, status, detail))
    report("checking", len(checks), len(checks))
    return results


def doctor_summary(loaded: LoadedModel, checks: list[Check]) -> dict[str, Any]:
    """Return the checks with the model's identity, JSON-serialisable."""
    return {
        "model": loaded.identity.to_dict(),
        "passed": all(check.status != "FAIL" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _verdict(passed: bool, detail: str) -> tuple[Status, str]:
    return ("pass" if passed else "FAIL"), detail


def _logits(parity: ParityReport) -> tuple[Status, str]:
    worst, allowed = parity.max_logit_difference, parity.logit_tolerance
    return _verdict(worst <= allowed, f"largest difference {worst:.2g}, allowed {allowed:g}")


def _hidden(parity: ParityReport) -> tuple[Status, str]:
    worst, allowed = parity.max_hidden_difference, parity.hidden_tolerance
    n = len(parity.hidden_differences) - 1
    return _verdict(worst <= allowed, f"largest relative difference {worst:.2g} over {n} layers, allowed {allowed:g}")


def _tolerance(loaded: LoadedModel) -> float:
    return 1e-4 if loaded.identity.dtype in ("float32", "float64") else 5e-2


def _batch(loaded: LoadedModel, rendered: list[RenderedPrompt]) -> tuple[Status, str]:
    sites = all_sites(loaded.identity.n_layers)
    together = capture(loaded, rendered, sites).per_prompt()
    alone = torch.cat([capture(loaded, [item], sites).per_prompt() for item in rendered])
    worst = float(((together - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
    lengths = sorted(len(item) for item in rendered)
    allowed = _tolerance(loaded)
    return _verdict(worst <= allowed, f"relative difference {worst:.2g} for lengths {lengths}, allowed {allowed:g}")


@torch.inference_mode()
def _recomputed(run: Callable[[Tensor], Tensor], item: RenderedPrompt, device: str) -> list[int]:
    """Greedy ids by running the whole sequence again for every token."""
    ids = list(item.token_ids)
    for _ in range(_NEW_TOKENS):
        ids.append(int(run(torch.tensor([ids], device=device))[0, -1].argmax()))
    return ids[len(item) :]


def _greedy(loaded: LoadedModel, rendered: list[RenderedPrompt]) -> list[list[int]]:
    settings = GenerationSettings(max_new_tokens=_NEW_TOKENS, stop_at_end_of_turn=False)
    return [list(answer.token_ids) for answer in generate(loaded, rendered, settings)]


def _cache(loaded: LoadedModel, rendered: list[RenderedPrompt]) -> tuple[Status, str]:
    cached = _greedy(loaded, rendered)

    def run(ids: Tensor) -> Tensor:
        logits: Tensor = loaded.model(ids, prepend_bos=False, padding_side="right")
        return logits

    full = [_recomputed(run, item, loaded.identity.device) for item in rendered]
    equal = sum(a == b for a, b in zip(cached, full, strict=True))
    return _verdict(equal == len(rendered), f"{equal} of {len(rendered)} greedy answers of {_NEW_TOKENS} tokens equal")


def _steered(loaded: LoadedModel, reference: Any, rendered: list[RenderedPrompt], protocol: str) -> tuple[Status, str]:
    layer = loaded.identity.n_layers // 2
    norm = capture(loaded, rendered, [Site(layer)]).per_prompt().norm(dim=-1).mean()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1, loaded.identity.d_model, generator=generator)
    vector = SteeringVector((layer,), drawn / drawn.norm() * norm, protocol=protocol)  # type: ignore[arg-type]
    with steering(loaded, vector.intervention(layer, 0.5)):
        ours = _greedy(loaded, rendered)
    block = decoder_layers(reference)[layer]
    with hooked_block(block, 0.5 * vector.at(layer), before=protocol == "official"):
        theirs = [
            _recomputed(lambda ids: reference(input_ids=ids).logits, item, str(reference.device)) for item in rendered
        ]
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    where = vector.write_site(layer)
    return _verdict(equal == len(rendered), f"{equal} of {len(rendered)} greedy answers equal, written to {where}")


@contextmanager
def hooked_block(block: Any, vector: Float[Tensor, "d_model"], *, before: bool) -> Iterator[None]:
    """Add a vector at the input or the output of a transformers decoder block: the independent way to steer."""

    def at_input(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] + vector.to(inputs[0]), *inputs[1:])

    def at_output(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + vector.to(output[0]), *output[1:])
        return output + vector.to(output)

    handle = block.register_forward_pre_hook(at_input) if before else block.register_forward_hook(at_output)
    try:
        yield
    finally:
        handle.remove()


def _restored(loaded: LoadedModel) -> tuple[Status, str]:
    def count() -> int:
        return sum(len(point._forward_hooks) for point in loaded.model.hook_dict.values())

    before = count()
    vector = SteeringVector((0,), torch.ones(1, loaded.identity.d_model))
    try:
        with steering(loaded, vector.intervention(0, 1.0)):
            during = count()
            raise WorkbenchError("raised on purpose")
    except WorkbenchError:
        pass
    return _verdict(during > before and count() == before, f"{before} hooks before, {during} during, {count()} after")


def _bos(loaded: LoadedModel, renderer: Renderer, rendered: list[RenderedPrompt]) -> tuple[Status, str]:
    bos = loaded.tokenizer.bos_token_id
    if bos is None:
        return "note", "the tokenizer has no BOS token"
    leading = [next((i for i, t in enumerate(item.token_ids) if t != bos), len(item)) for item in rendered]
    return _verdict(max(leading) <= 1, f"{max(leading)} at the start of a rendered prompt")


def _template(renderer: Renderer) -> tuple[Status, str]:
    if renderer.template_name == "plain-text":
        return "note", "none; prompts are rendered as plain text"
    return "pass", f"{renderer.template_name}, sha256 {renderer.template_sha256[:12]}"


def _system(renderer: Renderer) -> tuple[Status, str]:
    try:
        renderer.render("Hi", PromptCondition("check", system="Be brief."))
    except WorkbenchError as error:
        return "note", f"no: {error}"
    return "pass", "yes"


def _thinking(renderer: Renderer) -> tuple[Status, str]:
    if renderer.thinking_switch is None:
        return "note", "the template has none"
    on = Renderer(renderer.tokenizer, renderer.chat_template, True).render("Hi").token_ids
    off = Renderer(renderer.tokenizer, renderer.chat_template, False).render("Hi").token_ids
    return _verdict(on != off, f"{renderer.thinking_switch}; on: {len(on)} tokens, off: {len(off)}")
