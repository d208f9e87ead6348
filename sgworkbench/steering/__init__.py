"""Steering vectors and operators, applied through hook points, and generation under them."""

from sgworkbench.steering.generation import Generation, GenerationSettings, generate
from sgworkbench.steering.hooks import Intervention, steering
from sgworkbench.steering.operators import OPERATORS, Ablate, Add, Operator
from sgworkbench.steering.selector import Selector
from sgworkbench.steering.vector import PROTOCOLS, SteeringVector

__all__ = [
    "OPERATORS",
    "PROTOCOLS",
    "Ablate",
    "Add",
    "Generation",
    "GenerationSettings",
    "Intervention",
    "Operator",
    "Selector",
    "SteeringVector",
    "generate",
    "steering",
]
