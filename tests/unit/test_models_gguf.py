"""GGUF files: written here by hand from a tiny model, read back through `load_model`."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
from safetensors.torch import load_file
from tiny_models import CHATML, build_tiny_model
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgworkbench.errors import WorkbenchError
from sgworkbench.models import gguf as gguf_room
from sgworkbench.models import load_model
from sgworkbench.models.gguf_metadata import llama3_rope


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    cache = tmp_path / "cache"
    if "demo_model" not in request.keywords:
        monkeypatch.setenv("SGWORKBENCH_CACHE", str(cache))
    return cache


def quiet(_message: str) -> None:
    """Drop progress lines."""


def interleaved(weight: torch.Tensor, heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection in the order GGUF's llama architecture stores them."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous().numpy()


def write_gguf(
    folder: Path,
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "gpt-2",
    extra: dict[str, str] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """Write a tiny llama folder as a float32 GGUF file."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    vocabulary = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["content"] for token in tokenizer["added_tokens"]}
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    names += [f"[UNUSED{index}]" for index in range(config["vocab_size"] - len(names))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types([TokenType.CONTROL if name in special else TokenType.NORMAL for name in names])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(CHATML)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs, ours in {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }.items():
            writer.add_tensor(f"{target}{ours}.weight", weights[f"{source}{theirs}.weight"].numpy())
        query, key = weights[f"{source}self_attn.q_proj.weight"], weights[f"{source}self_attn.k_proj.weight"]
        writer.add_tensor(f"{target}attn_q.weight", interleaved(query, config["num_attention_heads"]))
        writer.add_tensor(f"{target}attn_k.weight", interleaved(key, config["num_key_value_heads"]))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


IDS = torch.randint(6, 420, (2, 60), generator=torch.Generator().manual_seed(0))


def test_round_trip_keeps_weights_settings_and_tokens(tmp_path: Path, own_cache: Path) -> None:
    folder = build_tiny_model("llama", tmp_path / "hf", adds_bos=False)
    path = write_gguf(folder, tmp_path / "tiny-model.gguf")
    messages: list[str] = []
    loaded = load_model(path, progress=messages.append)
    original = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded.model(IDS), original(IDS).logits, atol=1e-4, rtol=0)
    assert loaded.identity.name == "tiny-model"
    assert loaded.identity.architecture == "llama"
    assert loaded.model.cfg.rotary_base == 3000.0
    assert len(messages) == 1

    text = "How do I bake bread?\n\nCafé 🙂 <|im_start|>"
    ours, theirs = loaded.tokenizer, AutoTokenizer.from_pretrained(folder)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == CHATML
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)

    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(loaded.folder)
    assert torch.equal(direct(IDS).logits, again(IDS).logits)

    config = json.loads((loaded.folder / "config.json").read_text())
    assert "quantization_config" not in config
    # Transformers 4 looks for rope_theta here and nowhere else.
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 3000.0

    messages.clear()
    load_model(path, progress=messages.append)
    assert messages == []
    assert [entry.name[:5] for entry in own_cache.iterdir()] == ["gguf-"]


def test_two_loads_at_once_end_with_one_good_folder(tmp_path: Path, own_cache: Path) -> None:
    from sgworkbench.models.gguf import gguf_folder

    path = write_gguf(build_tiny_model("llama", tmp_path / "hf"), tmp_path / "m.gguf")
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(gguf_folder(path, quiet))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert list(own_cache.iterdir()) == [folders[0]]
    load_model(folders[0])


