"""Coloured tokens as self-contained HTML: values on a diverging background, or the roles of the tokens.

The colours follow the light or dark setting of the page they are shown in (the browser's colour scheme, and the
theme of JupyterLab or VS Code where those say something else). Token texts are escaped and their invisible
characters shown, so that no token can break out of its cell or hide.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sgworkbench.errors import WorkbenchError
from sgworkbench.plotting.checks import require_some_finite
from sgworkbench.plotting.labels import visible
from sgworkbench.plotting.shift_map import ROBUST_PERCENTILE, robust_limit
from sgworkbench.plotting.theme import (
    BEHAVIOUR,
    FONT_FAMILY,
    GRID,
    INK,
    MISSING,
    MONOSPACE_FAMILY,
    MUTED,
    PAGE,
    ROLES,
    Shade,
    check_role,
)

_STRONGEST = 0.9
_ENDS = {"negative": BEHAVIOUR["complied"].shade, "positive": BEHAVIOUR["refused"].shade}


def coloured_tokens_html(
    tokens: Sequence[str],
    values: Float[np.ndarray, " *any"],
    *,
    unit: str,
    label: str = "projection",
    roles: Sequence[str] | None = None,
    limit: float | int | None = None,
    towards: tuple[str, str] = ("compliance", "refusal"),
) -> str:
    """Tokens on a background that says their value: the colour of refusal above zero, of compliance below.

    Args:
        tokens: text of each token.
        values: one number per token; NaN is drawn grey.
        unit: unit of the values, for the legend and the hover.
        label: what the values are, with layer and site ("shift along the refusal direction, layer 12, resid_post").
        roles: role of each token, for the hover.
        limit: value of the strongest colour; by default the 99th percentile of the absolute values.
        towards: what negative and positive values point to.

    Returns:
        One HTML element with its own style sheet; nothing is loaded from anywhere. Negative values are also
        underlined with dots, so that the sign survives grey print.

    Raises:
        WorkbenchError: lengths disagree, an unknown role, infinite or only missing values, or a limit that is not
            a positive number.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.shape != (len(tokens),):
        raise WorkbenchError(f"{len(tokens)} tokens need as many values; values of shape {numbers.shape} were given.")
    _check_roles(tokens, roles)
    require_some_finite(numbers, "coloured tokens")
    if np.isinf(numbers).any():
        raise WorkbenchError("The coloured tokens hold infinite values; find where they come from.")
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise WorkbenchError(f"The limit of a colour range must be a positive number, not {limit!r}.")
    end = robust_limit(numbers) if limit is None else float(limit)
    cells = []
    for index, (token, number) in enumerate(zip(tokens, numbers.tolist(), strict=True)):
        told = "no value" if math.isnan(number) else f"{number:+.3g} {unit}"
        role = "" if roles is None else f", {roles[index]}"
        cells.append(_cell(token, f"token {index}{role}: {told}", *_value_look(number, end)))
    origin = "as given" if limit is not None else f"{ROBUST_PERCENTILE:g}th percentile of |value|"
    legend = (
        f"<span>{html.escape(label)}, {html.escape(unit)}:</span>"
        f"<span class='sgw-range'>{html.escape(towards[0])} {-end:.3g}<i class='sgw-scale'></i>"
        f"{end:+.3g} {html.escape(towards[1])}</span><span>(range: {origin})</span>"
    )
    return _element(cells, legend)


def role_tokens_html(tokens: Sequence[str], roles: Sequence[str]) -> str:
    """Tokens on the background of their role, with a legend of the roles that occur.

    Args:
        tokens: text of each token.
        roles: role of each token: system, user_prefix, instruction, user_suffix, template, prefill, reasoning or
            answer.

    Returns:
        One HTML element with its own style sheet.

    Raises:
        WorkbenchError: no tokens, lengths disagree, or an unknown role.
    """
    if not tokens:
        raise WorkbenchError("There are no tokens to show.")
    _check_roles(tokens, roles)
    cells = [
        _cell(token, f"token {index}, {role}", f"sgw-{role}", "")
        for index, (token, role) in enumerate(zip(tokens, roles, strict=True))
    ]
    counts = {role: list(roles).count(role) for role in dict.fromkeys(roles)}
    legend = "".join(f"<span><b class='sgw-{role}'></b>{role} ({n})</span>" for role, n in counts.items())
    return _element(cells, legend)


def _check_roles(tokens: Sequence[str], roles: Sequence[str] | None) -> None:
    if roles is None:
        return
    if len(roles) != len(tokens):
        raise WorkbenchError(f"{len(tokens)} tokens need as many roles; {len(roles)} were given.")
    for role in roles:
        check_role(role)


def _value_look(number: float, end: float) -> tuple[str, str]:
    """Classes and inline style of a value's cell; the text is black or white, whichever stands out more."""
    if math.isnan(number):
        return "sgw-none", ""
    sign = "negative" if number < 0 else "positive"
    opacity = round(_STRONGEST * min(1.0, abs(number) / end), 3)
    classes = f"sgw-{sign}"
    if _luminance(_ENDS[sign].light, PAGE.light, opacity) < _SWITCH:
        classes += " sgw-lw"
    if _luminance(_ENDS[sign].dark, PAGE.dark, opacity) >= _SWITCH:
        classes += " sgw-db"
    return classes, f"--a:{opacity:g}"


