"""The audit: where exactly a vector was read and where it is written, seen from the hooks while they run.

Nothing here repeats what the protocol promises. The vector of the one prompt is extracted again while every residual
stream it could have come from is recorded, and the tokens read are those whose difference it is. Then the model
generates under steering while every hook point of the residual stream is compared before and after the steering
hooks, and the tokens written are those that changed, wherever that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sgworkbench.analysis.capture import reading
from sgworkbench.analysis.site import SITE_KINDS, Site
from sgworkbench.errors import WorkbenchError, unknown_name
from sgworkbench.models import LoadedModel
from sgworkbench.prompting import Prompt, PromptCondition, PromptSet, RenderedPrompt, Renderer
from sgworkbench.prompting.rendering import ROLES
from sgworkbench.prompting.token_batch import TokenBatch, current_batch
from sgworkbench.steering.generation import GenerationSettings, generate
from sgworkbench.steering.hooks import Intervention, steering
from sgworkbench.steering.layers import LayerChoice, choose_layers
from sgworkbench.steering.selector import Selector
from sgworkbench.steering.vector import SteeringVector

STEERED_ARMS = ("both", "steered")
"""The arms that steer: the prompted run, or the plain one."""
_TOKEN_COLUMNS = ("phase", "index", "token_id", "token", "role")
_SITE_COLUMNS = ("layer", "site", "hook_name", "hidden_states_index", "svec_key")
READ_COLUMNS = ("rendering", *_TOKEN_COLUMNS[1:], *_SITE_COLUMNS, "mismatch")
WRITE_COLUMNS = (*_TOKEN_COLUMNS, *_SITE_COLUMNS, "added_norm", "coefficient")


@dataclass(frozen=True)
class Audit:
    """What was read and written, token by token.

    Attributes:
        prompt: the instruction.
        condition: name of the safety prompt.
        arm: `both` (the prompted run is steered) or `steered` (the plain run is).
        protocol: the vector's protocol.
        layers: the layers steered.
        alpha: raw coefficient.
        model: name of the model.
        reads: one row per rendering (prompted, plain) and layer: the token whose activation entered the vector. `role`
            is `pad` for a pad; `mismatch` is the largest difference between the recorded activations and the vector.
        writes: one row per token and site that the steering hooks changed: phase, absolute index, token, role, site,
            norm of what was added, and `coefficient`, its projection on the layer's vector in units of that vector.
        n_tokens: tokens seen in prefill and decode, steered or not.
        notes: what a reader may not expect.
    """

    prompt: str
    condition: str
    arm: str
    protocol: str
    layers: tuple[int, ...]
    alpha: float
    model: str
    reads: pd.DataFrame
    writes: pd.DataFrame
    n_tokens: dict[str, int]
    notes: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Return reads and writes in one table; `action` tells them apart."""
        return pd.concat([self.reads.assign(action="read"), self.writes.assign(action="write")], ignore_index=True)

    def by_token(self) -> pd.DataFrame:
        """Return one row per written token: phase, index, token_id, token, role, its sites, the largest added norm."""
        keys = list(_TOKEN_COLUMNS)
        grouped = self.writes.groupby(keys, sort=False, as_index=False)
        return grouped.agg(sites=("site", ", ".join), added_norm=("added_norm", "max"))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, JSON-serialisable."""
        facts = {name: getattr(self, name) for name in ("prompt", "condition", "arm", "protocol", "alpha", "model")}
        tables = {name: _records(getattr(self, name)) for name in ("reads", "writes")}
        return {**facts, "layers": list(self.layers), "n_tokens": self.n_tokens, **tables, "notes": list(self.notes)}

    def _repr_html_(self) -> str:
        shown = self.reads.drop(columns="mismatch").fillna("-")
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        counts = ", ".join(f"{n} tokens in {phase}" for phase, n in self.n_tokens.items())
        return (
            f"<b>Audit</b> of protocol {escape(self.protocol)} on {escape(self.model)}, layers "
            f"{', '.join(map(str, self.layers))}, coefficient {self.alpha:g}, {escape(self.condition)}, arm {self.arm}"
            f"<ul>{notes}</ul><b>Read</b>{shown.to_html(index=False)}"
            f"<b>Written</b> ({counts} seen){self.by_token().to_html(index=False)}"
        )


def audit(
    loaded: LoadedModel,
    renderer: Renderer,
    vector: SteeringVector,
    prompt: Prompt | str,
    *,
    layers: LayerChoice,
    alpha: float = 1.0,
    condition: PromptCondition | None = None,
    arm: str = "both",
    selector: Selector | None = None,
    n_decode: int = 3,
) -> Audit:
    """Extract and steer on one prompt, and say what was read and written.

    Args:
        loaded: the model.
        renderer: turns the prompt into tokens.
        vector: gives protocol and vectors.
        prompt: the instruction.
        layers: layers to steer.
        alpha: raw coefficient.
        condition: the safety prompt; by default the one the vector was made with.
        arm: `both` steers the prompted run, `steered` the plain one.
        selector: which tokens; all of them by default.
        n_decode: decode steps to look at.

    Raises:
        WorkbenchError: a vector of another model, an unknown arm, alpha 0, no decode step, no condition given or
            recorded, a layer without a vector, or a reading that could not be traced back to tokens.
    """
    if arm not in STEERED_ARMS:
        raise unknown_name("arm", arm, STEERED_ARMS)
    if not alpha or n_decode < 1:
        raise WorkbenchError(
            f"An audit needs a coefficient other than 0 and at least one decode step, found {alpha} and {n_decode}."
        )
    notes = vector.check_model(loaded)
    chosen = condition or _recorded_condition(vector)
    indices = choose_layers(layers, loaded.identity.n_layers)
    intervention = vector.intervention(list(indices), alpha, selector)
    item = prompt if isinstance(prompt, Prompt) else PromptSet.from_texts([prompt]).prompts[0]
    reads = recorded_reads(loaded, renderer, vector, item, chosen, indices)
    run = renderer.render(item, chosen if arm == "both" else None)
    writes, n_tokens = recorded_writes(loaded, run, intervention, n_decode=n_decode)
    writes["coefficient"] = [
        float(delta @ vector.at(layer).double() / vector.at(layer).double().square().sum())
        if layer in vector.layers
        else float("nan")
        for delta, layer in zip(writes.pop("delta"), writes["layer"], strict=True)
    ]
    return Audit(
        item.text,
        chosen.name,
        arm,
        vector.protocol,
        indices,
        float(alpha),
        loaded.identity.name,
        reads[list(READ_COLUMNS)],
        writes[list(WRITE_COLUMNS)],
        n_tokens,
        (*notes, *_notes(vector, chosen, reads, writes, n_tokens, loaded.identity.n_layers)),
    )


def recorded_reads(
    loaded: LoadedModel,
    renderer: Renderer,
    vector: SteeringVector,
    prompt: Prompt,
    condition: PromptCondition,
    layers: Sequence[int],
) -> pd.DataFrame:
    """Extract the vector of one prompt by its protocol, and find the tokens whose activations it is made of.

    Returns one row per rendering and layer; see `READ_COLUMNS`.

    Raises:
        WorkbenchError: no two tokens explain the vector.
    """
    sites = [vector.read_site(layer) for layer in layers]
    seen: dict[Site, list[tuple[TokenBatch, Tensor]]] = {site: [] for site in sites}

    def keep(site: Site) -> Callable[[Tensor], None]:
        def reader(stream: Tensor) -> None:
            batch = current_batch()
            if batch is not None:
                seen[site].append((batch, stream.detach().double().cpu()))

        return reader

    with reading(loaded.model, {site.hook_name: keep(site) for site in sites}):
        extracted = SteeringVector.extract(
            loaded, renderer, PromptSet(prompt.id, (prompt,)), condition, vector.protocol
        )
    renderings = {"prompted": renderer.render(prompt, condition), "plain": renderer.render(prompt)}
    rows = []
    for layer, site in zip(layers, sites, strict=True):
        streams = {name: _stream_of(seen[site], item) for name, item in renderings.items()}
        gaps = _pairwise_gap(streams["prompted"], streams["plain"], extracted.at(layer).double())
        prompted, plain = divmod(int(gaps.argmin()), gaps.shape[1])
        mismatch = float(gaps.min())
        if mismatch > 1e-3 * max(1.0, float(streams["plain"].abs().max())):
            raise WorkbenchError(f"The vector read at {site} is not the difference of any two recorded tokens.")
        for (name, item), index in zip(renderings.items(), (prompted, plain), strict=True):
            rows.append({"rendering": name, **_token(item, index), **_place(site, loaded), "mismatch": mismatch})
    return pd.DataFrame(rows)


def recorded_writes(
    loaded: LoadedModel,
    rendered: RenderedPrompt,
    interventions: Intervention | Sequence[Intervention],
    *,
    n_decode: int,
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Generate under steering and compare every hook point of the residual stream before and after its hooks.

    Returns one row per token and site that changed, with the change itself in `delta`, and the tokens seen per phase.
    """
    recorder = _WriteRecorder()
    sites = [Site(layer, kind) for layer in range(loaded.identity.n_layers) for kind in SITE_KINDS]
    sites = [site for site in sites if site.hook_name in loaded.model.mod_dict]
    with recorder.around(loaded, sites, interventions):
        generate(loaded, [rendered], GenerationSettings(max_new_tokens=n_decode + 1, stop_at_end_of_turn=False))
    rows = []
    for site, batch, column, delta in recorder.changes:
        index = int(batch.positions[0, column])
        token = int(batch.token_ids[0, column])
        text = rendered.tokens[index] if index < len(rendered) else loaded.tokenizer.decode([token])
        rows.append(
            {
                "phase": batch.phase,
                "index": index,
                "token_id": token,
                "token": text,
                "role": ROLES[int(batch.roles[0, column])],
                **_place(site, loaded),
                "added_norm": float(delta.norm()),
                "delta": delta,
            }
        )
    frame = pd.DataFrame(rows, columns=[*WRITE_COLUMNS[:-1], "delta"])
    return frame.sort_values("index", kind="stable", ignore_index=True), recorder.n_tokens


