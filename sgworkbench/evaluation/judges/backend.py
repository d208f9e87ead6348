"""What a model judge is asked with, whatever answers: requests, replies, and the one method of a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from sgworkbench.evaluation.judges.preset import Decoding, JudgePreset, fill

NO_REPLY = "No reply from the judge"


@dataclass(frozen=True)
class Request:
    """One question to a judge model.

    Attributes:
        messages: role and content of each chat message; None for a raw prompt.
        text: the raw prompt, or None.
        decoding: how the judge writes.
        generation_prompt: whether a chat template is asked to open the judge's turn.
    """

    messages: tuple[tuple[str, str], ...] | None
    text: str | None
    decoding: Decoding
    generation_prompt: bool = True

    def content(self) -> dict[str, Any]:
        """Return everything that decides the reply of a given model, as JSON values."""
        return {
            "messages": None if self.messages is None else [list(message) for message in self.messages],
            "text": self.text,
            "decoding": self.decoding.model_dump(mode="json"),
            "generation_prompt": self.generation_prompt,
        }

    def chat(self) -> list[dict[str, str]]:
        """Return the messages as chat libraries take them."""
        return [{"role": role, "content": content} for role, content in self.messages or ()]


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: the judge's words; None when there are none.
        error: why not, in one sentence that repeats neither the texts nor a key; None when there is a text.
        cut: the reply ended at its token limit.
        fault: with an error, whether this "request" was refused (too long, filtered) or nothing could be had from
            the "backend" at all.
    """

    text: str | None
    error: str | None = None
    cut: bool = False
    fault: Literal["request", "backend"] = "backend"


@runtime_checkable
class Backend(Protocol):
    """Whatever runs the judge model.

    Attributes:
        identity: what, with the request, decides a reply; part of every cache key. Never a key or a secret.
        chunk: how many requests are worth handing over at once.
    """

    identity: Mapping[str, Any]
    chunk: int

    def answer(self, requests: Sequence[Request], keep: Callable[[int, Reply], None]) -> list[Reply]:
        """Ask everything and return the replies in order; a reply that cannot be had is a `Reply` with an error.

        Args:
            requests: what to ask.
            keep: called with the position and the reply as soon as each is there, by one thread at a time; what it
                raises ends the work and is raised here.
        """
        ...


def build_request(preset: JudgePreset, prompt: str, response: str, answer: str) -> Request:
    """Fill a preset's templates.

    Args:
        preset: the judge.
        prompt: the request that was made to the judged model.
        response: the part of its response that the preset reads.
        answer: the response without its reasoning.
    """
    values = {"prompt": prompt, "response": response, "answer": answer}
    messages = None
    if preset.messages is not None:
        messages = tuple((message.role, fill(message.content, values)) for message in preset.messages)
    text = None if preset.text is None else fill(preset.text, values)
    return Request(messages, text, preset.decoding, preset.generation_prompt)
