"""Steering operators, one per file, and the registry by name."""

from sgworkbench.steering.operators.ablate import Ablate
from sgworkbench.steering.operators.add import Add
from sgworkbench.steering.operators.base import Operator

OPERATORS: dict[str, type[Operator]] = {operator.name: operator for operator in (Add, Ablate)}

__all__ = ["OPERATORS", "Ablate", "Add", "Operator"]
