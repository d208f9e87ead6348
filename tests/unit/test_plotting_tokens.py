"""Coloured tokens: escaped, signed, readable in both colour schemes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sgworkbench.errors import WorkbenchError
from sgworkbench.plotting import ROLES, coloured_tokens_html, role_tokens_html
from sgworkbench.plotting.theme import BEHAVIOUR, PAGE


def cells(page: str) -> list[tuple[str, str, str, str]]:
    """Classes, hover, opacity and text of each token's cell."""
    pattern = r'<span class="sgw-t ([^"]*)" title="([^"]*)"(?: style="--a:([^"]*)")?>(.*?)</span>'
    return re.findall(pattern, page)


def test_text_is_escaped_and_line_ends_are_shown() -> None:
    page = coloured_tokens_html(["<script>alert(1)</script>", ' "&', "\n"], np.array([1.0, -1.0, 0.0]), unit="raw")
    assert "<script" not in page
    assert [cell[3] for cell in cells(page)] == [
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "·&quot;&amp;",
        "↵",
    ]
    assert page.count("<br>") == 1


def test_sign_strength_and_hover_follow_the_values() -> None:
    page = coloured_tokens_html(
        ["a", "b", "c", "d"], np.array([2.0, -1.0, np.nan, 9.0]), unit="raw", roles=["system"] * 4, limit=2.0
    )
    found = cells(page)
    assert [cell[0].split()[0] for cell in found] == ["sgw-positive", "sgw-negative", "sgw-none", "sgw-positive"]
    assert found[1][1] == "token 1, system: -1 raw"
    assert "no value" in found[2][1]
    opacities = [float(cell[2] or 0) for cell in found]
    assert opacities[0] == pytest.approx(2 * opacities[1])
    assert opacities[3] == opacities[0]


def test_equal_values_have_equal_strength_on_both_sides_of_zero() -> None:
    first, second = cells(coloured_tokens_html(["a", "b"], np.array([0.7, -0.7]), unit="raw"))
    assert first[2] == second[2]


def channels(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def contrast(first: np.ndarray, second: np.ndarray) -> float:
    def luminance(rgb: np.ndarray) -> float:
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_stays_readable_on_every_background_in_both_schemes() -> None:
    values = np.linspace(-1, 1, 81)
    page = coloured_tokens_html([str(i) for i in range(81)], values, unit="raw", limit=1.0)
    for (classes, _, alpha, _), value in zip(cells(page), values, strict=True):
        end = BEHAVIOUR["complied" if value < 0 else "refused"].shade
        white_in_light, black_in_dark = "sgw-lw" in classes, "sgw-db" in classes
        opacity = float(alpha)
        light = opacity * channels(end.light) + (1 - opacity) * channels(PAGE.light)
        dark = opacity * channels(end.dark) + (1 - opacity) * channels(PAGE.dark)
        assert contrast(np.ones(3) if white_in_light else np.zeros(3), light) >= 4.5
        assert contrast(np.zeros(3) if black_in_dark else np.ones(3), dark) >= 4.5


def test_every_scheme_defines_every_variable_that_is_used() -> None:
    page = role_tokens_html(["a"], ["answer"])
    used = set(re.findall(r"var\(--sgw-([a-z-]+)\)", page))
    blocks = [block for block in re.findall(r"\{([^{}]*)\}", page) if "--sgw-page:" in block]
    assert len(blocks) == 4
    for block in blocks:
        assert used <= set(re.findall(r"--sgw-([a-z-]+):", block))
    assert "prefers-color-scheme:dark" in page
    assert "http" not in page


def test_roles_have_their_class_and_a_legend_with_counts() -> None:
    roles = list(ROLES)
    page = role_tokens_html(["x"] * 9, [*roles, "answer"])
    assert [cell[0] for cell in cells(page)] == [f"sgw-{role}" for role in [*roles, "answer"]]
    assert "answer (2)" in page
    for role, shade in ROLES.items():
        assert f"--sgw-{role.replace('_', '-')}:{shade.light}" in page


@pytest.mark.parametrize(
    ("values", "roles", "limit", "message"),
    [
        ([1.0], None, None, "2 tokens need as many values"),
        ([np.nan, np.nan], None, None, "missing"),
        ([np.inf, 1.0], None, None, "infinite"),
        ([1.0, 1.0], ["system"], None, "as many roles"),
        ([1.0, 1.0], ["system", "sytem"], None, "Unknown token role"),
        ([1.0, 1.0], None, -1.0, "positive"),
    ],
)
def test_refuses_what_it_cannot_show(
    values: list[float], roles: list[str] | None, limit: float | None, message: str
) -> None:
    with pytest.raises(WorkbenchError, match=message):
        coloured_tokens_html(["a", "b"], np.array(values), unit="raw", roles=roles, limit=limit)


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(WorkbenchError, match="no tokens"):
        role_tokens_html([], [])
