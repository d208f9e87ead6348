"""A Hugging Face model folder: what must be in it, checked before anything large is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from sgworkbench.errors import WorkbenchError
from sgworkbench.models.architectures import architecture_for, text_config

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def read_config(folder: Path) -> Any:
    """Read and check config.json; the transformers configuration comes back.

    Raises:
        WorkbenchError: when it is missing, broken, asks for quantized weights, or is of a family or has a setting
            that TransformerLens cannot represent.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WorkbenchError(f"No config.json in {folder}; expected a Hugging Face model folder.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WorkbenchError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise WorkbenchError(f"{path} names no model_type; expected the configuration of a Hugging Face model.")
    architecture_for(model_type)
    if raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method", "unknown")
        raise WorkbenchError(
            f"{folder} holds weights quantized with {method!r}; use the unquantized model or a .gguf file instead."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise WorkbenchError(f"{path} is not a configuration transformers accepts: {first_line(error)}.") from error
    # Every setting is checked now, before gigabytes of weights are fetched or read.
    architecture_for(model_type).fields(text_config(config))
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder after checking that each one is complete.

    Raises:
        WorkbenchError: when there are none, a shard is missing, a file is cut short, or only pickle weights exist.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WorkbenchError(f"{index} is not a valid index of weight files; fetch it again.") from error
        files = [folder / name for name in names]
        if any(Path(name).name != name for name in names):
            raise WorkbenchError(f"{index} names a weight file outside its folder; fetch the model again.")
    elif single.is_file():
        files = [single]
    else:
        raise WorkbenchError(_no_weights(folder))
    for path in files:
        if not path.is_file():
            raise WorkbenchError(f"The weight file {path.name} is missing in {folder}; the copy is incomplete.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise WorkbenchError(
                f"{path} is cut short or not a safetensors file ({first_line(error)}); fetch it again."
            ) from error
    return files


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when loaded and is refused; "
            "convert them to safetensors first."
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"{folder} holds no model.safetensors; pass the GGUF file itself: {folder / ggufs[0]}."
    return f"No weights in {folder}: expected model.safetensors or {_INDEX}."


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a model folder, right-padding, with its special tokens as they are.

    Raises:
        WorkbenchError: when there is none, or it has no fast implementation (character offsets need one).
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise WorkbenchError(f"No tokenizer in {folder}: expected one of {', '.join(_TOKENIZER_FILES)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="right")
    except Exception as error:
        raise WorkbenchError(f"The tokenizer in {folder} cannot be read: {first_line(error)}.") from error
    return require_fast(tokenizer, folder)


def require_fast(tokenizer: Any, where: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer if it can report character offsets; otherwise raise WorkbenchError."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise WorkbenchError(
            f"The tokenizer of {where} is {type(tokenizer).__name__}, which has no character offsets; "
            "a fast tokenizer (tokenizer.json) is needed."
        )
    return tokenizer


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
