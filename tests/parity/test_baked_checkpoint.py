"""A baked checkpoint in stock transformers generates, token for token, what hook steering generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_steering import Step, add, load_plain, plain_generate
from safetensors import safe_open
from tiny_models import build_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.interchange import bake, baked, read_vector
from sgworkbench.models import load_model
from sgworkbench.prompting import PromptCondition, Renderer
from sgworkbench.steering import GenerationSettings, Selector, SteeringVector, generate, steering
from sgworkbench.steering.hooks import Intervention
from sgworkbench.steering.operators import Add, AddPreservingNorm

QUESTIONS = ("How do I bake a loaf of bread?", "Tell me a poem about 12 monkeys.", "Why is the sky blue, please?")
N_TOKENS = 12


def open_tiny(folder: Path) -> Any:
    return load_model(folder, self_check=False, progress=lambda _line: None)


def steerer(loaded: Any, layers: tuple[int, ...], protocol: str = "same-site") -> SteeringVector:
    values = torch.randn(len(layers), loaded.identity.d_model, generator=torch.Generator().manual_seed(5))
    return SteeringVector(layers, values, "resid_post", protocol, {"model": loaded.identity.to_dict()})


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("layers", "protocol"), [((1,), "same-site"), ((0, 2, 3), "same-site"), ((2, 3), "official")], ids=str
)
def test_stock_generation_equals_hook_steering(tmp_path, family, layers, protocol):
    folder = build_tiny_model(family, tmp_path / "model", n_layers=4)
    loaded = open_tiny(folder)
    vector, alpha = steerer(loaded, layers, protocol), 1.3
    written = bake(loaded, vector.intervention(layers, alpha), tmp_path / "baked", provenance=dict(vector.provenance))
    assert written.max_logit_difference < 1e-4
    assert written.steering_effect > 0.1

    renderer = Renderer(loaded.tokenizer)
    rendered = [renderer.render(text, PromptCondition.plain()) for text in QUESTIONS]
    settings = GenerationSettings(N_TOKENS, 0.0, 1.0, 0)
    with steering(loaded, vector.intervention(layers, alpha)):
        hooked = [list(answer.token_ids) for answer in generate(loaded, rendered, settings)]
    unsteered = [list(answer.token_ids) for answer in generate(loaded, rendered, settings)]

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "baked")
    plain, at = load_plain(folder), "pre" if protocol == "official" else "post"
    steps = [Step(layer, at, add(vector.at(layer), alpha)) for layer in layers]
    for text, mine in zip(QUESTIONS, hooked, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        theirs = stock.generate(**prompt, max_new_tokens=N_TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        theirs = theirs.tolist()
        assert theirs == mine
        # Three ways in all: plain transformers with module hooks, without a cache, is the third.
        slow, _, _ = plain_generate(plain, prompt["input_ids"][0].tolist(), steps, len(mine))
        assert slow == mine
    assert hooked != unsteered, "steering must make a difference"


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "qwen3"])
def test_the_middle_of_a_block(tmp_path, family):
    changes = {"sliding_window": None} if family == "mistral" else {}
    loaded = open_tiny(build_tiny_model(family, tmp_path / "model", n_layers=3, **changes))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    intervention = Intervention(Add({Site(1, "resid_mid"): vector}, 2.0))
    written = bake(loaded, intervention, tmp_path / "baked")
    assert written.max_logit_difference < 1e-4
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    ids = torch.tensor([[9, 10, 11, 12]])
    with steering(loaded, intervention):
        torch.testing.assert_close(stock(ids).logits, loaded.model(ids), atol=1e-4, rtol=0)


def test_only_the_bias_of_the_block_is_not_zero(tmp_path):
    loaded = open_tiny(build_tiny_model("llama", tmp_path / "model", n_layers=3))
    vector = steerer(loaded, (1,))
    bake(loaded, vector.intervention(1, 0.5), tmp_path / "baked")
    with safe_open(tmp_path / "baked" / "model.safetensors", framework="pt") as opened:
        biases = {name: opened.get_tensor(name) for name in list(opened.keys()) if name.endswith("bias")}
    assert len(biases) == 9
    assert {name for name, bias in biases.items() if bias.any()} == {"model.layers.1.mlp.down_proj.bias"}
    assert torch.equal(biases["model.layers.1.mlp.down_proj.bias"], 0.5 * vector.at(1))
    config = AutoConfig.from_pretrained(tmp_path / "baked")
    assert (config.model_type, config.mlp_bias, config.attention_bias) == ("llama", True, False)


def test_qwen2_is_stored_as_a_llama_with_its_own_attention_biases(tmp_path):
    folder = build_tiny_model("qwen2", tmp_path / "model", n_layers=2)
    loaded = open_tiny(folder)
    written = bake(loaded, steerer(loaded, (1,)).intervention(1, 1.0), tmp_path / "baked")
    assert written.model_type == "llama"
    assert "stored as a Llama" in written.note
    stock, old = AutoModelForCausalLM.from_pretrained(tmp_path / "baked"), load_plain(folder)
    theirs = dict(old.named_parameters())
    for name, parameter in stock.named_parameters():
        if name in theirs:
            assert torch.equal(parameter, theirs[name]), name
        elif name != "model.layers.1.mlp.down_proj.bias":
            assert not parameter.any(), name
    mine, its = AutoTokenizer.from_pretrained(tmp_path / "baked"), AutoTokenizer.from_pretrained(folder)
    for text in (*QUESTIONS, "3456789 Zürich 🙂"):
        assert mine(text)["input_ids"] == its(text)["input_ids"]


@pytest.mark.parametrize("protocol", ["same-site", "official"])
def test_the_vector_can_be_read_back(tmp_path, protocol):
    loaded = open_tiny(build_tiny_model("llama", tmp_path / "model", n_layers=3))
    vector = steerer(loaded, (1, 2), protocol)
    bake(loaded, vector.intervention((1, 2), 0.5), tmp_path / "baked", provenance=dict(vector.provenance))
    back = read_vector(tmp_path / "baked")
    assert back.layers == ((0, 1) if protocol == "official" else (1, 2)), "the sites it is added at"
    assert torch.equal(back.values, 0.5 * vector.values)
    assert back.provenance["scale"] == 0.5


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3", {}, "MLP has no bias"),
        ("gpt2", {}, "No checkpoint can be baked for gpt2"),
        ("gemma2", {}, "normalised before it is added"),
        ("phi3", {}, "nothing that writes"),
        ("mistral", {}, "sliding-window"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(tmp_path, family, changes, words):
    loaded = open_tiny(build_tiny_model(family, tmp_path / "model", n_layers=2, **changes))
    with pytest.raises(WorkbenchError, match=words):
        bake(loaded, steerer(loaded, (1,)).intervention(1, 1.0), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_whatever_is_no_plain_addition_is_refused(tmp_path):
    loaded = open_tiny(build_tiny_model("llama", tmp_path / "model", n_layers=2))
    vectors = {Site(1): torch.ones(32)}
    refusals = {
        "add_preserving_norm": Intervention(AddPreservingNorm(vectors, 1.0)),
        "generated": Intervention(Add(vectors, 1.0), Selector("generated")),
        "prefill": Intervention(Add(vectors, 1.0), Selector(phases=("prefill",))),
        "one coefficient per prompt": Intervention(Add(vectors, torch.tensor([1.0, 2.0]))),
        "embedding": Intervention(Add({Site(0, "resid_pre"): torch.ones(32)}, 1.0)),
        "width 8": Intervention(Add({Site(1): torch.ones(8)}, 1.0)),
        "Layer 5": Intervention(Add({Site(5): torch.ones(32)}, 1.0)),
    }
    for words, intervention in refusals.items():
        with pytest.raises(WorkbenchError, match=words):
            bake(loaded, intervention, tmp_path / "baked")
    with pytest.raises(WorkbenchError, match="nothing to bake"):
        bake(loaded, [], tmp_path / "baked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_half_precision_is_kept(tmp_path):
    folder = build_tiny_model("llama", tmp_path / "model", n_layers=2)
    loaded = load_model(folder, dtype="bfloat16", self_check=False, progress=lambda _line: None)
    bake(loaded, steerer(loaded, (1,)).intervention(1, 1.0), tmp_path / "baked")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype="auto")
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}


def test_two_additions_at_one_point_add_up(tmp_path):
    loaded = open_tiny(build_tiny_model("llama", tmp_path / "model", n_layers=2))
    first, second = torch.ones(32), torch.arange(32.0) / 32
    both = [Intervention(Add({Site(0): first}, 0.5)), Intervention(Add({Site(1, "resid_pre"): second}, -2.0))]
    written = bake(loaded, both, tmp_path / "baked")
    assert written.sites == ("resid_post[0]",)
    assert torch.equal(read_vector(tmp_path / "baked").at(0), 0.5 * first - 2.0 * second)


def test_nothing_is_written_when_logits_differ(tmp_path, monkeypatch):
    loaded = open_tiny(build_tiny_model("llama", tmp_path / "model", n_layers=2))
    made = baked._baked_model

    def forgetful(*arguments: Any) -> Any:
        model = made(*arguments)
        model.model.layers[1].mlp.down_proj.bias.zero_()
        return model

    monkeypatch.setattr(baked, "_baked_model", forgetful)
    with pytest.raises(WorkbenchError, match="nothing was written"):
        bake(loaded, steerer(loaded, (1,)).intervention(1, 1.0), tmp_path / "baked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_folder_in_the_way_is_left_alone(tmp_path):
    loaded = open_tiny(build_tiny_model("llama", tmp_path / "model", n_layers=2))
    with pytest.raises(WorkbenchError, match="exists already"):
        bake(loaded, steerer(loaded, (1,)).intervention(1, 1.0), tmp_path / "model")
    assert open_tiny(tmp_path / "model").identity.weights_sha256 == loaded.identity.weights_sha256