def test_llama3_rope_factors_are_recognised(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = build_tiny_model("llama", tmp_path / "hf", rope_parameters=rope, adds_bos=False)
    original = AutoModelForCausalLM.from_pretrained(folder)
    scaled = original.model.rotary_emb.inv_freq
    plain = 1.0 / 500000.0 ** (torch.arange(0, 8, 2) / 8)
    divisors = (plain / scaled).float().numpy()
    assert divisors.max() == pytest.approx(32.0)
    path = write_gguf(folder, tmp_path / "scaled.gguf", tensors={"rope_freqs.weight": divisors})
    loaded = load_model(path, progress=quiet)
    torch.testing.assert_close(loaded.model(IDS), original(IDS).logits, atol=1e-4, rtol=0)
    with pytest.raises(WorkbenchError, match="rope frequencies"):
        llama3_rope(divisors * np.linspace(1.0, 3.0, 4), 500000.0)


def test_digits_are_split_off_first_where_the_file_says_so(tmp_path: Path) -> None:
    folder = build_tiny_model("llama", tmp_path / "hf", adds_bos=False)
    text = "Steps:\n\n1. mix 3456\n\n2.  bake\n  7"
    expected = AutoTokenizer.from_pretrained(folder)
    plain = expected(text)["input_ids"]
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    loaded = load_model(write_gguf(folder, tmp_path / "m.gguf", pre="smollm"), progress=quiet)
    assert loaded.tokenizer(text)["input_ids"] == expected(text)["input_ids"] != plain


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "'yarn' rope scaling"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"architecture": "bert"}, "architecture 'bert'"),
        ({"tensors": {"rope_factors_long.weight": np.ones(4, np.float32)}}, "rope_factors_long"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_gguf(build_tiny_model("llama", tmp_path / "hf"), tmp_path / "m.gguf", **settings)
    with pytest.raises(WorkbenchError, match=words):
        load_model(path, progress=quiet)


def test_a_file_lacking_a_weight_is_refused_and_leaves_nothing_behind(tmp_path: Path, own_cache: Path) -> None:
    folder = build_tiny_model("llama", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    path = write_gguf(folder, tmp_path / "short.gguf")
    data = path.read_bytes()
    # Claim three blocks where the file holds two: the key is followed by its type and its 32-bit value.
    at = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    assert data[at] == 2
    path.write_bytes(data[:at] + b"\x03" + data[at + 1 :])
    with pytest.raises(WorkbenchError, match=r"lack model\.layers\.2"):
        load_model(path, progress=quiet)
    assert list(own_cache.iterdir()) == []


def test_missing_damaged_and_foreign_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="No GGUF file"):
        load_model(tmp_path / "absent.gguf")
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(WorkbenchError, match="not a GGUF file"):
        load_model(foreign)
    path = write_gguf(build_tiny_model("llama", tmp_path / "hf"), tmp_path / "m.gguf")
    data = path.read_bytes()
    for length in (6, 200, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:length])
        with pytest.raises(WorkbenchError, match="damaged or cut short"):
            load_model(path)


DEFAULT_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 3000.0},
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("phi3", {"sliding_window": 20}),
        ("gpt2", {"n_inner": 40}),
        ("gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
        ("gemma3", {"query_pre_attn_scalar": 16, "rope_parameters": DEFAULT_GEMMA3_ROPE, "layer_types": None}),
    ],
)
def test_weights_and_settings_of_every_other_architecture(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written with the gguf package's own tensor names; the tokenizer is not under test here."""
    layers = 7 if family == "gemma3" else 3
    folder = build_tiny_model(family, tmp_path / "hf", n_layers=layers, **changes)
    config = json.loads((folder / "config.json").read_text())
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, family)
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(config.get("intermediate_size") or config["n_inner"])
    writer.add_head_count(4)
    writer.add_vocab_size(448)
    writer.add_pad_token_id(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"token{index}" for index in range(448)])
    if family == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_head_count_kv(2)
        writer.add_rope_freq_base(3000.0)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    names = get_tensor_name_map(MODEL_ARCH[family.upper()], layers)
    for name, weight in load_file(folder / "model.safetensors").items():
        if family.startswith("gemma") and "norm" in name:
            weight = weight + 1
        if family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = AutoTokenizer.from_pretrained
    with monkeypatch.context() as patch:
        patch.setattr(gguf_room.AutoTokenizer, "from_pretrained", lambda **_settings: read(folder))
        converted = gguf_room.gguf_folder(path, quiet)
    loaded = load_model(converted)
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    torch.testing.assert_close(loaded.model(IDS), expected, atol=1e-4, rtol=0)
