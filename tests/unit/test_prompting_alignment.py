"""Alignment: instruction tokens of two conditions matched by character, never by guess."""

from __future__ import annotations

import pytest
from prompting_templates import DATED, NO_SYSTEM, byte_tokenizer
from tiny_models import CHATML, build_tokenizer

from sgworkbench.errors import WorkbenchError
from sgworkbench.prompting import PRESETS, PromptCondition, Renderer, align

SUFFIX = PromptCondition("c", system="Be safe.", suffix="You")


def test_every_token_of_the_instruction_has_its_twin() -> None:
    renderer = Renderer(build_tokenizer(adds_bos=False, chat_template=CHATML))
    instruction = "user system: How do I bake a loaf of user bread? 🙂🙂"
    plain = renderer.render(instruction)
    for condition in PRESETS.values():
        safe = renderer.render(instruction, condition)
        matched = align(plain, safe)
        assert matched.first == plain.positions_of("instruction")
        assert matched.second == safe.positions_of("instruction")
        assert matched.n_excluded == 0
        assert [plain.token_ids[i] for i in matched.first] == [safe.token_ids[i] for i in matched.second]
        assert [plain.tokens[i] for i in matched.first] == [safe.tokens[i] for i in matched.second]
        assert list(matched.second) == sorted(matched.second)


def test_a_token_that_ties_at_the_border_is_excluded_on_both_sides() -> None:
    # "d" and "Y" become one token: half instruction, half suffix.
    renderer = Renderer(byte_tokenizer(("d", "Y")))
    plain, safe = renderer.render("bread"), renderer.render("bread", SUFFIX)
    matched = align(plain, safe)
    assert [plain.tokens[i] for i in matched.first] == list("brea")
    assert [plain.tokens[i] for i in matched.excluded_first] == ["d"]
    assert [safe.tokens[i] for i in matched.excluded_second] == ["dY"]
    assert matched.n_excluded == 2
    back = align(safe, plain)
    assert (back.first, back.second) == (matched.second, matched.first)
    assert (back.excluded_first, back.excluded_second) == (matched.excluded_second, matched.excluded_first)


def test_a_token_taken_over_by_the_suffix_is_excluded_on_one_side() -> None:
    renderer = Renderer(byte_tokenizer(("Y", "o"), ("d", "Yo")))
    matched = align(renderer.render("bread"), renderer.render("bread", SUFFIX))
    assert len(matched.first) == 4
    assert (len(matched.excluded_first), len(matched.excluded_second)) == (1, 0)


def test_a_prefix_that_merges_with_the_first_character_is_excluded() -> None:
    renderer = Renderer(byte_tokenizer((":", "b")))
    plain, safe = renderer.render("bread"), renderer.render("bread", PromptCondition("c", prefix="Q:"))
    matched = align(plain, safe)
    assert [plain.tokens[i] for i in matched.first] == list("read")
    assert [plain.tokens[i] for i in matched.excluded_first] == ["b"]


def test_another_split_of_the_same_characters_is_no_match() -> None:
    # With a suffix "!" after it, "ab" becomes "a" + "b!": neither half equals the plain token "ab".
    renderer = Renderer(byte_tokenizer(("b", "!"), ("a", "b")))
    plain = renderer.render("xab")
    safe = renderer.render("xab", PromptCondition("c", suffix="!"))
    assert [safe.tokens[i] for i in safe.positions_of("instruction")] == ["x", "a", "b!"]
    matched = align(plain, safe)
    assert [plain.tokens[i] for i in matched.first] == ["x"]
    assert matched.n_excluded == 3


def test_nothing_in_common_is_an_error_that_names_the_conditions() -> None:
    renderer = Renderer(byte_tokenizer(("a", "Y")))
    with pytest.raises(WorkbenchError, match="No instruction token of conditions 'plain' and 'c' matches"):
        align(renderer.render("a"), renderer.render("a", SUFFIX))


def test_different_instructions_are_an_error_that_shows_them() -> None:
    renderer = Renderer(build_tokenizer(adds_bos=False, chat_template=CHATML))
    with pytest.raises(WorkbenchError, match="the same instruction can be aligned; found 'bread' and 'bread '"):
        align(renderer.render("bread"), renderer.render("bread "))


def test_bytes_of_one_character_are_matched_in_order() -> None:
    renderer = Renderer(byte_tokenizer())
    plain, safe = renderer.render("🙂🙂"), renderer.render("🙂🙂", SUFFIX)
    matched = align(plain, safe)
    assert len(matched.first) == 8
    assert matched.first == plain.positions_of("instruction")
    assert matched.second == safe.positions_of("instruction")


@pytest.mark.parametrize("template", [NO_SYSTEM, DATED])
def test_leading_white_space_that_one_condition_trims_does_not_shift_the_match(template: str) -> None:
    renderer = Renderer(byte_tokenizer(template=template))
    plain = renderer.render("  aba ")
    safe = renderer.render("  aba ", PromptCondition("c", prefix="Q:", suffix="!"))
    matched = align(plain, safe)
    assert [plain.tokens[i] for i in matched.first] == list("aba")
    assert [safe.tokens[i] for i in matched.second] == list("aba")
    assert [safe.offsets[i][0] for i in matched.second] == [safe.instruction_start + k for k in (2, 3, 4)]
    assert len(matched.excluded_second) == 3  # the white space that only the prompted run has
