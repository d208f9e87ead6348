"""What a loaded model is, in hashes and numbers that another machine can compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ModelIdentity:
    """Everything needed to recognise a model and its settings; holds no path of this machine but `source`.

    Attributes:
        source: what the user passed to `load_model`.
        name: the hub name, folder name or file name without suffix.
        architecture: the `model_type` of config.json.
        context_length: tokens the model was loaded for.
        processing: always "none": no folding, no centring, so residuals equal Hugging Face's hidden states.
        weights_sha256: of the safetensors files: with one file its own digest, with several the digest of the
            lines "digest  name" in name order.
        config_sha256, tokenizer_sha256: of config.json and of the tokenizer's serialised form.
        chat_template_sha256: None for a tokenizer without a chat template.
    """

    source: str
    name: str
    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int
    context_length: int
    dtype: str
    device: str
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str | None
    processing: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that `json.dumps` takes."""
        return asdict(self)


@dataclass(frozen=True)
class ParityReport:
    """How far a HookedTransformer is from transformers on the same tokens.

    Attributes:
        max_logit_difference: largest absolute difference of any logit at any position.
        hidden_differences: one value for the input of the first block and the output of every block: the largest,
            over positions, of |difference| / |transformers' residual| (L2 norms over d_model).
        logit_tolerance: what `max_logit_difference` may be for this dtype.
        hidden_tolerance: what each of `hidden_differences` may be for this dtype.
        dtype: of the weights; the tolerances follow from it.
    """

    max_logit_difference: float
    hidden_differences: tuple[float, ...]
    logit_tolerance: float
    hidden_tolerance: float
    dtype: str

    @property
    def max_hidden_difference(self) -> float:
        """The largest of `hidden_differences`; NaN when any of them is."""
        worst = max(self.hidden_differences)
        return worst if all(value == value for value in self.hidden_differences) else float("nan")

    @property
    def passed(self) -> bool:
        """Whether logits and every layer agree within the tolerances; NaN never passes."""
        return self.max_logit_difference <= self.logit_tolerance and self.max_hidden_difference <= self.hidden_tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict as a dictionary that `json.dumps` takes."""
        return asdict(self) | {"passed": self.passed}


@dataclass(frozen=True)
class LoadedModel:
    """An unprocessed HookedTransformer with its tokenizer; unpacks as `model, tokenizer = load_model(...)`.

    Attributes:
        model: the HookedTransformer, in eval mode, gradients off.
        tokenizer: a fast tokenizer, the very object `model.tokenizer` is.
        identity: hashes and settings, for vectors and manifests.
        folder: where config, weights and tokenizer were read from on this machine; not part of the identity.
        parity: the result of the self-check against transformers, or None when it was turned off.
    """

    model: HookedTransformer = field(repr=False)
    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    identity: ModelIdentity
    folder: Path = field(repr=False)
    parity: ParityReport | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_sha256(paths: list[Path]) -> str:
    """Return one digest for several files; for a single file it is that file's own SHA-256."""
    if len(paths) == 1:
        return file_sha256(paths[0])
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(paths, key=lambda path: path.name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of a fast tokenizer's vocabulary, merges, added tokens and pre- and post-processing."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def chat_template_sha256(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the SHA-256 of a tokenizer's chat template source, or None when it has none."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
