"""One other library at work, in its own environment; `peers.py` starts it and tells it when it is its turn.

It reads one JSON job from standard input (model folder, prompts with their token ids, what to do), says `ready`, then
runs its task once for every line `go` and answers with seconds and peak memory; `end` ends it. The first run's result
goes to a file, so that it can be compared before anything counts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak_memory import PeakMemory
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 16
Job = dict[str, Any]


def _plain(job: Job) -> tuple[Any, Any]:
    tokenizer = _tokenizer(job)
    return AutoModelForCausalLM.from_pretrained(job["folder"], torch_dtype=torch.float32).eval(), tokenizer


def _tokenizer(job: Job) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for text, ids in zip(job["texts"], job["token_ids"], strict=True):
        found = tokenizer(text)["input_ids"]
        if found != ids:
            sys.exit(f"The peer's tokenizer gives other ids than ours: {found[:8]}... instead of {ids[:8]}...")
    return tokenizer


def _halves(job: Job) -> tuple[list[str], list[str]]:
    middle = len(job["texts"]) // 2
    return job["texts"][:middle], job["texts"][middle:]


def _decoded(output: torch.Tensor, prompt_tokens: int) -> np.ndarray:
    return np.asarray(output[:, prompt_tokens:].tolist())


def _generate_arguments(job: Job, tokenizer: Any) -> dict[str, Any]:
    n = job["new_tokens"]
    return {
        "max_new_tokens": n,
        "min_new_tokens": n,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
    }


def steering_vectors(job: Job) -> Callable[[], np.ndarray]:
    from steering_vectors import SteeringVector, train_steering_vector

    model, tokenizer = _plain(job)
    if job["task"] == "vectors":
        pairs = list(zip(*_halves(job), strict=True))

        def vectors() -> np.ndarray:
            found = train_steering_vector(model, tokenizer, pairs, batch_size=BATCH)
            return np.stack([found.layer_activations[k].numpy() for k in sorted(found.layer_activations)])

        return vectors
    vector = SteeringVector({job["layer"]: torch.tensor(job["vector"])}, "decoder_block")

    @torch.inference_mode()
    def decode() -> np.ndarray:
        encoded = tokenizer(job["texts"], return_tensors="pt", padding=True)
        with vector.apply(model, multiplier=1.0):
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            output = model.generate(input_ids=ids, attention_mask=mask, **_generate_arguments(job, tokenizer))
        return _decoded(output, encoded["input_ids"].shape[1])

    return decode


def repeng(job: Job) -> Callable[[], np.ndarray]:
    from repeng import ControlModel, ControlVector
    from repeng.extract import batched_get_hiddens

    model, tokenizer = _plain(job)
    if job["task"] == "vectors":
        safe, plain = _halves(job)
        layers = list(range(model.config.num_hidden_layers))

        def vectors() -> np.ndarray:
            # Its own methods are principal components; the hidden states they start from make the mean difference.
            states = batched_get_hiddens(model, tokenizer, safe + plain, layers, BATCH)
            return np.stack([states[k][: len(safe)].mean(0) - states[k][len(safe) :].mean(0) for k in layers])

        return vectors
    controlled = ControlModel(model, [job["layer"]])
    vector = ControlVector("llama", {job["layer"]: np.asarray(job["vector"], dtype=np.float32)})

    @torch.inference_mode()
    def decode() -> np.ndarray:
        encoded = tokenizer(job["texts"], return_tensors="pt", padding=True)
        controlled.set_control(vector, 1.0)
        try:
            output = controlled.generate(**encoded, **_generate_arguments(job, tokenizer))
        finally:
            controlled.reset()
        return _decoded(output, encoded["input_ids"].shape[1])

    return decode


def nnsight(job: Job) -> Callable[[], np.ndarray]:
    from nnsight import LanguageModel

    model = LanguageModel(job["folder"], tokenizer=_tokenizer(job), torch_dtype=torch.float32, dispatch=True)
    model.tokenizer.padding_side = "left"
    n_layers = model.config.num_hidden_layers

    def block_output(layer: int) -> Any:
        found = model.model.layers[layer].output
        return found[0] if isinstance(found, tuple) else found

    if job["task"] == "vectors":

        @torch.inference_mode()
        def vectors() -> np.ndarray:
            means = []
            for group in _halves(job):
                kept = []
                for start in range(0, len(group), BATCH):
                    with model.trace(group[start : start + BATCH]):
                        rows = list().save()  # noqa: C408 - `save` is nnsight's addition to objects in a trace
                        for layer in range(n_layers):
                            rows.append(block_output(layer)[:, -1])
                    kept.append(torch.stack(list(rows), 1))
                means.append(torch.cat(kept).mean(0))
            return np.asarray((means[0] - means[1]).tolist(), dtype=np.float32)

        return vectors
    added = torch.tensor(job["vector"])
    layer = job["layer"]

    @torch.inference_mode()
    def decode() -> np.ndarray:
        arguments = _generate_arguments(job, model.tokenizer)
        with model.generate(job["texts"], **arguments) as tracer:
            for _ in tracer.iter[: job["new_tokens"]]:
                block_output(layer)[:] = block_output(layer) + added
            output = tracer.result.save()
        width = model.tokenizer(job["texts"], return_tensors="pt", padding=True)["input_ids"].shape[1]
        return _decoded(output, width)

    return decode


def nnterp(job: Job) -> Callable[[], np.ndarray]:
    from nnterp import StandardizedTransformer
    from nnterp.nnsight_utils import collect_token_activations_batched

    if job["task"] != "vectors":
        sys.exit("nnterp generates through nnsight, which is timed by itself.")
    model = StandardizedTransformer(job["folder"], tokenizer=_tokenizer(job), torch_dtype=torch.float32)
    model.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def vectors() -> np.ndarray:
        means = [collect_token_activations_batched(model, group, BATCH).mean(1) for group in _halves(job)]
        return np.asarray((means[0] - means[1]).tolist(), dtype=np.float32)

    return vectors


PEERS: dict[str, Callable[[Job], Callable[[], np.ndarray]]] = {
    "steering-vectors": steering_vectors,
    "repeng": repeng,
    "nnsight": nnsight,
    "nnterp": nnterp,
}


def main() -> None:
    """Serve one job. Answers go to the original standard output; whatever the library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job: Job = json.loads(sys.stdin.readline())
    run = PEERS[job["peer"]](job)
    np.save(Path(job["result"]), run())
    print("ready", file=answers)
    for line in sys.stdin:
        if line.strip() != "go":
            break
        with PeakMemory() as memory:
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "mib": memory.mib}), file=answers)


if __name__ == "__main__":
    main()