class _WriteRecorder:
    """Keeps what the hooks between its two readers change."""

    def __init__(self) -> None:
        self.changes: list[tuple[Site, TokenBatch, int, Float[Tensor, "d_model"]]] = []
        self._before: dict[Site, Tensor] = {}
        self._seen: set[tuple[str, int]] = set()

    @contextmanager
    def around(
        self, loaded: LoadedModel, sites: Sequence[Site], interventions: Intervention | Sequence[Intervention]
    ) -> Iterator[None]:
        """Attach the readers before and after the steering hooks; hooks of one point run in the order attached."""
        first = {site.hook_name: self._reader(site, self._remember) for site in sites}
        last = {site.hook_name: self._reader(site, self._compare) for site in sites}
        with reading(loaded.model, first), steering(loaded, interventions), reading(loaded.model, last):
            yield

    @property
    def n_tokens(self) -> dict[str, int]:
        """Tokens fed to the model per phase; the last token written is never fed back."""
        return {name: sum(phase == name for phase, _ in self._seen) for name in ("prefill", "decode")}

    def _reader(self, site: Site, act: Callable[[Site, Tensor], None]) -> Callable[[Tensor], None]:
        return lambda stream: act(site, stream)

    def _remember(self, site: Site, stream: Tensor) -> None:
        self._before[site] = stream.detach().clone()

    def _compare(self, site: Site, stream: Tensor) -> None:
        batch, before = current_batch(), self._before.pop(site)
        if batch is None:
            return
        self._seen.update((batch.phase, index) for index in batch.positions[0, batch.is_real[0]].tolist())
        changed = (stream != before).any(-1)[0]
        for column in changed.nonzero()[:, 0].tolist():
            delta = stream[0, column].double() - before[0, column].double()
            self.changes.append((site, batch, column, delta.cpu()))


