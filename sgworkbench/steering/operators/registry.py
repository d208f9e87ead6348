"""The operators by name, and how another one joins them."""

from __future__ import annotations

from typing import TypeVar

from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.steering.operators.base import Operator

OPERATORS: dict[str, type[Operator]] = {}
"""Every registered operator class by its `name`."""

AnOperator = TypeVar("AnOperator", bound=type[Operator])


def register_operator(operator: AnOperator) -> AnOperator:
    """Class decorator: list an operator in `OPERATORS` under its `name`.

    Raises:
        WorkbenchError: not an `Operator`, no name, or a name that is taken.
    """
    if not (isinstance(operator, type) and issubclass(operator, Operator)):
        raise WorkbenchError(f"Expected a subclass of Operator to register, found {operator!r}.")
    name = getattr(operator, "name", None)
    if not isinstance(name, str) or not name:
        raise WorkbenchError(f"The operator class {operator.__name__} needs a class attribute `name`.")
    taken = OPERATORS.get(name)
    # A notebook cell that is run again defines its class again; that replaces the old one.
    if taken is not None and (taken.__module__, taken.__qualname__) != (operator.__module__, operator.__qualname__):
        raise WorkbenchError(f"The operator name {name!r} is taken by {taken.__qualname__}; choose another name.")
    OPERATORS[name] = operator
    return operator


def get_operator(name: str) -> type[Operator]:
    """Return the operator class of a name.

    Raises:
        WorkbenchError: no operator has that name.
    """
    if name not in OPERATORS:
        raise unknown_name("operator", str(name), OPERATORS)
    return OPERATORS[name]
