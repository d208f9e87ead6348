"""How many tokens fit into one forward pass, and what running out of memory looks like."""

from __future__ import annotations

import gc

import psutil
import torch

from sgworkbench.models.identity import LoadedModel

# Beyond this many tokens a pass a CPU gains nothing: its caches are full, and memory grows with the batch. Decoding
# counts prompt and answer of every row, of which a step runs one token each.
_CPU_TOKENS, _CPU_DECODING_TOKENS = 512, 8192
_GPU_TOKENS = 131_072
_SMALLEST = 256
# The rest is for weights of other processes, fragmentation and what the estimate leaves out.
_SHARE_OF_FREE = 0.4


def automatic_batch_tokens(loaded: LoadedModel, *, cached: bool = False) -> int:
    """Return how many padded tokens a forward pass may have, from the free memory of the model's device.

    The estimate counts what is alive at once inside a block: about ten activations of the residual stream's width, four
    of the MLP's and, in float32, one row of attention scores per head over the model's context.

    Args:
        loaded: the model.
        cached: whether keys and values of all layers are kept for every token, as in generation.
    """
    cfg = loaded.model.cfg
    width = torch.empty((), dtype=cfg.dtype).element_size()
    per_token = width * (10 * cfg.d_model + 4 * (cfg.d_mlp or 4 * cfg.d_model)) + 8 * cfg.n_heads * min(cfg.n_ctx, 2048)
    if cached:
        heads = cfg.n_key_value_heads or cfg.n_heads
        per_token += 2 * width * cfg.n_layers * heads * cfg.d_head
    device = torch.device(loaded.identity.device)
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], _GPU_TOKENS
    else:
        free, most = psutil.virtual_memory().available, _CPU_DECODING_TOKENS if cached else _CPU_TOKENS
    return int(max(_SMALLEST, min(most, _SHARE_OF_FREE * free / per_token)))


def automatic_batch_rows(loaded: LoadedModel) -> int:
    """Return how many prompts may decode together: a CPU is busy with a few, a GPU wants many."""
    return 256 if torch.device(loaded.identity.device).type == "cuda" else 32


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "not enough memory" in str(error).lower()


def release_memory() -> None:
    """Give back what a failed forward pass held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
