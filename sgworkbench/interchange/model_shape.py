"""The few facts about a model that tell whether a vector can be its own; no weights are read for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sgworkbench.downloads import ReportProgress, print_progress
from sgworkbench.errors import WorkbenchError
from sgworkbench.models.architectures import text_config
from sgworkbench.models.folder import read_config
from sgworkbench.models.sources import resolve_source
from sgworkbench.steering.vector import SteeringVector


@dataclass(frozen=True)
class ModelShape:
    """Name, family, number of blocks and width of the residual stream of a model."""

    name: str
    model_type: str
    n_layers: int
    d_model: int

    def check(self, vector: SteeringVector, where: str) -> None:
        """Compare a vector with the model.

        Raises:
            WorkbenchError: another width, layers the model lacks, or a vector that says it is of another family.
        """
        width = vector.values.shape[-1]
        if width != self.d_model:
            raise WorkbenchError(
                f"{where} has vectors of width {width}, but the residual stream of {self.name} has width "
                f"{self.d_model}; it belongs to another model."
            )
        if max(vector.layers) >= self.n_layers:
            raise WorkbenchError(
                f"{where} has a vector for layer {max(vector.layers)}, but {self.name} has {self.n_layers} layers "
                f"(0 to {self.n_layers - 1}); it belongs to another model."
            )
        family = (vector.provenance.get("model") or {}).get("architecture")
        if family is not None and family not in (self.model_type, "unknown"):
            raise WorkbenchError(
                f"{where} was read from a model of the family {family}, but {self.name} is of the family "
                f"{self.model_type}; it belongs to another model."
            )


def model_shape(source: str | Path, progress: ReportProgress = print_progress) -> ModelShape:
    """Read the shape of a model from its configuration.

    Args:
        source: anything `load_model` takes.
        progress: called with a line of text at every long step.

    Raises:
        WorkbenchError: as `load_model`, for source and configuration.
    """
    resolved = resolve_source(source, progress)
    config = read_config(resolved.folder)
    text = text_config(config)
    return ModelShape(resolved.name, str(config.model_type), int(text.num_hidden_layers), int(text.hidden_size))
