"""Plain texts to compute perplexity on: a file of the user's, or short passages written for this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.evaluation.costs.item_files import field_of, read_rows, text_of
from sgworkbench.evaluation.text_stream import decoded_lines

BUILTIN_TEXTS = "builtin:passages"
_TEXT_FIELDS = ("text", "content", "document", "passage", "page")


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        id: unique within its set.
        text: the text, not empty.
    """

    id: str
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise WorkbenchError(f"The text {self.id!r} is empty; perplexity needs something to read.")


def load_texts(source: str | Path, *, fields: Mapping[str, str] | None = None) -> list[Text]:
    """Read texts.

    Args:
        source: `builtin:passages`; a .txt or .md file, which is one text; or one text a row in a .jsonl, .json, .csv,
            .tsv or .parquet file.
        fields: maps `text` (and `id`) to the file's names.

    Raises:
        WorkbenchError: missing file, unknown ending, no text field, an empty text, or an id that occurs twice.
    """
    mapping = dict(fields or {})
    for ours in mapping:
        if ours not in ("text", "id"):
            raise unknown_name("text field", ours, ("text", "id"))
    if str(source).startswith("builtin:"):
        if str(source) != BUILTIN_TEXTS:
            raise unknown_name("built-in texts", str(source), [BUILTIN_TEXTS])
        whole = resources.files("sgworkbench.evaluation.costs").joinpath("data/passages.txt").read_text("utf-8")
        return [Text(str(number), part) for number, part in enumerate(whole.strip().split("\n\n"), start=1)]
    file = Path(source).expanduser()
    if file.suffix.lower() in (".txt", ".md"):
        if not file.is_file():
            raise WorkbenchError(f"The text file {str(source)!r} does not exist.")
        return [Text(file.name, "".join(decoded_lines(file)))]
    texts = []
    for number, row in enumerate(read_rows(file), start=1):
        name = str(field_of(row, "id", ("id",), mapping)) if "id" in mapping or "id" in row[1] else str(number)
        texts.append(Text(name, text_of(field_of(row, "text", _TEXT_FIELDS, mapping), "text", row[0])))
    if len({text.id for text in texts}) < len(texts):
        raise WorkbenchError(f"An id occurs twice in {str(source)!r}; ids of texts must differ.")
    return texts
