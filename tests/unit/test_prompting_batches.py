"""Padded batches and the inspection of rendered tokens."""

from __future__ import annotations

import pytest
import torch
from prompting_templates import byte_tokenizer
from rich.console import Console

from sgworkbench.errors import WorkbenchError
from sgworkbench.prompting import PRESETS, PromptCondition, PromptSet, RenderedPrompt, Renderer
from sgworkbench.prompting.inspection import rendered_html, rendered_text, visible
from sgworkbench.prompting.rendering import ROLES
from sgworkbench.prompting.token_batch import (
    announced_batch,
    check_lengths,
    current_batch,
    length_sorted_batches,
    pad_prompts,
)


@pytest.fixture(scope="module")
def rendered() -> list[RenderedPrompt]:
    renderer = Renderer(byte_tokenizer())
    condition = PromptCondition("c", system="Hi", suffix="!", prefill="Yes")
    return [renderer.render("a"), renderer.render("Bake 🙂 bread", condition), renderer.render("ab")]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_real_column_names_its_token(rendered: list[RenderedPrompt], side: str) -> None:
    batch = pad_prompts(rendered, side=side, device="cpu", rows=[7, 5, 6], pad_id=3)  # type: ignore[arg-type]
    longest = max(len(item) for item in rendered)
    assert batch.token_ids.shape == (3, longest)
    for row, item in enumerate(rendered):
        real = batch.is_real[row]
        assert batch.token_ids[row][real].tolist() == list(item.token_ids)
        assert batch.positions[row][real].tolist() == list(range(len(item)))
        assert [ROLES[i] for i in batch.roles[row][real]] == list(item.roles)
        assert set(batch.token_ids[row][~real].tolist()) <= {3}
        assert set(batch.roles[row][~real].tolist()) | set(batch.positions[row][~real].tolist()) <= {-1}
        # The pads are all on the side asked for.
        assert bool(real[0 if side == "right" else -1])
        assert int((real.int().diff() != 0).sum()) <= 1
    assert batch.last_prompt.tolist() == [len(item) - 1 for item in rendered]
    assert batch.rows.tolist() == [7, 5, 6]
    assert pad_prompts(rendered, side="left", device="cpu").rows.tolist() == [0, 1, 2]


def test_an_empty_batch_is_an_error() -> None:
    with pytest.raises(WorkbenchError, match="No prompts were given"):
        pad_prompts([], side="right", device="cpu")


@pytest.mark.parametrize(("tokens", "rows"), [(4096, 64), (20, 64), (100, 3), (1, 64), (0, 1)])
def test_batches_cover_every_prompt_once_within_the_limits(tokens: int, rows: int) -> None:
    lengths = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(length_sorted_batches(lengths, max_tokens=tokens, max_rows=rows))
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    for batch in batches:
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
    longest = [lengths[i] for batch in batches for i in batch]
    assert longest == sorted(lengths, reverse=True)
    assert list(length_sorted_batches([])) == []


def test_prompts_that_do_not_fit_are_named(rendered: list[RenderedPrompt]) -> None:
    longest = max(len(item) for item in rendered)
    check_lengths(rendered, longest)
    with pytest.raises(WorkbenchError, match=f"Prompt '0' has {longest} tokens, but .* context of {longest - 1};"):
        check_lengths(rendered, longest - 1)
    with pytest.raises(WorkbenchError, match=f"has {longest} tokens plus 2 new tokens"):
        check_lengths(rendered, longest + 1, new_tokens=2)
    with pytest.raises(WorkbenchError, match="No prompts were given"):
        check_lengths([], 10)


def test_the_announced_batch_is_forgotten_even_after_an_error(rendered: list[RenderedPrompt]) -> None:
    one, two = (pad_prompts(rendered, side=side, device="cpu") for side in ("left", "right"))  # type: ignore[arg-type]

    def failing() -> None:
        with announced_batch(two):
            assert current_batch() is two
            raise ValueError("inside")

    assert current_batch() is None
    with announced_batch(one):
        with pytest.raises(ValueError, match="inside"):
            failing()
        assert current_batch() is one
    assert current_batch() is None


def test_control_characters_are_shown_and_never_sent_to_the_terminal() -> None:
    assert visible("a\n\tb\r") == "a⏎⇥b␍"
    assert visible("\x1b[31m\x00\x7f") == "\\x1b[31m\\x00\\x7f"
    assert visible("é🙂 ") == "é🙂 "


def test_a_terminal_sees_every_token_and_a_legend_of_its_roles(rendered: list[RenderedPrompt]) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rendered_text(rendered[1]))
    shown = console.export_text()
    assert "Bake 🙂 bread!<|im_end|>⏎" in shown
    legend = shown.strip().splitlines()[-1].split()
    assert legend == ["system", "instruction", "user_suffix", "template", "prefill"]


def test_html_is_escaped_and_complete() -> None:
    item = Renderer(byte_tokenizer()).render('<b>&"x"', PromptCondition("<i>", suffix="!"))
    page = rendered_html(item)
    assert "<b>&" not in page.replace("<b>&lt;i&gt;</b>", "")
    assert page.count('<span title="') == len(item)
    assert "condition <b>&lt;i&gt;</b>" in page
    assert item._repr_html_() == page


def test_conditions_and_sets_show_themselves_without_prompt_texts() -> None:
    assert "adds nothing" in PromptCondition("<p>")._repr_html_()
    assert "responsible ChatGPT" in PRESETS["self-reminder"]._repr_html_()
    page = PromptSet.from_texts(["SECRET <text>"], name="<n>", label="harmful")._repr_html_()
    assert "SECRET" not in page
    assert "&lt;n&gt;" in page
    assert "<td>harmful</td><td>1</td>" in page
