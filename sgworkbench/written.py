"""Settings that people write: checked once, in the same words, wherever they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sgworkbench.errors import WorkbenchError, unknown_name

Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """Return a pydantic model of what a person wrote.

    Args:
        kind: the model.
        values: what was written.
        what: whose settings these are, in lower case ("study").

    Raises:
        WorkbenchError: an unknown key (with the nearest one) or a value that does not fit, in one sentence.
    """
    if not isinstance(values, Mapping):
        raise WorkbenchError(f"Expected the settings of {what} as a mapping, found {type(values).__name__}.")
    for name in values:
        if name not in kind.model_fields:
            raise unknown_name(f"{what} setting", str(name), kind.model_fields)
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WorkbenchError(
            f"{what[:1].upper()}{what[1:]} setting {where}: {first['msg']}; found {first['input']!r}."
        ) from None
