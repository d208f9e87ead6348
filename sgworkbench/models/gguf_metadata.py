"""What a GGUF file says about its model that transformers does not read: checked, filled in, or refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sgworkbench.errors import WorkbenchError

SUPPORTED = ("llama", "qwen2", "qwen3", "phi3", "gpt2", "gemma2", "gemma3")
"""GGUF architectures that are both a supported family and readable by transformers (Mistral files say llama)."""

# Layers of the largest Gemma of each generation, whose attention scale is hidden_size / heads, not head_dim;
# llama.cpp, which writes and reads these files, tells them apart in the same way.
_GEMMA_LARGEST = {"gemma2": 46, "gemma3": 62}

_GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "gpt-2": (_GPT2_PATTERN, False),
    "smollm": (_GPT2_PATTERN, True),
    "llama-bpe": (_CL100K_PATTERN.replace("{DIGITS}", "{1,3}"), False),
    "qwen2": (_CL100K_PATTERN.replace("{DIGITS}", ""), False),
}
"""For each `tokenizer.ggml.pre`: the splitting pattern, and whether every digit is split off before it."""


def field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """Return the value of a metadata key, or the default when the file does not have it."""
    entry = reader.fields.get(key)
    return default if entry is None else entry.contents()


def check_architecture(reader: GGUFReader, path: Path) -> str:
    """Return `general.architecture` after checking that it is supported.

    Raises:
        WorkbenchError: for another architecture, naming the supported ones.
    """
    architecture = field(reader, "general.architecture")
    if architecture not in SUPPORTED:
        raise WorkbenchError(
            f"{path} holds a model of architecture {architecture!r}; supported in GGUF: {', '.join(SUPPORTED)}."
        )
    return str(architecture)


def corrected_config(config: Any, reader: GGUFReader, architecture: str) -> Any:
    """Fill in what transformers leaves out of a GGUF file's configuration.

    Args:
        config: as transformers read it; changed and returned.
        reader: the open file.
        architecture: what `check_architecture` returned.

    Raises:
        WorkbenchError: for a rope scaling that cannot be carried over.
    """
    scaling = field(reader, f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise WorkbenchError(
            f"This GGUF file asks for {scaling!r} rope scaling, which transformers does not read from GGUF; "
            "use the model's Hugging Face folder instead."
        )
    factors = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    if "rope_freqs.weight" in factors:
        divisors = np.asarray(factors.pop("rope_freqs.weight").data, dtype=np.float64)
        config.rope_parameters = llama3_rope(divisors, float(config.rope_parameters["rope_theta"]))
    if factors:
        raise WorkbenchError(
            f"This GGUF file carries long-context rope factors ({sorted(factors)[0]}), which are not supported; "
            "use a variant without them."
        )
    if architecture == "phi3":
        config.sliding_window = field(reader, "phi3.attention.sliding_window") or None
    if architecture == "gpt2":
        config.n_positions = int(field(reader, "gpt2.context_length"))
        config.n_inner = int(field(reader, "gpt2.feed_forward_length"))
    if architecture == "qwen3":
        config.head_dim = int(field(reader, "qwen3.attention.key_length", config.head_dim))
    if architecture in _GEMMA_LARGEST:
        largest = config.num_hidden_layers == _GEMMA_LARGEST[architecture]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    return config


def llama3_rope(divisors: np.ndarray, theta: float) -> dict[str, Any]:
    """Recognise the rope scaling of Llama 3.1 and 3.2 from the divisors a GGUF file stores per frequency.

    Args:
        divisors: `rope_freqs.weight`, [d_head / 2]: what each rotation frequency is divided by.
        theta: the rope base.

    Returns:
        The `rope_parameters` transformers uses for these models.

    Raises:
        WorkbenchError: when the divisors are neither all one nor those of a factor of 8, 16 or 32.
    """
    if np.allclose(divisors, 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    low, high, original = 1.0, 4.0, 8192
    half = len(divisors)
    wavelengths = 2 * math.pi * theta ** (np.arange(half) / half)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    for factor in (8.0, 16.0, 32.0):
        expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if np.allclose(divisors, expected, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise WorkbenchError(
        "This GGUF file scales its rope frequencies in a way that is not that of Llama 3.1 or 3.2; "
        "use the model's Hugging Face folder instead."
    )


def correct_tokenizer(tokenizer: PreTrainedTokenizerFast, reader: GGUFReader, path: Path) -> PreTrainedTokenizerFast:
    """Give a byte-level BPE tokenizer read from GGUF the splitting rule its file names.

    Transformers gives every one the rule of GPT-2, under which for example "\\n\\n1" splits differently than in
    SmolLM2, whose digits are split off first.

    Raises:
        WorkbenchError: for a rule that is not known here.
    """
    if field(reader, "tokenizer.ggml.model") != "gpt2":
        return tokenizer
    rule = field(reader, "tokenizer.ggml.pre")
    if rule not in _PATTERNS:
        raise WorkbenchError(
            f"{path} names the pre-tokenizer {rule!r}, supported are {', '.join(_PATTERNS)}; "
            "use the model's Hugging Face folder instead."
        )
    pattern, digits_first = _PATTERNS[rule]
    backend = tokenizer.backend_tokenizer
    digits = [pre_tokenizers.Digits(individual_digits=True)] if digits_first else []
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, split, to_bytes])
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    if rule == "llama-bpe":
        backend.model.ignore_merges = True
    return tokenizer
