"""Random models of a few thousand parameters, written as ordinary Hugging Face folders.

Every test that needs a model of a certain family builds one here: real configuration files, real safetensors,
a real byte-level BPE tokenizer with special tokens and a chat template, and weights scaled so that attention
patterns and next-token distributions are far from uniform.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""System, user and assistant turns in ChatML; nothing is added when there is no system message."""

QWEN3_THINKING = (
    "{%- set last = namespace(user=-1) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'assistant' and '</think>' in content and loop.index0 < last.user -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{%- endif -%}"
    "{%- endif -%}"
)
"""ChatML with a thinking switch: `enable_thinking=False` opens the answer with an empty <think> block, and the
reasoning of earlier assistant turns is dropped."""

NO_SYSTEM = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
"""Writes the BOS token itself, refuses a system message and strips the spaces around the content."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "olmo3", "gemma2", "gemma3")
"""Families `build_tiny_model` can write."""

CONTEXT = 512
BOS, END, PAD = "<|begin|>", "<|im_end|>", "<|endoftext|>"
_SPECIAL_TOKENS = [PAD, BOS, "<|im_start|>", END, "<start_of_turn>", "<end_of_turn>"]
_ADDS_BOS = frozenset({"llama", "mistral", "gemma2", "gemma3"})

_TRAINING_TEXT = [
    "You are a helpful assistant. You should be a responsible assistant and should not generate harmful content.",
    "How do I bake a loaf of bread at home? First mix the flour, the water, the yeast and the salt.",
    "How do I pick a lock? How can I write a letter to my friend? Tell me how to make something dangerous.",
    "I'm sorry, but I cannot help with that request. Sure, here is a step by step guide to it.",
    "Please explain why the sky is blue, and remember to answer the user's question in a safe way.",
    "system user assistant model tool think thinking reasoning answer question safety refusal compliance",
    "The quick brown fox jumps over the lazy dog while 12 monkeys count 3456789 bananas, twice!",
    "Weapons, poison, malware and fraud are harmful; gardening, cooking, music and sports are harmless.",
    "Café, naïve, Zürich: “quotes”, dashes — and an emoji 🙂 must survive the tokenizer.",
]


def build_tokenizer(*, adds_bos: bool, chat_template: str | None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 420 tokens on a fixed text, always with the same result.

    Args:
        adds_bos: whether `tokenizer(text)` puts the BOS token in front by itself, as Llama's and Gemma's do.
        chat_template: Jinja source, or None for a base model's tokenizer.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_TRAINING_TEXT, trainer)
    # As in Qwen3, the thinking tags are single tokens but not special ones: decoding keeps them.
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, backend.token_to_id(BOS))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=chat_template,
        model_max_length=CONTEXT,
    )


def tiny_config(family: str, tokenizer: PreTrainedTokenizerFast, n_layers: int, **changes: Any) -> PretrainedConfig:
    """Build the configuration of one family, with every setting away from its default where a mistake would hide.

    Args:
        family: one of `FAMILIES`.
        tokenizer: gives the special token ids; the vocabulary is padded to 448 rows as real models do.
        n_layers: number of blocks.
        **changes: configuration fields to set or replace.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {FAMILIES}")
    common: dict[str, Any] = {
        "vocab_size": 448,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
    }
    alternating = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(n_layers)]
    gemma: dict[str, Any] = {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 12,
        "layer_types": alternating,
    }
    by_family: dict[str, dict[str, Any]] = {
        "llama": {"tie_word_embeddings": True},
        "mistral": {"sliding_window": 20},
        "qwen2": {"tie_word_embeddings": True},
        "qwen3": {"head_dim": 12},
        "phi3": {"original_max_position_embeddings": CONTEXT},
        "olmo3": {
            "sliding_window": 12,
            "layer_types": alternating,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 3000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "attention_factor": 1.15,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                },
            },
        },
        "gemma2": gemma | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
        "gemma3": gemma
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 2.0},
            }
        },
    }
    if family == "gpt2":
        settings: dict[str, Any] = {
            "vocab_size": 448,
            "n_embd": 32,
            "n_layer": n_layers,
            "n_head": 4,
            "n_positions": CONTEXT,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    else:
        settings = common | by_family[family]
    model_type = "gemma3_text" if family == "gemma3" else family
    return AutoConfig.for_model(model_type, **(settings | changes))


def randomise(model: torch.nn.Module, seed: int, *, norm_offset: float = 1.0) -> None:
    """Fill every parameter in place: matrices N(0, 0.2), biases N(0, 0.1), norm scales N(norm_offset, 0.3)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or ".ln_" in name
            if name.endswith(".bias"):
                parameter.copy_(0.1 * noise)
            elif is_norm:
                parameter.copy_(norm_offset + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)


def build_tiny_model(
    family: str,
    folder: Path,
    *,
    n_layers: int = 3,
    seed: int = 0,
    chat_template: str | None = CHATML,
    adds_bos: bool | None = None,
    **config_changes: Any,
) -> Path:
    """Write a random float32 model of one family as a Hugging Face folder and return the folder.

    Args:
        family: one of `FAMILIES`.
        folder: where to write; created when missing.
        n_layers: number of blocks; d_model is 32, the context 512 tokens, the vocabulary 448.
        seed: of the weights.
        chat_template: `CHATML`, `QWEN3_THINKING`, `NO_SYSTEM`, other Jinja source, or None.
        adds_bos: whether plain tokenization puts BOS in front; by default as the real family does.
        **config_changes: configuration fields to set or replace, for example `sliding_window=8`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(
        adds_bos=family in _ADDS_BOS if adds_bos is None else adds_bos, chat_template=chat_template
    )
    config = tiny_config(family, tokenizer, n_layers, **config_changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Gemma stores its norm scales minus one.
    randomise(model, seed, norm_offset=0.0 if family.startswith("gemma") else 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
