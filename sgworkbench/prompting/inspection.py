"""Looking at prompts, conditions and rendered tokens, in a terminal and in HTML."""

from __future__ import annotations

import html
import unicodedata
from collections import Counter

from rich.text import Text

from sgworkbench.prompting.condition import PromptCondition
from sgworkbench.prompting.prompt_set import PromptSet
from sgworkbench.prompting.rendering import ROLES, RenderedPrompt, Role

# One colour per role, as a terminal background and as an HTML background; the text stays black on all of them.
ROLE_COLOURS: dict[Role, str] = {
    "system": "#c7b8ea",
    "user_prefix": "#f6c6ad",
    "instruction": "#9fd3f2",
    "user_suffix": "#f2a6c0",
    "template": "#dcdcdc",
    "prefill": "#f5e08a",
    "reasoning": "#b8e0c2",
    "answer": "#ffffff",
}


def visible(token: str) -> str:
    """Return a token with line breaks and other control characters made visible (and harmless to a terminal)."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" else c for c in shown)


def rendered_text(rendered: RenderedPrompt) -> Text:
    """Return the tokens for a terminal: one background colour per role, with a legend."""
    text = Text()
    for token, role in zip(rendered.tokens, rendered.roles, strict=True):
        text.append(visible(token), style=f"black on {ROLE_COLOURS[role]}")
        if "\n" in token:
            text.append("\n")
    text.append("\n\n")
    for role in ROLES:
        if role in rendered.roles:
            text.append(f" {role} ", style=f"black on {ROLE_COLOURS[role]}")
            text.append(" ")
    return text


def rendered_html(rendered: RenderedPrompt) -> str:
    """Return the tokens as self-contained HTML: role as colour, index, id and role on hover."""
    parts = []
    for index, (token, role) in enumerate(zip(rendered.tokens, rendered.roles, strict=True)):
        title = f"{index}: id {rendered.token_ids[index]}, {role}"
        shown = html.escape(visible(token)) or "∅"
        parts.append(
            f'<span title="{title}" style="background:{ROLE_COLOURS[role]};color:#111;border-radius:2px;'
            f'margin-right:1px;white-space:pre-wrap">{shown}</span>' + ("<br>" if "\n" in token else "")
        )
    legend = " ".join(
        f'<span style="background:{ROLE_COLOURS[role]};color:#111;padding:0 4px">{role}</span>'
        for role in ROLES
        if role in rendered.roles
    )
    return (
        f'<div style="font-family:monospace;line-height:1.7">{"".join(parts)}</div>'
        f'<div style="margin-top:6px;font-size:85%">condition <b>{html.escape(rendered.condition.name)}</b>, '
        f"{len(rendered)} tokens &nbsp; {legend}</div>"
    )


def condition_html(condition: PromptCondition) -> str:
    """Return a condition as a small HTML table of its parts."""
    rows = "".join(
        f'<tr><td>{name}</td><td style="text-align:left"><code>{html.escape(repr(value))}</code></td></tr>'
        for name, value in condition.to_dict().items()
        if value and name != "name"
    )
    body = rows or "<tr><td>adds nothing: the instruction alone</td></tr>"
    return f"<b>Prompt condition {html.escape(condition.name)}</b><table>{body}</table>"


def prompt_set_html(prompt_set: PromptSet) -> str:
    """Return counts by split, label and category of a prompt set; no prompt text is shown."""
    counts = Counter((p.split, p.label) for p in prompt_set)
    rows = "".join(
        f"<tr><td>{split}</td><td>{label}</td><td>{n}</td></tr>" for (split, label), n in sorted(counts.items())
    )
    categories = Counter(p.category for p in prompt_set if p.category)
    listed = ", ".join(f"{html.escape(name)} ({n})" for name, n in sorted(categories.items()))
    return (
        f"<b>Prompt set {html.escape(prompt_set.name)}</b>: {len(prompt_set)} prompts, "
        f"sha256 {prompt_set.content_hash[:12]}"
        f"<table><tr><th>split</th><th>label</th><th>n</th></tr>{rows}</table>"
        + (f"<div>categories: {listed}</div>" if listed else "")
        + "<div>next: <code>.split('train')</code>, <code>.to_dataframe()</code>, <code>.texts</code></div>"
    )
