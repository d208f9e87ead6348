"""Applying interventions to a model through its hook points, and always taking them off again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel
from sgworkbench.prompting.token_batch import current_batch
from sgworkbench.steering.operators import Operator
from sgworkbench.steering.selector import Selector


@dataclass(frozen=True)
class Intervention:
    """An operator and the tokens it acts on."""

    operator: Operator
    selector: Selector = field(default_factory=Selector)


@contextmanager
def steering(loaded: LoadedModel, interventions: Intervention | Sequence[Intervention]) -> Iterator[None]:
    """Steer the model inside the block.

    Interventions at one site act in the order given, each on the result of the one before. Hooks that are already on
    the model stay, and only the hooks added here are removed, also when the block raises.

    Raises:
        WorkbenchError: a site outside the model, or tensors of another width.
    """
    chosen = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for intervention in chosen:
        if intervention.operator.d_model != loaded.identity.d_model:
            raise WorkbenchError(
                f"The steering tensors have width {intervention.operator.d_model}, but the model's residual stream has "
                f"width {loaded.identity.d_model}; they belong to another model."
            )
        for site in intervention.operator.sites:
            site.check(loaded.identity.n_layers)
    added: list[tuple[Any, Any]] = []
    try:
        for intervention in chosen:
            for site in intervention.operator.sites:
                point = loaded.model.mod_dict[site.hook_name]
                point.add_hook(_hook(intervention, site))
                added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            # A user may have called reset_hooks inside the block; then the handle is gone already.
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)


def _hook(intervention: Intervention, site: Site) -> Any:
    operator, selector = intervention.operator, intervention.selector

    def steer(stream: Tensor, hook: Any) -> Tensor:
        mask = selector.mask(current_batch())
        if mask is None:
            return stream + operator.change(stream, site)
        # where, not multiplication by the mask: tokens that are left out keep their bits.
        return torch.where(mask[..., None], stream + operator.change(stream, site), stream)

    return steer
