"""Numeric self-check: the same tokens through HookedTransformer and through transformers."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerFast

from sgworkbench.errors import WorkbenchError
from sgworkbench.models.identity import LoadedModel, ParityReport
from sgworkbench.models.reference import load_reference

CHECK_TEXT = "The capital of France is Paris. How do I bake a loaf of bread, and what does 12 + 30 make?"

TOLERANCES: dict[str, tuple[float, float]] = {
    "float64": (1e-3, 1e-4),
    "float32": (1e-3, 1e-4),
    "float16": (0.5, 0.02),
    "bfloat16": (2.5, 0.1),
}
"""For each dtype: the largest logit difference and the largest relative residual difference that pass.

Half precision rounds at every sum, in another order in each implementation: on SmolLM2-135M bfloat16 differs by
0.5 and 0.018, a rope base wrong by a factor of ten by 5.1 and 0.19. So only gross errors are told apart there; a
model that passes in float32 is the proof that matters.
"""


def compare_with_transformers(
    loaded: LoadedModel, text_ids: Int[Tensor, "batch token"], reference: Any = None
) -> ParityReport:
    """Compare logits and every layer's residual stream with transformers on the same token ids.

    Args:
        loaded: the model to check.
        text_ids: unpadded token ids.
        reference: the same model in transformers, where it is already in memory; read from the folder otherwise.

    Raises:
        WorkbenchError: when the reference cannot be loaded.
    """
    if reference is None:
        reference = load_reference(loaded)
    return compare_models(loaded.model, reference, text_ids, dtype=loaded.identity.dtype)


@torch.inference_mode()
def compare_models(
    model: HookedTransformer, reference: Any, text_ids: Int[Tensor, "batch token"], *, dtype: str
) -> ParityReport:
    """Compare a HookedTransformer with a transformers model; `dtype` names the tolerances in `TOLERANCES`."""
    ids = text_ids.to(reference.device)
    theirs_logits, theirs = reference_residuals(reference, ids)
    ours_logits, ours = hooked_residuals(model, ids)
    differences = [
        float(((mine.double() - other.double()).norm(dim=-1) / other.double().norm(dim=-1)).max())
        for mine, other in zip(ours, theirs, strict=True)
    ]
    logit_tolerance, hidden_tolerance = TOLERANCES[dtype]
    return ParityReport(
        max_logit_difference=float((ours_logits.double() - theirs_logits.double()).abs().max()),
        hidden_differences=tuple(differences),
        logit_tolerance=logit_tolerance,
        hidden_tolerance=hidden_tolerance,
        dtype=dtype,
    )


def hooked_residuals(
    model: HookedTransformer, ids: Int[Tensor, "batch token"]
) -> tuple[Float[Tensor, "batch token d_vocab"], Float[Tensor, "site batch token d_model"]]:
    """Run a HookedTransformer; return its logits and the residual stream before block 0 and after every block."""
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{l}.hook_resid_post" for l in range(model.cfg.n_layers))]
    logits, cache = model.run_with_cache(ids, names_filter=names)
    return logits, torch.stack([cache[name] for name in names])


def reference_residuals(
    reference: Any, ids: Int[Tensor, "batch token"]
) -> tuple[Float[Tensor, "batch token d_vocab"], Float[Tensor, "site batch token d_model"]]:
    """Run a transformers model; return its logits and the residual stream before block 0 and after every block.

    The last entry of `hidden_states` is after the final norm, so the last block's output is taken from the norm's
    input instead.
    """
    last: list[Tensor] = []
    norm = _final_norm(reference)
    handle = norm.register_forward_pre_hook(lambda _module, inputs: last.append(inputs[0]))
    try:
        output = reference(input_ids=ids, output_hidden_states=True, use_cache=False)
    finally:
        handle.remove()
    return output.logits, torch.stack([*output.hidden_states[:-1], last[0]])


def _final_norm(reference: Any) -> torch.nn.Module:
    decoder = reference.get_decoder() if reference.config.model_type != "gpt2" else reference.transformer
    norm: torch.nn.Module = getattr(decoder, "norm", None) or decoder.ln_f
    return norm


def check_ids(tokenizer: PreTrainedTokenizerFast, context_length: int) -> Int[Tensor, "batch token"]:
    """Return the token ids of the self-check's short prompt, without special tokens, cut to the context."""
    ids = tokenizer(CHECK_TEXT, add_special_tokens=False)["input_ids"][:context_length]
    return torch.tensor([ids])


def require_parity(report: ParityReport, name: str) -> ParityReport:
    """Return the report if it passed.

    Raises:
        WorkbenchError: with the numbers, when the model disagrees with transformers.
    """
    if report.passed:
        return report
    worst = max(range(len(report.hidden_differences)), key=lambda l: report.hidden_differences[l])
    raise WorkbenchError(
        f"{name} fails the self-check against transformers in {report.dtype}: logits differ by up to "
        f"{report.max_logit_difference:.3g} (allowed {report.logit_tolerance:g}), the residual stream after block "
        f"{worst - 1} by {report.hidden_differences[worst]:.3g} of its norm (allowed {report.hidden_tolerance:g}); "
        "pass self_check=False to load it anyway."
    )
