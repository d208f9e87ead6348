"""Reading the residual stream: chosen sites, chosen tokens, and as little memory as the question allows.

Prompts are padded on the right, where no real token of a causal model can see the pads, so every value equals that of
a run of the prompt alone. Hooks gather the wanted tokens at once; the full activations of a batch never outlive the
block that made them, blocks after the last wanted site are not run, and nothing is unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgworkbench.analysis.shared_prefix import SharedPrefix, longest_prefix, run_shared_prefix
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError, require_type, unknown_name
from sgworkbench.models import LoadedModel
from sgworkbench.models.engine import run_blocks
from sgworkbench.models.memory import automatic_batch_tokens
from sgworkbench.progress import Reporter, silent
from sgworkbench.prompting.rendering import ROLES, RenderedPrompt
from sgworkbench.prompting.token_batch import (
    TokenBatch,
    announced_batch,
    check_lengths,
    pad_prompts,
    run_batches,
)

Positions = str | Sequence[Sequence[int]]
"""A selector name, or explicit token indices for every prompt."""

_SINGLE: dict[str, Callable[[RenderedPrompt], int]] = {
    "last_prompt": lambda rendered: rendered.last_prompt_position,
    "last_header": lambda rendered: rendered.last_header_position,
    "last_instruction": lambda rendered: rendered.last_instruction_position,
}
SELECTORS = (*_SINGLE, "all", *ROLES)


def resolve_positions(rendered: Sequence[RenderedPrompt], positions: Positions) -> list[tuple[int, ...]]:
    """Return the token indices a selector means in each prompt.

    Args:
        rendered: the prompts.
        positions: `last_prompt`, `last_header` (before a prefill), `last_instruction`, `all`, a role name such as
            `instruction` for every token of that role, or explicit indices per prompt.

    Raises:
        WorkbenchError: unknown selector, wrong number of index lists, or an index outside its prompt.
    """
    if isinstance(positions, str):
        if positions in _SINGLE:
            return [(_SINGLE[positions](item),) for item in rendered]
        if positions == "all":
            return [tuple(range(len(item))) for item in rendered]
        if positions in ROLES:
            return [item.positions_of(positions) for item in rendered]
        raise unknown_name("position selector", positions, SELECTORS)
    require_type(positions, Collection, "a selector name or token indices for every prompt", "see resolve_positions")
    if len(positions) != len(rendered):
        raise WorkbenchError(f"Expected token indices for {len(rendered)} prompts, found {len(positions)}.")
    for item, indices in zip(rendered, positions, strict=True):
        require_type(
            indices, Collection, f"a list of token indices for prompt {item.prompt.id!r}", "write [3] for token 3"
        )
        for index in indices:
            if not 0 <= index < len(item):
                raise WorkbenchError(
                    f"Token index {index} is outside prompt {item.prompt.id!r}, which has {len(item)} tokens."
                )
    return [tuple(int(index) for index in indices) for indices in positions]


def _plan(
    rendered: Sequence[RenderedPrompt], sites: Sequence[Site], positions: Positions
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Check a request; return the wanted tokens of every prompt, and the row at which each prompt's tokens start.

    Raises:
        WorkbenchError: things that are not rendered prompts or sites, a site given twice, no token selected at all, or
            as `resolve_positions`.
    """
    require_type(rendered, (list, tuple), "a list of rendered prompts", "put a single one into a list")
    for item in rendered:
        require_type(item, RenderedPrompt, "rendered prompts", "render texts with Renderer.render(...) first")
    require_type(sites, (list, tuple), "a list of sites", "put a single one into a list")
    for site in sites:
        require_type(site, Site, "sites", "write Site(3) for the output of block 3")
    twice = [site for index, site in enumerate(sites) if site in sites[:index]]
    if twice:
        raise WorkbenchError(f"Site {twice[0]} was given twice; every site is read once.")
    wanted = resolve_positions(rendered, positions)
    starts = [0]
    for indices in wanted:
        starts.append(starts[-1] + len(indices))
    if rendered and not starts[-1]:
        raise WorkbenchError(f"No token of any prompt is selected by {positions!r}; nothing would be read.")
    return wanted, starts


