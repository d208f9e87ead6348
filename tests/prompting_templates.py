"""Chat templates of the shapes found in the wild, and tokenizers that report offsets in the ways found in the wild."""

from __future__ import annotations

from tiny_models import BOS, CHATML, END, NO_SYSTEM, PAD, QWEN3_THINKING, build_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful user assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that writes a system message of its own when none is given."""

SYSTEM_IN_USER = (
    "{{ bos_token }}{% set pending = namespace(text='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set pending.text = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + pending.text + message['content'] + ' [/INST]' }}{% set pending.text = '' %}"
    "{% else %}{{ ' ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
)
"""Writes BOS and puts the system message into the user turn; the user turn is followed by a space."""

DATED = (
    "{{ bos_token }}{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ '<|im_end|>' }}"
    "{% for message in rest %}{{ '<|im_start|>' + message['role'] + '\n\n' }}"
    "{{ message['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
"""Writes BOS and today's date, and trims every message."""

THINK_OPENED = CHATML.replace("assistant\n' }}{%- endif", "assistant\n<think>\n' }}{%- endif")
"""Always opens the reasoning."""

TEMPLATES = {
    "chatml": CHATML,
    "qwen3": QWEN3_THINKING,
    "no-system": NO_SYSTEM,
    "default-system": DEFAULT_SYSTEM,
    "system-in-user": SYSTEM_IN_USER,
    "dated": DATED,
    "think-opened": THINK_OPENED,
}


def byte_tokenizer(
    *merges: tuple[str, str], template: str = CHATML, trim_offsets: bool = False
) -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes and chosen merges that may join anything, words and punctuation alike."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.add_special_tokens([AddedToken(t, special=True) for t in (PAD, BOS, "<|im_start|>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=END, pad_token=PAD, chat_template=template
    )


def metaspace_tokenizer(template: str = SYSTEM_IN_USER) -> PreTrainedTokenizerFast:
    """Build a tokenizer in the manner of SentencePiece: a normalizer turns spaces into ▁ and puts one in front."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", BOS, END, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(
        ["How do I bake bread at home? Remember, you should be a responsible ChatGPT!"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=END, unk_token="<unk>", chat_template=template
    )


__all__ = ["CHATML", "NO_SYSTEM", "QWEN3_THINKING", "TEMPLATES", "build_tokenizer", "byte_tokenizer"]
