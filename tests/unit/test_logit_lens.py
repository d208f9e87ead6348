"""The logit lens against the model's own logits and against products written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES

from sgworkbench.analysis.capture import capture
from sgworkbench.analysis.logit_lens import lens_logits, lens_of_streams, lens_of_vectors
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.refusal_score import first_token_logits
from sgworkbench.prompting import PromptCondition, Renderer

TEXTS = ["How do I bake a loaf of bread?", "Why is the sky blue?"]
SAFE = PromptCondition("safe", system="You should be a responsible assistant.")


@pytest.mark.parametrize("family", FAMILIES)
def test_last_block_through_the_final_norm_is_the_model(tiny_model: Callable[..., Any], family: str) -> None:
    loaded = tiny_model(family)
    rendered = [Renderer(loaded.tokenizer).render(text) for text in TEXTS]
    stream = capture(loaded, rendered, [Site(2)]).values[:, 0]
    assert torch.allclose(lens_logits(loaded, stream), first_token_logits(loaded, rendered), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_norm_weights_are_the_slope_of_the_final_norm(tiny_model: Callable[..., Any], family: str) -> None:
    """A small change along a vector that leaves the norm's divisor alone moves the logits in proportion to the lens."""
    loaded = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    stream, vector = torch.randn(2, loaded.identity.d_model, generator=generator).double()
    # To first order the divisor does not change when the change is orthogonal to the (centred) stream.
    centred = stream - stream.mean() if family == "gpt2" else stream
    vector = vector - (vector @ centred) / (centred @ centred) * centred
    step = 1e-2
    both = torch.stack([stream + step * vector, stream - step * vector]).float()
    with torch.inference_mode():
        logits = loaded.model.unembed(loaded.model.ln_final(both[None]))[0].double()
    slope = (logits[0] - logits[1]) / (2 * step)
    divisor = (centred @ centred / len(centred) + loaded.model.cfg.eps).sqrt()
    lens = lens_logits(loaded, vector.float()[None], "norm_weights")[0].double()
    assert torch.allclose(slope * divisor, lens, atol=5e-3)


def test_bare_unembedding_is_a_matrix_product(tiny_model: Callable[..., Any]) -> None:
    loaded = tiny_model("qwen2")
    vectors = torch.randn(70, loaded.identity.d_model, generator=torch.Generator().manual_seed(1))
    expected = vectors @ loaded.model.unembed.W_U.detach()
    assert torch.allclose(lens_logits(loaded, vectors, "none"), expected, atol=1e-5)
    scaled = (vectors * loaded.model.ln_final.w.detach()) @ loaded.model.unembed.W_U.detach()
    assert torch.allclose(lens_logits(loaded, vectors, "norm_weights"), scaled, atol=1e-5)
    assert not torch.allclose(scaled, expected, atol=0.1)


def test_a_token_s_own_unembedding_is_read_as_that_token(tiny_model: Callable[..., Any]) -> None:
    loaded = tiny_model("llama")
    table = loaded.model.unembed.W_U.detach().T
    token = int((table @ table[200]).argmax())
    lens = lens_of_vectors(loaded, {Site(1): table[token], Site(0): -table[token]}, norm="none", n_tokens=3)
    frame = lens.to_dataframe()
    first = frame[frame["rank"] == 1].set_index(["layer", "side"])
    assert first.loc[(1, "promoted"), "token_id"] == token
    assert first.loc[(0, "suppressed"), "token_id"] == token
    assert first.loc[(1, "promoted"), "token"] == loaded.tokenizer.decode([token])
    assert first.loc[(1, "promoted"), "logit"] == pytest.approx(-first.loc[(0, "suppressed"), "logit"])
    assert list(lens.top(2).index) == ["resid_post[0]", "resid_post[1]"]
    assert lens.top(2).shape == (2, 2)
    assert "norm_weights" not in lens._repr_html_()


def test_streams_are_means_of_log_probabilities_and_differences_of_them(tiny_model: Callable[..., Any]) -> None:
    loaded = tiny_model("llama")
    renderer = Renderer(loaded.tokenizer)
    plain, safe = [renderer.render(t) for t in TEXTS], [renderer.render(t, SAFE) for t in TEXTS]
    expected = torch.log_softmax(first_token_logits(loaded, safe), -1).mean(0)
    found = lens_of_streams(loaded, safe, [Site(2), Site(1)], n_tokens=5).to_dataframe()
    top = found[(found["layer"] == 2) & (found["side"] == "promoted")]
    assert list(top["token_id"]) == expected.topk(5).indices.tolist()
    assert torch.allclose(torch.tensor(top["logit"].to_list()), expected.topk(5).values, atol=1e-4)
    change = expected - torch.log_softmax(first_token_logits(loaded, plain), -1).mean(0)
    compared = lens_of_streams(loaded, safe, [Site(2)], compared_with=plain, n_tokens=4)
    down = compared.table[compared.table["side"] == "suppressed"]
    assert list(down["token_id"]) == (-change).topk(4).indices.tolist()
    assert compared.quantity == "change of the log-probability"
    assert compared.facts["compared with"] == "plain"


def test_mistakes_are_refused(tiny_model: Callable[..., Any]) -> None:
    loaded = tiny_model("llama")
    with pytest.raises(WorkbenchError, match="at least one vector"):
        lens_of_vectors(loaded, {})
    with pytest.raises(WorkbenchError, match="width 32, found 8"):
        lens_logits(loaded, torch.zeros(1, 8))
    with pytest.raises(WorkbenchError, match="n_tokens must be"):
        lens_of_vectors(loaded, {Site(0): torch.ones(32)}, n_tokens=0)
    with pytest.raises(WorkbenchError, match="Unknown side"):
        lens_of_vectors(loaded, {Site(0): torch.ones(32)}).top(2, "left")
