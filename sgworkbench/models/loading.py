"""`load_model`: any supported source in, an unprocessed and checked HookedTransformer with its tokenizer out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sgworkbench.downloads import ReportProgress, print_progress
from sgworkbench.models.architectures import maximum_context, text_config
from sgworkbench.models.conversion import hooked_from_transformers
from sgworkbench.models.folder import read_config, read_tokenizer, weight_files
from sgworkbench.models.identity import (
    LoadedModel,
    ModelIdentity,
    chat_template_sha256,
    file_sha256,
    files_sha256,
    tokenizer_sha256,
)
from sgworkbench.models.reference import read_reference
from sgworkbench.models.self_check import check_ids, compare_models, require_parity
from sgworkbench.models.settings import resolve_context, resolve_device, resolve_dtype
from sgworkbench.models.sources import resolve_source


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    context_length: int | None = None,
    self_check: bool = True,
    progress: ReportProgress = print_progress,
) -> LoadedModel:
    """Load a model as an unprocessed HookedTransformer, so that its residuals equal Hugging Face's hidden states.

    Args:
        source: "demo"; a name or alias TransformerLens lists, or another hub id; a Hugging Face folder of any
            name, whose config.json decides the family; or a `.gguf` file.
        dtype: "float32", "float16", "bfloat16" or "float64".
        device: a torch device name; by default CUDA when there is one, else the CPU.
        context_length: tokens; by default the model's own maximum, but at most 4096, because attention memory
            grows with its square. A larger value than the model's maximum is an error.
        self_check: compare logits and every layer with transformers on a short prompt before returning.
        progress: called with a line of text before a download or conversion; standard error by default.

    Returns:
        A LoadedModel, which unpacks as `model, tokenizer`. The tokenizer pads on the right, and
        `model.cfg.default_prepend_bos` is False, so that a rendered chat template keeps its single BOS.

    Raises:
        WorkbenchError: for anything wrong with the source, the settings or the numbers, in one sentence.
    """
    torch_dtype, device = resolve_dtype(dtype), resolve_device(device)
    resolved = resolve_source(source, progress)
    folder = resolved.folder
    config = read_config(folder)
    n_ctx = resolve_context(context_length, maximum_context(config))
    files = weight_files(folder)
    tokenizer = read_tokenizer(folder)
    with ThreadPoolExecutor(max_workers=1) as executor:
        # Hashing releases the interpreter lock and runs beside the loading.
        weights_sha256 = executor.submit(files_sha256, files)
        reference = read_reference(folder, config, dtype=torch_dtype, device=device)
        model = hooked_from_transformers(reference, context_length=n_ctx, name=resolved.name)
        parity = None
        if self_check:
            ids = check_ids(tokenizer, n_ctx)
            parity = require_parity(compare_models(model, reference, ids, dtype=dtype), resolved.name)
        text = text_config(config)
        identity = ModelIdentity(
            source=str(source),
            name=resolved.name,
            architecture=config.model_type,
            n_layers=model.cfg.n_layers,
            d_model=model.cfg.d_model,
            n_heads=model.cfg.n_heads,
            d_vocab=text.vocab_size,
            context_length=n_ctx,
            dtype=dtype,
            device=device,
            weights_sha256=weights_sha256.result(),
            config_sha256=file_sha256(folder / "config.json"),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            chat_template_sha256=chat_template_sha256(tokenizer),
        )
    # Attached directly: HookedTransformer.set_tokenizer would reload it with other settings and add special tokens.
    model.tokenizer = tokenizer
    model.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
    return LoadedModel(model=model, tokenizer=tokenizer, identity=identity, folder=folder, parity=parity)


def load_tokenizer(source: str | Path, *, progress: ReportProgress = print_progress) -> PreTrainedTokenizerFast:
    """Load only the tokenizer of a source that `load_model` takes.

    Raises:
        WorkbenchError: as `load_model`, for the source and the tokenizer.
    """
    return read_tokenizer(resolve_source(source, progress).folder)