def _stream_of(seen: list[tuple[TokenBatch, Tensor]], item: RenderedPrompt) -> Float[Tensor, "pos d_model"]:
    """Return the recorded stream of one rendering, pads after it included."""
    for batch, stream in seen:
        for row in range(len(stream)):
            real = batch.is_real[row].cpu()
            if tuple(batch.token_ids[row].cpu()[real].tolist()) == item.token_ids:
                return stream[row]
    raise WorkbenchError(f"The extraction did not run the rendering under {item.condition.name}.")


def _pairwise_gap(
    prompted: Float[Tensor, "one d_model"], plain: Float[Tensor, "two d_model"], vector: Float[Tensor, "d_model"]
) -> Float[Tensor, "one two"]:
    """Return, for every pair of tokens, the largest difference between their difference and the vector."""
    return torch.stack([(row - plain - vector).abs().amax(-1) for row in prompted])


def _token(item: RenderedPrompt, index: int) -> dict[str, Any]:
    if index >= len(item):
        return {"index": index, "token_id": None, "token": "", "role": "pad"}
    return {
        "index": index,
        "token_id": item.token_ids[index],
        "token": item.tokens[index],
        "role": item.roles[index],
    }


def _place(site: Site, loaded: LoadedModel) -> dict[str, Any]:
    """Return the names of a site in other tools; missing where a tool has none for it."""
    n_layers = loaded.identity.n_layers
    try:
        hidden: int | None = site.hidden_states_index(n_layers)
    except WorkbenchError:
        hidden = None
    key = site.layer if site.kind == "resid_post" else site.layer - 1
    has_key = site.kind != "resid_mid" and 0 <= key < n_layers - 1
    return {
        "layer": site.layer,
        "site": str(site),
        "hook_name": site.hook_name,
        "hidden_states_index": hidden,
        "svec_key": Site(key).svec_key(n_layers) if has_key else None,
    }


