"""Measured ratios against other steering libraries, each in an environment of its own, taking turns with ours.

Their dependencies exclude each other and ours, so every library gets a virtual environment under --environments (made
when it is missing) and runs in a process of its own on the same model folder and the same prompt ids. Its result is
compared with ours before anything is timed.

    python benchmarks/peers.py [--peers steering-vectors,repeng,nnsight,nnterp] [--tasks vectors,decode] [--turns 5]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak_memory import PeakMemory
from run import Record, markdown

from sgworkbench.analysis import all_sites, capture_moments
from sgworkbench.models import LoadedModel, load_model
from sgworkbench.prompting import PromptCondition, RenderedPrompt, Renderer, contrast_set
from sgworkbench.runs import environment
from sgworkbench.steering import GenerationSettings, SteeringVector, generate, steering

VERSIONS = {"steering-vectors": "0.12.2", "repeng": "0.4.0", "nnsight": "0.8.1", "nnterp": "1.3.0"}
# nnterp 1.3.0 imports modules that nnsight dropped in 0.8, although it allows that version.
ALSO = {"nnterp": ["nnsight<0.8"]}
TASKS = ("vectors", "decode")
LAYER, NEW_TOKENS = 17, 64
HERE = Path(__file__).parent


def python_of(peer: str, folder: Path) -> Path:
    """Return the interpreter of a peer's environment, making the environment when it is missing."""
    home = folder / f"{peer}-{VERSIONS[peer]}"
    python = home / "bin" / "python"
    if (home / ".installed").is_file():
        return python
    print(f"Installing {peer} {VERSIONS[peer]} into {home}", file=sys.stderr)
    venv.create(home, with_pip=True, clear=True)
    wanted = [f"{peer}=={VERSIONS[peer]}", f"torch=={torch.__version__.split('+')[0]}", "psutil", *ALSO.get(peer, [])]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    (home / ".installed").touch()
    return python