@dataclass(frozen=True)
class Activations:
    """Residual-stream vectors of chosen tokens at chosen sites, in the order of the prompts.

    Attributes:
        sites: the sites, in the order of the second axis.
        values: float32 on the CPU.
        prompt_index: which prompt each row belongs to.
        position: which token of that prompt.
        n_prompts: how many prompts were read, those without a chosen token included.
    """

    sites: tuple[Site, ...]
    values: Float[Tensor, "token site d_model"]
    prompt_index: Int[Tensor, "token"]
    position: Int[Tensor, "token"]
    n_prompts: int

    def per_prompt(self) -> Float[Tensor, "prompt site d_model"]:
        """Return the values when exactly one token was read per prompt.

        Raises:
            WorkbenchError: some prompt has none or several tokens.
        """
        if not torch.equal(self.prompt_index, torch.arange(self.n_prompts)):
            raise WorkbenchError("Expected exactly one token per prompt; use of_prompt(i) for spans.")
        return self.values

    def of_prompt(self, index: int) -> Float[Tensor, "token site d_model"]:
        """Return the values of one prompt's tokens, none when none was chosen.

        Raises:
            WorkbenchError: no such prompt.
        """
        if not 0 <= index < self.n_prompts:
            raise WorkbenchError(f"There is no prompt {index}; {self.n_prompts} were read, counted from 0.")
        return self.values[self.prompt_index == index]


@dataclass(frozen=True)
class Moments:
    """Running statistics over tokens, in float64.

    Attributes:
        sites: the sites, in the order of the first axis.
        count: number of tokens seen.
        mean: mean vector per site.
        covariance: unbiased covariance per site, or None when it was not asked for.
    """

    sites: tuple[Site, ...]
    count: int
    mean: Float[Tensor, "site d_model"]
    covariance: Float[Tensor, "site d_model d_model"] | None


def capture(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    sites: Sequence[Site],
    positions: Positions = "last_prompt",
    *,
    max_batch_tokens: int | None = None,
    report: Reporter = silent,
    task: str = "reading activations",
) -> Activations:
    """Read and keep the residual stream at chosen tokens of every prompt.

    Steering that is active on the model is included: reading happens after it.

    Args:
        loaded: the model.
        rendered: the prompts.
        sites: where to read.
        positions: which tokens to read (see `resolve_positions`).
        max_batch_tokens: padded tokens per forward pass; by default what suits the device. Fewer take less memory.
        report: progress callback.
        task: name of the work in the progress display.

    Raises:
        WorkbenchError: no prompts or sites, a site outside the model, a prompt longer than the context.
    """
    wanted, starts = _plan(rendered, sites, positions)
    values = torch.empty(starts[-1], len(sites), loaded.identity.d_model, dtype=torch.float32)

    def keep(site_index: int, gathered: Float[Tensor, "token d_model"], target: Int[Tensor, "token"]) -> None:
        values[target, site_index] = gathered.float().cpu()

    _visit(loaded, rendered, sites, wanted, keep, starts, max_batch_tokens, report, task)
    prompt_index = torch.tensor([row for row, indices in enumerate(wanted) for _ in indices], dtype=torch.long)
    position = torch.tensor([index for indices in wanted for index in indices], dtype=torch.long)
    return Activations(tuple(sites), values, prompt_index, position, len(rendered))


def capture_span_means(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    sites: Sequence[Site],
    positions: Positions = "instruction",
    *,
    max_batch_tokens: int | None = None,
    report: Reporter = silent,
) -> Float[Tensor, "prompt site d_model"]:
    """Read the mean over the chosen tokens of each prompt, without keeping the tokens; float32 on the CPU.

    Raises:
        WorkbenchError: as `capture`, or a prompt without a chosen token.
    """
    wanted, starts = _plan(rendered, sites, positions)
    for item, indices in zip(rendered, wanted, strict=True):
        if not indices:
            raise WorkbenchError(f"Prompt {item.prompt.id!r} has no token selected by {positions!r}.")
    owner = torch.tensor([row for row, indices in enumerate(wanted) for _ in indices], dtype=torch.long)
    weight = torch.tensor([1 / len(indices) for indices in wanted for _ in indices], dtype=torch.float64)
    means = torch.zeros(len(rendered), len(sites), loaded.identity.d_model, dtype=torch.float64)

    def add(site_index: int, gathered: Float[Tensor, "token d_model"], target: Int[Tensor, "token"]) -> None:
        means[:, site_index].index_add_(0, owner[target], gathered.double().cpu() * weight[target, None])

    _visit(loaded, rendered, sites, wanted, add, starts, max_batch_tokens, report, "reading activations")
    return means.float()


