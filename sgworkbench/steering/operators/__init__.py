"""Steering operators, one per file, and the registry by name."""

from sgworkbench.steering.operators.ablate import Ablate
from sgworkbench.steering.operators.ace import AffineConceptEdit
from sgworkbench.steering.operators.add import Add
from sgworkbench.steering.operators.add_preserving_norm import AddPreservingNorm
from sgworkbench.steering.operators.base import Coefficient, Ingredients, Operator
from sgworkbench.steering.operators.clamp import Clamp
from sgworkbench.steering.operators.null_space import NullSpace, NullSpaceFit, fit_null_space, moments_of
from sgworkbench.steering.operators.registry import OPERATORS, get_operator, register_operator
from sgworkbench.steering.operators.rotate import Rotate

__all__ = [
    "OPERATORS",
    "Ablate",
    "Add",
    "AddPreservingNorm",
    "AffineConceptEdit",
    "Clamp",
    "Coefficient",
    "Ingredients",
    "NullSpace",
    "NullSpaceFit",
    "Operator",
    "Rotate",
    "fit_null_space",
    "get_operator",
    "moments_of",
    "register_operator",
]