# Luminance at which black and white text have the same contrast, sqrt(1.05 * 0.05) - 0.05 (WCAG 2.1 definition).
_SWITCH = math.sqrt(1.05 * 0.05) - 0.05


def _luminance(colour: str, page: str, opacity: float) -> float:
    """Relative luminance (WCAG 2.1) of ``colour`` laid over ``page``."""
    total = 0.0
    for start, weight in ((1, 0.2126), (3, 0.7152), (5, 0.0722)):
        over, under = (int(part[start : start + 2], 16) / 255 for part in (colour, page))
        channel = opacity * over + (1 - opacity) * under
        total += weight * (channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4)
    return total


def _cell(token: str, hover: str, classes: str, style: str) -> str:
    inline = f' style="{style}"' if style else ""
    shown = f'<span class="sgw-t {classes}" title="{html.escape(hover)}"{inline}>{html.escape(visible(token))}</span>'
    return shown + "<br>" * token.count("\n")


def _element(cells: Sequence[str], legend: str) -> str:
    parts = (f'<div class="sgw-legend">{legend}</div>', f'<div class="sgw-text">{"".join(cells)}</div>')
    return f'<style>{_STYLE}</style><div class="sgw-tokens">{"".join(parts)}</div>'


def _rgb(colour: str) -> str:
    return " ".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))


def _variables(theme: str) -> str:
    named: dict[str, Shade] = {"page": PAGE, "ink": INK, "muted": MUTED, "grid": GRID, "none": MISSING}
    named |= {role.replace("_", "-"): shade for role, shade in ROLES.items()}
    lines = [f"--sgw-{name}:{shade.on(theme)}" for name, shade in named.items()]
    lines += [f"--sgw-{sign}:{_rgb(shade.on(theme))}" for sign, shade in _ENDS.items()]
    # Text colour of a cell without a switch, with the switch of the light theme, of the dark one, and with both.
    usual, other = ("#000", "#fff") if theme == "light" else ("#fff", "#000")
    switched = {"text": usual, "lw": "#fff", "db": other if theme == "dark" else usual, "other": other}
    lines += [f"--sgw-{name}:{colour}" for name, colour in switched.items()]
    return ";".join(lines)


def _style_sheet() -> str:
    """Rules under the prefix ``sgw-``. A notebook's own theme, named on its body, wins over the browser's."""
    dark_hosts = "body[data-jp-theme-light=false] .sgw-tokens,body.vscode-dark .sgw-tokens"
    light_hosts = "body[data-jp-theme-light=true] .sgw-tokens,body.vscode-light .sgw-tokens"
    roles = "".join(f".sgw-tokens .sgw-{role}{{background:var(--sgw-{role.replace('_', '-')})}}" for role in ROLES)
    return (
        f".sgw-tokens{{{_variables('light')}}}"
        f"@media (prefers-color-scheme:dark){{.sgw-tokens{{{_variables('dark')}}}}}"
        f"{dark_hosts}{{{_variables('dark')}}}{light_hosts}{{{_variables('light')}}}"
        f".sgw-tokens{{background:var(--sgw-page);color:var(--sgw-ink);font:13px/1.9 {MONOSPACE_FAMILY};"
        "padding:10px 12px;border:1px solid var(--sgw-grid);border-radius:6px;overflow-wrap:anywhere}"
        f".sgw-tokens .sgw-legend{{font:12.5px/1.6 {FONT_FAMILY};color:var(--sgw-muted);display:flex;flex-wrap:wrap;"
        "gap:2px 12px;align-items:center;margin-bottom:6px}"
        ".sgw-tokens .sgw-legend b{display:inline-block;width:12px;height:12px;border-radius:3px;"
        "margin-right:5px;vertical-align:-1px}"
        ".sgw-tokens .sgw-range{display:inline-flex;gap:8px;align-items:center;white-space:nowrap}"
        ".sgw-tokens .sgw-scale{width:150px;height:12px;border-radius:3px;background:linear-gradient(to right,"
        f"rgb(var(--sgw-negative)/{_STRONGEST}),rgb(var(--sgw-negative)/0) 50%,"
        f"rgb(var(--sgw-positive)/0) 50%,rgb(var(--sgw-positive)/{_STRONGEST}))}}"
        ".sgw-tokens .sgw-t{padding:2px 1px;margin-right:1px;border-radius:3px;color:var(--sgw-text);"
        "unicode-bidi:isolate;white-space:pre-wrap;-webkit-print-color-adjust:exact;print-color-adjust:exact}"
        ".sgw-tokens .sgw-positive{background:rgb(var(--sgw-positive)/var(--a))}"
        ".sgw-tokens .sgw-negative{background:rgb(var(--sgw-negative)/var(--a));"
        "text-decoration:underline dotted;text-underline-offset:3px}"
        ".sgw-tokens .sgw-none{background:var(--sgw-none)}"
        ".sgw-tokens .sgw-lw{color:var(--sgw-lw)}.sgw-tokens .sgw-db{color:var(--sgw-db)}"
        ".sgw-tokens .sgw-lw.sgw-db{color:var(--sgw-other)}" + roles
    )


_STYLE = _style_sheet()
