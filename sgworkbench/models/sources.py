"""Where a model comes from: the demo model, a local folder, a GGUF file, or a name on the Hugging Face hub."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

from sgworkbench.downloads import ReportProgress, print_progress
from sgworkbench.errors import WorkbenchError
from sgworkbench.models.demo import DEMO_NAME, demo_folder
from sgworkbench.models.folder import first_line, read_config
from sgworkbench.models.gguf import gguf_folder

__all__ = ["ReportProgress", "ResolvedSource", "print_progress", "resolve_source"]

# Weights as pickle are left on the hub: they are never loaded.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


@dataclass(frozen=True)
class ResolvedSource:
    """A model folder on this machine and the name to show for it."""

    folder: Path
    name: str


def resolve_source(source: str | Path, progress: ReportProgress) -> ResolvedSource:
    """Bring a model to this machine as a Hugging Face folder.

    Args:
        source: "demo", a folder, a `.gguf` file, a name or alias TransformerLens lists, or another hub id.
        progress: called with a line of text at every long step.

    Raises:
        WorkbenchError: one sentence saying what is wrong with the source or what could not be fetched.
    """
    text = str(source)
    if text == "demo":
        return ResolvedSource(demo_folder(progress), DEMO_NAME)
    path = Path(text).expanduser()
    if path.is_dir():
        return ResolvedSource(path, path.resolve().name)
    if path.suffix.lower() == ".gguf":
        return ResolvedSource(gguf_folder(path, progress), path.stem)
    if path.is_file():
        raise WorkbenchError(f"{path} is a file; expected a Hugging Face model folder or a .gguf file.")
    if _looks_like_path(text):
        raise WorkbenchError(f"No model folder or .gguf file at {text}.")
    return _from_hub(text, progress)


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text or (text.count("/") != 1 and "/" in text)


def _listed_names() -> dict[str, str]:
    """Every name and alias TransformerLens lists, in lower case, with the hub id it stands for."""
    names = {name.lower(): name for name in OFFICIAL_MODEL_NAMES}
    names |= {alias.lower(): name for name, aliases in MODEL_ALIASES.items() for alias in aliases}
    return names


def _from_hub(name: str, progress: ReportProgress) -> ResolvedSource:
    listed = _listed_names()
    repository = listed.get(name.lower())
    if repository is None and "/" not in name:
        raise _unknown(name, listed)
    repository = repository or name
    try:
        # The small file first: an unsupported family is refused before gigabytes are fetched.
        read_config(Path(hf_hub_download(repository, "config.json")).parent)
        progress(f"Fetching {repository} from the Hugging Face hub, or its cache ...")
        folder = snapshot_download(repository, allow_patterns=_HUB_FILES)
    except WorkbenchError:
        raise
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, repository, listed) from error
    except EntryNotFoundError as error:
        raise WorkbenchError(f"{repository} has no config.json on the hub; expected a transformers model.") from error
    except GatedRepoError as error:
        raise WorkbenchError(
            f"{repository} is gated: accept its licence on the hub and log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _unknown(name, listed) from error
    except OSError as error:
        raise _unreachable(name, repository, listed) from error
    except Exception as error:
        raise WorkbenchError(f"{repository} could not be fetched: {first_line(error)}.") from error
    return ResolvedSource(Path(folder), repository)


def _suggestion(name: str, listed: dict[str, str]) -> str:
    near = difflib.get_close_matches(name.lower(), list(listed), n=1, cutoff=0.5)
    return f" Did you mean {listed[near[0]]!r}?" if near else ""


def _unreachable(name: str, repository: str, listed: dict[str, str]) -> WorkbenchError:
    suggestion = "" if name.lower() in listed else _suggestion(name, listed)
    return WorkbenchError(
        f"{repository} is neither a folder here nor in the hub's local cache, and the hub cannot be reached; "
        f"give a local folder or .gguf file, or try again with a network connection.{suggestion}"
    )


def _unknown(name: str, listed: dict[str, str]) -> WorkbenchError:
    return WorkbenchError(
        f"Unknown model {name!r}.{_suggestion(name, listed)} "
        "Expected 'demo', a local folder, a .gguf file, or a model name on the Hugging Face hub."
    )