def _recorded_condition(vector: SteeringVector) -> PromptCondition:
    recorded = vector.provenance.get("condition")
    try:
        return PromptCondition(**recorded)  # type: ignore[arg-type]
    except TypeError:
        raise WorkbenchError(
            "The vector does not record the safety prompt it was made with; name one with condition=... (--condition)."
        ) from None


def _notes(
    vector: SteeringVector,
    condition: PromptCondition,
    reads: pd.DataFrame,
    writes: pd.DataFrame,
    n_tokens: dict[str, int],
    n_layers: int,
) -> Iterator[str]:
    for layer in dict.fromkeys(reads["layer"]):
        read = vector.read_site(layer)
        written = {Site.parse(site) for site in writes.loc[writes["layer"] == layer, "site"]}
        for site in sorted(written):
            if not site.same_point(read):
                where = f", the output of block {layer - 1}" if site.kind == "resid_pre" and layer else ""
                yield f"Layer {layer} was read at {read} and is written to {site}{where}: not where it was read."
    if (reads["role"] == "pad").any():
        where = ", ".join(dict.fromkeys(reads.loc[reads["role"] == "pad", "rendering"]))
        yield (
            f"A pad was read ({where}). The column shown is that of this prompt alone; in the extraction it is the end "
            "of the longest string in the batch of 16."
        )
    if n_layers - 1 in set(reads["layer"]):
        yield (
            f"The output of the last block has no hidden_states index and no .svec key: hidden_states[{n_layers}] and "
            f"key {n_layers - 1}, which stand in its place, are taken after the final norm."
        )
    recorded = (vector.provenance.get("condition") or {}).get("name")
    if recorded not in (None, condition.name):
        yield f"The vector was made with {recorded}, the audit uses {condition.name}."
    for phase, total in n_tokens.items():
        found = writes.loc[writes["phase"] == phase, "index"].nunique()
        if found < total:
            yield f"In {phase}, {found} of {total} tokens are written."


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(name): value for name, value in record.items()} for record in plain.to_dict("records")]
