"""Applying interventions to a model through its hook points, and always taking them off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError, require_type
from sgworkbench.models import LoadedModel
from sgworkbench.prompting.token_batch import TokenBatch, current_batch
from sgworkbench.steering.gate import Gate, GateState
from sgworkbench.steering.operators import Operator
from sgworkbench.steering.placement import placed
from sgworkbench.steering.selector import Selector


@dataclass(frozen=True)
class Intervention:
    """An operator, the tokens it acts on, and the condition under which it acts.

    Attributes:
        operator: the change of the residual stream.
        selector: the tokens it may act on.
        gate: the condition under which it acts on them; None acts always.
    """

    operator: Operator
    selector: Selector = field(default_factory=Selector)
    gate: Gate | None = None

    def __post_init__(self) -> None:
        require_type(self.operator, Operator, "a steering operator", "write for example Add({Site(3): vector}, 1.0)")
        require_type(self.selector, Selector, "a Selector", "write for example Selector(phases=('prefill',))")
        if self.gate is None:
            return
        require_type(self.gate, Gate, "a Gate", "write Gate(Condition(directions, site), threshold)")
        read, write = self.gate.condition.site, self.operator.sites[0]
        if write < read:
            raise WorkbenchError(
                f"The gate reads {read}, but the operator already acts at {write}, earlier in the forward pass; read "
                "the condition at or before the first site that is steered."
            )

    def check(self, loaded: LoadedModel) -> None:
        """Compare with a model.

        Raises:
            WorkbenchError: a site outside the model, or tensors of another width.
        """
        widths = [("steering tensors have", self.operator.d_model)]
        sites = list(self.operator.sites)
        if self.gate is not None:
            widths.append(("condition direction has", self.gate.condition.directions.unit.shape[-1]))
            sites.append(self.gate.condition.site)
        for what, width in widths:
            if width != loaded.identity.d_model:
                raise WorkbenchError(
                    f"The {what} width {width}, but the model's residual stream has width {loaded.identity.d_model}; "
                    "they belong to another model."
                )
        for site in sites:
            site.check(loaded.identity.n_layers)


@contextmanager
def steering(loaded: LoadedModel, interventions: Intervention | Sequence[Intervention]) -> Iterator[None]:
    """Steer the model inside the block.

    Interventions at one site act in the order given, each on the result of the one before; a gate reads what the
    interventions before its own have left. Hooks that are already on the model stay, and only the hooks added here are
    removed, also when the block raises.

    Raises:
        WorkbenchError: a site outside the model, tensors of another width, or coefficients for another number of
            prompts than were run inside the block.
    """
    chosen = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for intervention in chosen:
        require_type(intervention, Intervention, "interventions", "wrap an operator as Intervention(operator)")
        intervention.check(loaded)
    active = [_Active(placed(intervention, loaded.identity.device)) for intervention in chosen]
    added: list[tuple[Any, Any]] = []
    try:
        for each in active:
            for site, function in each.hooks():
                point = loaded.model.mod_dict[site.hook_name]
                point.add_hook(function)
                added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            # A user may have called reset_hooks inside the block; then the handle is gone already.
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)
    for each in active:
        each.check_all_used()


class _Active:
    """One intervention while it is attached: its hooks, and what they remember between forward passes."""

    def __init__(self, intervention: Intervention) -> None:
        self.intervention = intervention
        self.gate = None if intervention.gate is None else GateState(intervention.gate)
        self.n_prompts = intervention.operator.n_prompts
        self._highest = -1
        self._checked: Tensor | None = None

    def hooks(self) -> Iterator[tuple[Site, Callable[..., Any]]]:
        """Yield sites and functions in the order in which they are to be attached."""
        if self.gate is not None:
            yield self.gate.gate.condition.site, self._reader(self.gate)
        for site in self.intervention.operator.sites:
            yield site, self._writer(site)

    def _reader(self, state: GateState) -> Callable[..., Any]:
        def read(stream: Tensor, hook: Any) -> None:
            state.read(stream, current_batch())

        read.shares_prefix = state.gate.treats_rows_alike  # type: ignore[attr-defined]
        return read

    def _writer(self, site: Site) -> Callable[..., Any]:
        operator, selector = self.intervention.operator, self.intervention.selector

        def steer(stream: Tensor, hook: Any) -> Tensor:
            batch = current_batch()
            self._check_rows(batch)
            mask = selector.mask(batch)
            if self.gate is not None:
                mask = self.gate.now if mask is None else mask & self.gate.now
            changed = stream + operator.change(stream, site)
            # where, not multiplication by the mask: tokens that are left out keep their bits.
            return changed if mask is None else torch.where(mask[..., None], changed, stream)

        # Tells the engine that tokens all rows begin with may be run once, with one row, for all of them.
        steer.shares_prefix = self.n_prompts is None and (  # type: ignore[attr-defined]
            self.gate is None or self.gate.gate.treats_rows_alike
        )
        return steer

    def _check_rows(self, batch: TokenBatch | None) -> None:
        if self.n_prompts is None or batch is None or batch.rows is self._checked:
            return
        self._highest = max(self._highest, int(batch.rows.max()))
        if self._highest >= self.n_prompts:
            raise WorkbenchError(
                f"The coefficients of {self.intervention.operator.name!r} are for {self.n_prompts} prompts, but the "
                f"call has more (at least {self._highest + 1}); give one coefficient per prompt."
            )
        self._checked = batch.rows

    def check_all_used(self) -> None:
        """Refuse coefficients for more prompts than were run; none may have been run at all."""
        if self.n_prompts is not None and 0 <= self._highest < self.n_prompts - 1:
            raise WorkbenchError(
                f"The coefficients of {self.intervention.operator.name!r} are for {self.n_prompts} prompts, but the "
                f"call had {self._highest + 1}; give one coefficient per prompt."
            )