def capture_moments(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    sites: Sequence[Site],
    positions: Positions = "last_prompt",
    *,
    covariance: bool = False,
    max_batch_tokens: int | None = None,
    report: Reporter = silent,
    task: str = "reading activations",
) -> Moments:
    """Read running mean and, if asked for, covariance; memory does not grow with the number of prompts.

    Batches are merged with the pairwise update of Chan, Golub and LeVeque (1979), in float64.

    Raises:
        WorkbenchError: as `capture`; a covariance of fewer than two tokens.
    """
    wanted, starts = _plan(rendered, sites, positions)
    count = starts[-1]
    if covariance and count < 2:
        raise WorkbenchError(f"A covariance needs at least two tokens, found {count}.")
    d_model = loaded.identity.d_model
    counts = [0] * len(sites)
    mean = torch.zeros(len(sites), d_model, dtype=torch.float64)
    scatter = torch.zeros(len(sites), d_model, d_model, dtype=torch.float64) if covariance else None

    def merge(site_index: int, gathered: Float[Tensor, "token d_model"], target: Int[Tensor, "token"]) -> None:
        batch = gathered.double().cpu()
        n_old, n_new = counts[site_index], len(batch)
        if n_new == 0:
            return
        total = n_old + n_new
        batch_mean = batch.mean(0)
        delta = batch_mean - mean[site_index]
        if scatter is not None:
            centred = batch - batch_mean
            scatter[site_index] += centred.T @ centred + torch.outer(delta, delta) * (n_old * n_new / total)
        mean[site_index] += delta * (n_new / total)
        counts[site_index] = total

    _visit(loaded, rendered, sites, wanted, merge, starts, max_batch_tokens, report, task)
    return Moments(tuple(sites), count, mean, None if scatter is None else scatter / (count - 1))


def _visit(
    loaded: LoadedModel,
    rendered: Sequence[RenderedPrompt],
    sites: Sequence[Site],
    wanted: list[tuple[int, ...]],
    receive: Callable[[int, Tensor, Tensor], None],
    starts: list[int],
    max_batch_tokens: int | None,
    report: Reporter,
    task: str,
) -> None:
    """Run all prompts and hand the wanted tokens of each batch and site to `receive`."""
    if not sites:
        raise WorkbenchError("No sites were given; at least one is needed.")
    for site in sites:
        site.check(loaded.identity.n_layers)
    check_lengths(rendered, loaded.identity.context_length)
    stop_at_layer = max(site.layer for site in sites) + 1
    longest = longest_prefix(rendered, wanted)
    prefix: SharedPrefix | None = None
    seen: list[set[int]] = [set() for _ in sites]

    def run(rows: list[int]) -> None:
        nonlocal prefix
        batch = pad_prompts([rendered[row] for row in rows], side="right", device=loaded.identity.device, rows=rows)
        if prefix is None or not prefix.fits(batch):
            prefix = run_shared_prefix(loaded, batch, stop_at_layer=stop_at_layer, longest=longest)
        skipped = 0 if prefix is None else prefix.length

        def gather(site_index: int) -> Callable[[Tensor], None]:
            # A batch that ran out of memory half way is run again; what a site has handed on is not handed on twice.
            new = [(local, row) for local, row in enumerate(rows) if row not in seen[site_index]]
            where = [(local, index - skipped) for local, row in new for index in wanted[row]]
            target = torch.tensor(
                [starts[row] + k for _, row in new for k in range(len(wanted[row]))], dtype=torch.long
            )
            index = torch.tensor(where, dtype=torch.long, device=batch.token_ids.device).reshape(-1, 2)

            def read(stream: Tensor) -> None:
                receive(site_index, stream[index[:, 0], index[:, 1]], target)
                seen[site_index].update(rows)

            return read

        readers = {site.hook_name: gather(site_index) for site_index, site in enumerate(sites)}
        run_prefill(loaded, batch, readers, stop_at_layer=stop_at_layer, prefix=prefix)

    done = 0
    report(task, 0, len(rendered))
    limit = max_batch_tokens or automatic_batch_tokens(loaded)
    for rows, _ in run_batches([len(item) for item in rendered], run, max_tokens=limit):
        done += len(rows)
        report(task, done, len(rendered))


@torch.inference_mode()
def run_prefill(
    loaded: LoadedModel,
    batch: TokenBatch,
    readers: dict[str, Callable[[Tensor], None]],
    *,
    stop_at_layer: int,
    prefix: SharedPrefix | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Run the blocks below `stop_at_layer` on a right-padded batch, handing hook points' values to `readers`.

    Returns the residual stream that would enter block `stop_at_layer`; readers and result begin after the prefix, when
    the first tokens of the batch have been run already.
    """
    rest = batch if prefix is None else prefix.rest(batch)
    with reading(loaded.model, readers), announced_batch(rest):
        return run_blocks(
            loaded, rest.token_ids, cache=None if prefix is None else prefix.cache, stop_at_layer=stop_at_layer
        )


@contextmanager
def reading(model: Any, readers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Attach read-only functions to hook points; they run after hooks that are already there, and are always removed.

    Only the hooks added here are removed, so that a user's own hooks and active steering stay in place.
    """
    handles = []
    try:
        for name, reader in readers.items():

            def forward_hook(_module: Any, _input: Any, output: Tensor, reader: Any = reader) -> None:
                reader(output)

            handles.append(model.mod_dict[name].register_forward_hook(forward_hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
