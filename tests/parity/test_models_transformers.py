"""Every family, and every setting a configuration can have: HookedTransformer equals transformers, layer by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, FAMILIES, build_tiny_model
from transformers import AutoModelForCausalLM

from sgworkbench.models import LoadedModel, compare_with_transformers, load_model, load_reference

# Longer than every sliding window and than the original context of the scaled rope variants.
LENGTH = 300


def assert_equals_transformers(loaded: LoadedModel, *, tolerance: float = 1e-4) -> None:
    """Compare with code that shares nothing with the package: hooks on the blocks of a freshly read model."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 420, (2, min(LENGTH, loaded.identity.context_length)), generator=generator)
    reference = AutoModelForCausalLM.from_pretrained(loaded.folder, dtype=torch.float32).eval()
    layers = reference.transformer.h if hasattr(reference, "transformer") else reference.get_decoder().layers
    outputs: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output if torch.is_tensor(output) else output[0])
        )
    with torch.no_grad():
        expected = reference(ids).logits
        logits, cache = loaded.model.run_with_cache(ids)
    assert len(outputs) == loaded.identity.n_layers
    for layer_index, output in enumerate(outputs):
        residual = cache["resid_post", layer_index]
        assert float((residual - output).abs().max()) < tolerance * float(output.abs().max()), layer_index
    assert float((logits - expected).abs().max()) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers(family: str, tmp_path: Path) -> None:
    loaded = load_model(build_tiny_model(family, tmp_path / "model"))
    assert loaded.parity is not None
    assert loaded.parity.passed
    assert_equals_transformers(loaded)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 3000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 3000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 3.0}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}),
    ("llama", {"rope_parameters": YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0}}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    ("llama", {"head_dim": 20, "hidden_act": "gelu"}),
    ("mistral", {"sliding_window": None, "head_dim": 16}),
    ("mistral", {"num_key_value_heads": 4, "rope_parameters": YARN}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("qwen3", {"rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 0.5}}),
    ("phi3", {"sliding_window": 24, "num_key_value_heads": 4}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40}),
    ("gpt2", {"scale_attn_weights": False, "activation_function": "relu", "tie_word_embeddings": False}),
    ("olmo3", {"num_key_value_heads": 4}),
    ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
                                   "full_attention": {"rope_type": "default", "rope_theta": 3000.0}}}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {"layer_types": ["full_attention"] * 3}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 3}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_configuration_setting_is_honoured(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(load_model(build_tiny_model(family, tmp_path / "model", **changes)))


def test_the_text_part_of_a_multimodal_gemma3_equals_transformers(tmp_path: Path) -> None:
    from tiny_models import build_tokenizer, randomise, tiny_config
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    tokenizer = build_tokenizer(adds_bos=True, chat_template=None)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = tiny_config("gemma3", tokenizer, 3)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=447)
    model = Gemma3ForConditionalGeneration(config)
    randomise(model, 0, norm_offset=0.0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.identity.architecture == "gemma3"
    assert loaded.identity.d_vocab == 448
    assert_equals_transformers(loaded)


@pytest.mark.parametrize("folder_name", ["my-llama-7b", "google-gemma-2b", "Llama-2-70b/gemma-3-1b"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_path_does_not_choose_the_family(folder_name: str, family: str, tmp_path: Path) -> None:
    loaded = load_model(build_tiny_model(family, tmp_path / folder_name))
    assert loaded.identity.architecture == family
    assert_equals_transformers(loaded)


def test_a_shorter_context_cuts_learned_positions(tmp_path: Path) -> None:
    loaded = load_model(build_tiny_model("gpt2", tmp_path / "model"), context_length=64)
    assert tuple(loaded.model.pos_embed.W_pos.shape) == (64, 32)
    assert_equals_transformers(loaded)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_load_and_agree_within_their_precision(dtype: str, tmp_path: Path) -> None:
    loaded = load_model(build_tiny_model("qwen3", tmp_path / "model"), dtype=dtype)
    assert loaded.identity.dtype == dtype
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.parity is not None
    # Unit roundoff of the dtype, times a margin for three blocks of sums over about fifty terms.
    roundoff = {"float16": 2**-11, "bfloat16": 2**-8, "float64": 2**-23}[dtype]
    assert loaded.parity.max_hidden_difference < 10 * roundoff


def test_cached_decoding_equals_a_full_forward(tmp_path: Path) -> None:
    from transformer_lens import TransformerLensKeyValueCache

    loaded = load_model(build_tiny_model("gemma3", tmp_path / "model"))
    ids = torch.randint(6, 420, (3, 40), generator=torch.Generator().manual_seed(2))
    cache = TransformerLensKeyValueCache.init_cache(loaded.model.cfg, "cpu", 3)
    steps = [loaded.model(ids[:, :30], past_kv_cache=cache, attention_mask=torch.ones(3, 30, dtype=torch.int))]
    for position in range(30, 40):
        one = torch.ones(3, 1, dtype=torch.int)
        steps.append(loaded.model(ids[:, position : position + 1], past_kv_cache=cache, attention_mask=one))
    expected = load_reference(loaded)(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)


def test_longest_context_by_default_up_to_4096(tmp_path: Path) -> None:
    short = load_model(build_tiny_model("llama", tmp_path / "short"), self_check=False)
    long = load_model(build_tiny_model("llama", tmp_path / "long", max_position_embeddings=8192), self_check=False)
    asked = load_model(tmp_path / "long", context_length=8192, self_check=False)
    assert (short.model.cfg.n_ctx, long.model.cfg.n_ctx, asked.model.cfg.n_ctx) == (CONTEXT, 4096, 8192)


@pytest.mark.demo_model
def test_demo_model_equals_transformers_and_itself_again() -> None:
    loaded = load_model("demo")
    assert loaded.identity.to_dict()["source"] == "demo"
    assert (loaded.identity.n_layers, loaded.identity.d_model, loaded.identity.d_vocab) == (30, 576, 49152)
    rendered = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake bread?\n\n1. Flour"}], tokenize=False, add_generation_prompt=True
    )
    ids = loaded.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
    report = compare_with_transformers(loaded, ids)
    assert report.max_logit_difference < 1e-3
    assert report.max_hidden_difference < 1e-4
    assert len(report.hidden_differences) == 31
    # A sentence only a trained model with the right rope base and tokenizer continues like this.
    question = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert loaded.tokenizer.decode(loaded.model(question)[0, -1].argmax()) == " Paris"
    again = load_model("demo", self_check=False)
    assert again.identity == loaded.identity
    assert torch.equal(again.model(question), loaded.model(question))


def test_self_check_reports_the_numbers_it_compares(tmp_path: Path) -> None:
    loaded = load_model(build_tiny_model("llama", tmp_path / "model"), self_check=False)
    ids = torch.randint(6, 420, (1, 20), generator=torch.Generator().manual_seed(3))
    reference = load_reference(loaded)
    # A change of known size after block 1: hidden differences before it are zero, after it at least that size.
    shift = torch.full((32,), 0.5)
    loaded.model.add_hook("blocks.1.hook_resid_post", lambda residual, hook: residual + shift)
    report = compare_with_transformers(loaded, ids, reference)
    after = reference(ids, output_hidden_states=True).hidden_states[2]
    expected = math.sqrt(32) * 0.5 / float(after.norm(dim=-1).min())
    assert not report.passed
    assert max(report.hidden_differences[:2]) < 1e-5
    assert report.hidden_differences[2] == pytest.approx(expected, rel=1e-4)
