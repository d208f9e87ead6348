"""Reasoning or answer: the role of every token a model writes, known at the moment it is written."""

from __future__ import annotations

from typing import Any

from sgworkbench.prompting.rendering import RenderedPrompt, Role

OPEN, CLOSE = "<think>", "</think>"
# No tokenizer needs more tokens than this to spell the closing tag.
_TAIL = 12


class RoleTracker:
    """Follows one answer token by token.

    Reasoning is what stands between `<think>` and `</think>`, the tags included. It may be opened by the prompt (its
    template or a prefill) or by the model's first words; everything after `</think>` is the answer, and an answer that
    never opens reasoning is answer throughout. Where the opening tag takes several tokens, a beginning that may become
    one is called reasoning at the time, and `reasoned` says afterwards whether it did.
    """

    def __init__(self, tokenizer: Any, item: RenderedPrompt) -> None:
        self._tokenizer = tokenizer
        user = item.positions_of("user_prefix", "instruction", "user_suffix")
        header = item.text[item.offsets[user[-1]][1] :]
        self._reasoning = header.rfind(OPEN) > header.rfind(CLOSE)
        self._settled = False
        self._ids: list[int] = []

    @property
    def reasoned(self) -> bool:
        """Whether reasoning has been opened so far."""
        return self._reasoning

    def role_of(self, token: int) -> Role:
        """Return the role of the next token."""
        if self._settled:
            return "answer"
        self._ids.append(token)
        if not self._reasoning:
            text = self._text(self._ids).lstrip()
            if not text.startswith(OPEN):
                self._settled = not OPEN.startswith(text)
                return "reasoning" if text and not self._settled else "answer"
            self._reasoning = True
        self._settled = CLOSE in self._text(self._ids[-_TAIL:])
        return "reasoning"

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text
