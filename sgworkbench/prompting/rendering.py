"""From an instruction and a condition to token ids in which every token has a role.

One renderer serves extraction, measurement and generation, so that all of them see the same tokens. The tokenizer's
own chat template writes the text. To know which characters of that text are system message, instruction or template,
the template is rendered a second time with placeholders, and the two renderings are required to agree everywhere else.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, Literal, get_args

from sgworkbench.errors import WorkbenchError, require_type
from sgworkbench.prompting.condition import PromptCondition
from sgworkbench.prompting.prompt_set import Prompt

Role = Literal["system", "user_prefix", "instruction", "user_suffix", "template", "prefill", "reasoning", "answer"]
ROLES: tuple[Role, ...] = get_args(Role)

# For tokenizers without a chat template: the messages, separated by an empty line.
PLAIN_TEXT_TEMPLATE = (
    "{{ bos_token if add_bos else '' }}"
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
# Templates that print today's date would give other tokens tomorrow; they get this date, in the format they ask for.
PINNED_DATE = date(2024, 7, 26)
# Defined in the template's own language, because transformers turns functions given to a template into text. The line
# break at the end is the one that Jinja drops after a block, so that the template itself starts on a fresh line.
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{letter}', '{PINNED_DATE.strftime('%' + letter)}')" for letter in "aAbBdHIjmMpSyY")
    + " }}{%- endmacro %}\n"
)
_NO_SYSTEM_ROLE = (
    "The template seems to have no system role: use condition.with_system_in_user_turn() (--system-in-user)."
)
_OTHER_TEMPLATE = "give another template with chat_template=... (--chat-template FILE)"
_SYSTEM_MARK = "SGWBSYSTEMSGWB"
_USER_MARK = "SGWBUSERSGWB"


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model sees it.

    Attributes:
        prompt: the instruction it was made from.
        condition: the safety prompt around it.
        text: the whole rendered text.
        token_ids: one id per token, no padding.
        roles: one role per token.
        offsets: half-open character range of each token in `text`; together the ranges cover the text without gaps,
            and tokens of one multi-byte character share its range.
        instruction_start: character index in `text` at which the instruction's first character stands (or would
            stand, had the template not trimmed leading white space): the origin for aligning two conditions.
        header_end: number of tokens before the prefill; the token before it ends the generation header.
    """

    prompt: Prompt
    condition: PromptCondition
    text: str
    token_ids: tuple[int, ...]
    roles: tuple[Role, ...]
    offsets: tuple[tuple[int, int], ...]
    instruction_start: int
    header_end: int

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text each token covers, which joined is `text`; of tokens that share a character, the first has it."""
        shown: list[str] = []
        covered = 0
        for start, end in self.offsets:
            shown.append(self.text[max(start, covered) : end])
            covered = max(covered, end)
        return tuple(shown)

    @property
    def last_prompt_position(self) -> int:
        """Index of the last token of the prompt, prefill included: where the safety shift is read."""
        return len(self.token_ids) - 1

    @property
    def last_header_position(self) -> int:
        """Index of the last token of the generation header, before any prefill.

        A token that merges the end of the header with the start of the prefill counts as header.
        """
        return self.header_end - 1

    def positions_of(self, *roles: Role) -> tuple[int, ...]:
        """Return the indices of all tokens with one of the roles."""
        return tuple(index for index, role in enumerate(self.roles) if role in roles)

    @property
    def last_instruction_position(self) -> int:
        """Index of the last token that belongs to the instruction."""
        return self.positions_of("instruction")[-1]

    def _repr_html_(self) -> str:
        from sgworkbench.prompting.inspection import rendered_html

        return rendered_html(self)


@dataclass(frozen=True)
class Renderer:
    """Renders prompts with one tokenizer, one chat template and one setting of the thinking switch.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        chat_template: a Jinja template; None takes the tokenizer's own, or plain text with a warning if it has none.
        thinking: the template's thinking switch; None leaves the template's default.
    """

    tokenizer: Any
    chat_template: str | None = None
    thinking: bool | None = None

    def __post_init__(self) -> None:
        require_type(
            self.chat_template, (str, type(None)), "a chat template as Jinja text", "read it from its file first"
        )
        if not getattr(self.tokenizer, "is_fast", False):
            raise WorkbenchError(
                "Rendering needs character offsets, which only a fast tokenizer has; "
                f"found {type(self.tokenizer).__name__}. Save a tokenizer.json beside the model."
            )
        if self.template_name == "plain-text":
            warnings.warn(
                "The tokenizer has no chat template: messages are joined as plain text. "
                "Give one with chat_template=... (--chat-template FILE) if the model expects one.",
                stacklevel=3,
            )
        if self.thinking is not None and self.thinking_switch is None:
            raise WorkbenchError(
                f"thinking={self.thinking} was asked for, but the chat template has no thinking switch "
                "(enable_thinking); leave thinking unset for this model."
            )

    @cached_property
    def template(self) -> str:
        """The Jinja source in use."""
        if self.chat_template is not None:
            return self.chat_template
        own = getattr(self.tokenizer, "chat_template", None)
        if isinstance(own, dict):
            own = own.get("default") or next(iter(own.values()), None)
        return own or PLAIN_TEXT_TEMPLATE

    @property
    def template_name(self) -> str:
        """Where the template came from: "given", "tokenizer" or "plain-text"."""
        if self.chat_template is not None:
            return "given"
        return "plain-text" if self.template == PLAIN_TEXT_TEMPLATE else "tokenizer"

    @property
    def template_sha256(self) -> str:
        """Hash of the template's source, for manifests."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    @cached_property
    def thinking_switch(self) -> str | None:
        """Name of the template variable that turns reasoning on and off, or None.

        A name that only occurs in the template's text is no switch: setting it must change the rendered prompt.
        """
        for name in ("enable_thinking", "thinking"):
            if name in self.template:
                try:
                    on, off = (self._template_text(None, "a", {name: value}) for value in (True, False))
                except Exception:  # a template is a program; rendering reports what is wrong with it
                    return None
                if on != off:
                    return name
        return None

    def render(self, prompt: Prompt | str, condition: PromptCondition | None = None) -> RenderedPrompt:
        """Render one instruction under one condition.

        Raises:
            WorkbenchError: the template fails, has no system role, or drops or rewrites a part of the messages; the
                text tokenizes with a doubled BOS; no token belongs to the instruction.
        """
        if isinstance(prompt, str):
            prompt = Prompt(prompt, "0")
        require_type(prompt, Prompt, "one prompt", "render the prompts of a list one by one")
        condition = PromptCondition.plain() if condition is None else condition
        require_type(condition, PromptCondition, "a PromptCondition", "presets are PromptCondition.preset(name)")
        if not prompt.text.strip():
            raise WorkbenchError("The prompt is empty; expected an instruction.")
        user = condition.prefix + prompt.text + condition.suffix
        header = self._apply_template(condition.system, user)
        system_span, user_span, trimmed = self._locate(condition.system, user, header)
        text = header + self._prefill(condition, header)
        origin = user_span[0] + len(condition.prefix) - trimmed
        spans = _character_roles(len(text), len(header), system_span, user_span, origin, len(prompt.text))
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = tuple(encoding["input_ids"])
        offsets = _covering(encoding["offset_mapping"])
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == (bos, bos) and self.tokenizer.eos_token_id != bos:
            raise WorkbenchError("The rendered prompt starts with two BOS tokens; the chat template adds one too many.")
        roles = _token_roles(offsets, spans)
        if "instruction" not in roles:
            raise WorkbenchError(
                f"No token of the rendered prompt belongs to the instruction {prompt.text[:40]!r}: the tokenizer "
                f"merges it with what condition {condition.name!r} puts around it; separate them by a space."
            )
        header_end = next((i for i, (start, _) in enumerate(offsets) if start >= len(header)), len(ids))
        return RenderedPrompt(prompt, condition, text, ids, roles, offsets, origin, header_end)

    def _apply_template(self, system: str | None, user: str) -> str:
        switch = self.thinking_switch
        options = {} if self.thinking is None or switch is None else {switch: self.thinking}
        try:
            return self._template_text(system, user, options)
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split()).rstrip(".")
            advice = f" {_NO_SYSTEM_ROLE}" if system is not None and self._renders_without_system(user) else ""
            raise WorkbenchError(f"The chat template failed: {reason}.{advice}") from None

    def _renders_without_system(self, user: str) -> bool:
        try:
            self._template_text(None, user, {})
        except Exception:  # as above; the first failure is the one to report
            return False
        return True

    def _template_text(self, system: str | None, user: str, options: dict[str, Any]) -> str:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": user})
        if self.template == PLAIN_TEXT_TEMPLATE:
            options = dict(options)
            options["add_bos"] = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        rendered = self.tokenizer.apply_chat_template(
            messages,
            chat_template=(_DATE_MACRO if "strftime_now" in self.template else "") + self.template,
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )
        return str(rendered)

    def _locate(
        self, system: str | None, user: str, header: str
    ) -> tuple[tuple[int, int] | None, tuple[int, int], int]:
        """Find the system message and the user turn in the rendered header.

        Returns their character spans and how many leading characters of the user turn the template trimmed.
        """
        skeleton = self._apply_template(None if system is None else _SYSTEM_MARK, _USER_MARK)
        marks = [_USER_MARK] if system is None else [_SYSTEM_MARK, _USER_MARK]
        for mark in marks:
            if skeleton.count(mark) != 1:
                times = skeleton.count(mark)
                if mark == _SYSTEM_MARK and times == 0:
                    raise WorkbenchError(f"The chat template drops the system message. {_NO_SYSTEM_ROLE}")
                what = "instruction" if mark == _USER_MARK else "system message"
                how = f"writes the {what} {times} times" if times else f"drops or rewrites the {what}"
                raise WorkbenchError(f"The chat template {how}, expected it once and unchanged; {_OTHER_TEMPLATE}.")
        if system is not None and skeleton.index(_SYSTEM_MARK) > skeleton.index(_USER_MARK):
            raise WorkbenchError(
                "The chat template puts the system message after the user turn, which is not supported."
            )
        pieces = re.split("|".join(marks), skeleton)
        for system_text in _trimmings(system):
            for user_text in _trimmings(user):
                contents = [user_text] if system is None else [system_text, user_text]
                rebuilt = pieces[0] + "".join(c + p for c, p in zip(contents, pieces[1:], strict=True))
                if rebuilt != header:
                    continue
                cursor = len(pieces[0])
                system_span = None
                if system is not None:
                    system_span = (cursor, cursor + len(system_text))
                    cursor = system_span[1] + len(pieces[1])
                trimmed = len(user) - len(user.lstrip()) if user_text != user and user[:1].isspace() else 0
                if user_text == user.rstrip():
                    trimmed = 0
                return system_span, (cursor, cursor + len(user_text)), trimmed
        raise WorkbenchError(
            f"The chat template drops or rewrites a part of the instruction or system message; {_OTHER_TEMPLATE}."
        )

    def _prefill(self, condition: PromptCondition, header: str) -> str:
        prefill = condition.prefill
        if not prefill.startswith("<think>"):
            return prefill
        if header.rstrip().endswith("</think>"):
            raise WorkbenchError(
                f"Condition {condition.name!r} prefills the reasoning, but the chat template has already closed it; "
                "use thinking=True."
            )
        # Templates of some reasoning models open the reasoning themselves; two openings would be another prompt.
        opened = header.rstrip()
        if opened.endswith("<think>"):
            inside = prefill.removeprefix("<think>")
            return inside if opened == header else inside.lstrip("\n")
        return prefill


