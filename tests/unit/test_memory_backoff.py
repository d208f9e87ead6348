"""Batches that run out of memory are run again in smaller ones, with the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import build_tiny_model

from sgworkbench.analysis import Site, capture, capture_moments, capture_span_means
from sgworkbench.analysis.directions import directions_between
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel, load_model
from sgworkbench.models.memory import automatic_batch_rows, automatic_batch_tokens, is_out_of_memory
from sgworkbench.prompting import PromptSet, RenderedPrompt, Renderer
from sgworkbench.prompting.token_batch import run_batches
from sgworkbench.steering import GenerationSettings, generate, trace_generation


def _failing(at_most: int) -> Callable[[list[int]], list[int]]:
    def run(rows: list[int]) -> list[int]:
        if len(rows) > at_most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [row * 10 for row in rows]

    return run


def test_every_item_is_run_once_in_batches_that_fit() -> None:
    lengths = [5, 9, 3, 8, 2, 7, 4]
    done = list(run_batches(lengths, _failing(2), max_tokens=1000))
    assert sorted(row for rows, _ in done for row in rows) == list(range(7))
    assert all(len(rows) <= 2 for rows, _ in done)
    assert all(result == [row * 10 for row in rows] for rows, result in done)


def test_a_single_item_that_does_not_fit_is_a_sentence() -> None:
    with pytest.raises(WorkbenchError, match="single prompt of 9 tokens"):
        list(run_batches([9, 3], _failing(0), max_tokens=1000))


def test_other_errors_are_not_caught() -> None:
    def run(rows: list[int]) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        list(run_batches([1], run, max_tokens=10))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: not enough memory: you tried"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(build_tiny_model("llama", tmp_path_factory.mktemp("m") / "llama"))


@pytest.fixture(scope="module")
def rendered(loaded: LoadedModel) -> list[RenderedPrompt]:
    renderer = Renderer(loaded.tokenizer)
    texts = ["one", "two words", "three words here", "a longer question than that", "and the longest one of them all"]
    return [renderer.render(prompt) for prompt in PromptSet.from_texts(texts)]


@contextmanager
def _short_of_memory(loaded: LoadedModel, rows: int, block: int) -> Iterator[list[int]]:
    """Make a block fail, after the blocks before it have been read, whenever a batch has more than `rows` rows."""
    failed: list[int] = []

    def fail(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > rows:
            failed.append(len(arguments[0]))
            raise torch.OutOfMemoryError("out of memory, for the test")

    handle = loaded.model.blocks[block].mlp.register_forward_pre_hook(fail)
    try:
        yield failed
    finally:
        handle.remove()


SITES = tuple(Site(layer) for layer in range(3))


def test_readings_are_the_same_after_a_batch_was_halved(loaded: LoadedModel, rendered: list[RenderedPrompt]) -> None:
    before = (
        capture(loaded, rendered, SITES, "all").values,
        capture_moments(loaded, rendered, SITES, "all", covariance=True),
        capture_span_means(loaded, rendered, SITES, "instruction"),
    )
    with _short_of_memory(loaded, rows=2, block=1) as failed:
        after = (
            capture(loaded, rendered, SITES, "all").values,
            capture_moments(loaded, rendered, SITES, "all", covariance=True),
            capture_span_means(loaded, rendered, SITES, "instruction"),
        )
    assert len(failed) >= 3
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(after[1].mean, before[1].mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(after[1].covariance, before[1].covariance, rtol=0, atol=1e-5)
    torch.testing.assert_close(after[2], before[2], rtol=0, atol=1e-5)


def test_answers_and_traces_are_the_same_after_a_batch_was_halved(
    loaded: LoadedModel, rendered: list[RenderedPrompt]
) -> None:
    width = loaded.identity.d_model
    one, zero = torch.randn(2, 1, width, generator=torch.Generator().manual_seed(0))
    directions = directions_between(one, zero, concept="test", source="random", read_at="last_prompt", sites=(Site(0),))
    settings = GenerationSettings(max_new_tokens=6)
    before = generate(loaded, rendered, settings), trace_generation(loaded, rendered, directions, settings).table
    with _short_of_memory(loaded, rows=2, block=1) as failed:
        after = generate(loaded, rendered, settings), trace_generation(loaded, rendered, directions, settings).table
    assert failed
    assert after[0] == before[0]
    assert len(after[1]) == len(before[1])
    assert after[1]["raw"].to_numpy() == pytest.approx(before[1]["raw"].to_numpy(), abs=1e-4)


def test_the_automatic_size_follows_the_device(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    assert automatic_batch_tokens(loaded) == 512
    assert automatic_batch_tokens(loaded, cached=True) == 8192
    assert automatic_batch_rows(loaded) == 32
    little = type("Memory", (), {"available": 2**20})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    assert 256 <= automatic_batch_tokens(loaded) < 512