def readable_folder(loaded: LoadedModel, folder: Path) -> Path:
    """Copy the model folder so that transformers 4 reads it as transformers 5 does.

    Version 5 keeps the rotary base inside `rope_parameters`, where version 4 does not look: it would silently use its
    default and compute something else.
    """
    shutil.copytree(loaded.folder, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    config.setdefault("torch_dtype", config.get("dtype", "float32"))
    file.write_text(json.dumps(config), encoding="utf-8")
    # The tokenizer's class was renamed, too; this name means the same in both.
    file = folder / "tokenizer_config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


class Peer:
    """A peer's process, loaded and waiting for its turn."""

    def __init__(self, python: Path, job: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [python, HERE / "peer_worker.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE
        )
        self._say(json.dumps(job))
        if self._hear() != "ready":
            raise SystemExit(f"{job['peer']} did not get ready for {job['task']}; its message is above.")
        self.result = np.load(job["result"])

    def turn(self) -> tuple[float, float]:
        """Run once; return seconds and peak MiB."""
        self._say("go")
        answer = json.loads(self._hear())
        return answer["seconds"], answer["mib"]

    def end(self) -> None:
        self._say("end")
        self._process.wait(timeout=60)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def vectors_task(
    loaded: LoadedModel, renderer: Renderer, n_pairs: int
) -> tuple[list[RenderedPrompt], Callable[[], np.ndarray], dict[str, Any]]:
    """Mean-difference vectors at all layers: prompts (prompted first), our run, nothing more to tell a peer."""
    prompts = list(contrast_set().split("train")) + list(contrast_set().split("test"))
    chosen, safe = (prompts * 2)[:n_pairs], PromptCondition.preset("self-reminder")
    groups = [[renderer.render(p, c) for p in chosen] for c in (safe, None)]
    sites = all_sites(loaded.identity.n_layers)

    def ours() -> np.ndarray:
        means = [capture_moments(loaded, group, sites).mean for group in groups]
        return (means[0] - means[1]).float().numpy()

    return [*groups[0], *groups[1]], ours, {}


def decode_task(
    loaded: LoadedModel, renderer: Renderer, n_prompts: int
) -> tuple[list[RenderedPrompt], Callable[[], np.ndarray], dict[str, Any]]:
    """Steered greedy decoding of prompts of unequal length."""
    prompts = contrast_set().split("validation").sample(n_prompts, seed=1)
    safe = PromptCondition.preset("self-reminder")
    rendered = [renderer.render(p, safe if i % 4 == 0 else None) for i, p in enumerate(prompts)]
    values = torch.randn(1, loaded.identity.d_model, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector((LAYER,), values / values.norm() * 15.0)
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, stop_at_end_of_turn=False)

    def ours() -> np.ndarray:
        with steering(loaded, vector.intervention(LAYER, 1.0)):
            return np.asarray([answer.token_ids for answer in generate(loaded, rendered, settings)])

    return rendered, ours, {"layer": LAYER, "vector": vector.values[0].tolist(), "new_tokens": NEW_TOKENS}


def difference(task: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest relative difference of a layer's vector, or the number of answers that differ."""
    if task == "decode":
        return float((ours != theirs).any(axis=1).sum())
    # Hidden states give the last layer after the final norm; it is left out.
    rows = min(len(ours), len(theirs)) - 1
    error = np.linalg.norm(ours - theirs[: len(ours)], axis=-1) / np.linalg.norm(ours, axis=-1)
    return float(error[:rows].max())


def main() -> None:
    """Run the tasks and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(VERSIONS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    arguments = parser.parse_args()
    for given, known in ((arguments.peers, VERSIONS), (arguments.tasks, TASKS)):
        for name in given.split(","):
            if name not in known:
                sys.exit(f"Unknown name {name!r}; known: {', '.join(known)}.")
    pythons = {peer: python_of(peer, arguments.environments.absolute()) for peer in arguments.peers.split(",")}
    loaded = load_model("demo", self_check=False)
    renderer = Renderer(loaded.tokenizer)
    machine = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(), **environment()}
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = readable_folder(loaded, Path(scratch) / "model")
        for task in arguments.tasks.split(","):
            if task == "vectors":
                name = f"vectors, {arguments.pairs} pairs"
                rendered, ours, more = vectors_task(loaded, renderer, arguments.pairs)
            else:
                name = f"steered decode, 16 prompts x {NEW_TOKENS} tokens"
                rendered, ours, more = decode_task(loaded, renderer, 16)
            result = ours()
            for peer, python in pythons.items():
                if (peer, task) == ("nnterp", "decode"):
                    continue  # it generates through nnsight
                job = {
                    "peer": peer,
                    "task": task,
                    "folder": str(folder),
                    "texts": [item.text for item in rendered],
                    "token_ids": [list(item.token_ids) for item in rendered],
                    "result": str(Path(scratch) / f"{peer}-{task}.npy"),
                    **more,
                }
                other = Peer(python, job)
                gap = difference(task, result, other.result)
                turns = []
                for turn in range(arguments.turns):
                    with PeakMemory() as memory:
                        start = time.perf_counter()
                        ours()
                        seconds = time.perf_counter() - start
                    turns.append((seconds, memory.mib, *other.turn()))
                    print(f"{name}, {peer}: turn {turn + 1}/{arguments.turns}", file=sys.stderr, flush=True)
                other.end()
                ratios = [theirs / mine for mine, _, theirs, _ in turns]
                records.append(
                    Record(
                        name,
                        "sgworkbench",
                        f"{peer} {VERSIONS[peer]}",
                        round(statistics.median(ratios), 3),
                        round(min(ratios), 3),
                        round(max(ratios), 3),
                        round(statistics.median(t[1] for t in turns), 1),
                        round(statistics.median(t[3] for t in turns), 1),
                        gap,
                        arguments.turns,
                    )
                )
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps([asdict(record) for record in records], indent=2) + "\n"
                arguments.out.write_text(text, encoding="utf-8")
                arguments.out.with_suffix(".md").write_text(markdown(records, machine), encoding="utf-8")
    print(markdown(records, machine))


if __name__ == "__main__":
    main()