def _trimmings(text: str | None) -> list[str]:
    if text is None:
        return [""]
    return list(dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip())))


def _covering(offsets: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Return the tokenizer's character ranges without gaps: each token also has the characters left out before it.

    Some tokenizers report a token without its leading space, and a token of spaces as empty.
    """
    covered = 0
    ranges = []
    for start, end in offsets:
        ranges.append((min(int(start), covered), max(int(end), min(int(start), covered))))
        covered = max(covered, int(end))
    return tuple(ranges)


def _character_roles(
    text_length: int,
    header_length: int,
    system: tuple[int, int] | None,
    user: tuple[int, int],
    instruction_start: int,
    instruction_length: int,
) -> list[tuple[int, int, Role]]:
    """Return consecutive character spans that cover the text, each with its role."""
    inner_start = max(instruction_start, user[0])
    inner_end = min(instruction_start + instruction_length, user[1])
    marked: list[tuple[int, int, Role]] = [] if system is None else [(*system, "system")]
    marked += [
        (user[0], inner_start, "user_prefix"),
        (inner_start, inner_end, "instruction"),
        (inner_end, user[1], "user_suffix"),
        (header_length, text_length, "prefill"),
    ]
    spans: list[tuple[int, int, Role]] = []
    cursor = 0
    for start, end, role in marked:
        if start > cursor:
            spans.append((cursor, start, "template"))
        if end > start:
            spans.append((start, end, role))
        cursor = max(cursor, end)
    return spans


def _token_roles(offsets: tuple[tuple[int, int], ...], spans: list[tuple[int, int, Role]]) -> tuple[Role, ...]:
    """Give each token the role that holds most of its characters, the instruction in a tie.

    A tie is usually a short word of the instruction with the space before it. An empty token follows its predecessor.
    """
    roles: list[Role] = []
    for start, end in offsets:
        best: Role = roles[-1] if roles else "template"
        most = 0
        for span_start, span_end, role in spans:
            overlap = min(end, span_end) - max(start, span_start)
            if overlap > most or (overlap == most > 0 and role == "instruction"):
                best, most = role, overlap
        roles.append(best)
    return tuple(roles)
