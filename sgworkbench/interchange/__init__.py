"""Interchange: steering vectors to and from the files of other programs, with what each file means stated."""

from sgworkbench.interchange.additions import additions, prepared, recipe_vector
from sgworkbench.interchange.baked import BakedCheckpoint, bake
from sgworkbench.interchange.comparison import VectorComparison, compare_vectors
from sgworkbench.interchange.facts import VectorFacts
from sgworkbench.interchange.model_shape import ModelShape, model_shape
from sgworkbench.interchange.registry import FORMATS, VectorFormat, read_vector, sniff_format, write_vector
from sgworkbench.interchange.svec import SvecDocument

__all__ = [
    "FORMATS",
    "BakedCheckpoint",
    "ModelShape",
    "SvecDocument",
    "VectorComparison",
    "VectorFacts",
    "VectorFormat",
    "additions",
    "bake",
    "compare_vectors",
    "model_shape",
    "prepared",
    "read_vector",
    "recipe_vector",
    "sniff_format",
    "write_vector",
]
