"""A sweep on Ray: workers that hold the model once, chunks dealt out longest first, lost workers replaced.

The process that asked for the sweep makes vectors and doses, hands chunks out, writes every finished cell, and reports
progress; workers only compute. A worker that is lost takes nothing along but the chunk it was at, which goes to the
next free one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd
import torch

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.sweep.inputs import SweepInputs
from sgworkbench.evaluation.sweep.run import AnswerTask, ScreenTask, screened
from sgworkbench.evaluation.sweep.session import Session, Work
from sgworkbench.models import load_model
from sgworkbench.prompting import Renderer


@dataclass(frozen=True)
class RayOptions:
    """Where and on what a sweep runs.

    Attributes:
        workers: copies of the model.
        address: of a running cluster, `auto` for the one this machine belongs to; None starts one here.
        gpus_per_worker: GPUs of one worker; a part of one lets several share it.
        cpus_per_worker: CPUs, and threads, of one worker.
        most_lost: workers that may be lost before the sweep gives up; finished cells are kept then, too.
        started: called with the process id of a worker once it has its first chunk, for those who watch them.
    """

    workers: int = 2
    address: str | None = None
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0
    most_lost: int = 8
    started: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus_per_worker <= 0 or self.gpus_per_worker < 0 or self.most_lost < 0:
            raise WorkbenchError("Ray needs at least one worker, some CPU per worker, and no negative numbers.")


Task = TypeVar("Task", ScreenTask, AnswerTask)


def screen_on_ray(
    inputs: SweepInputs,
    work: Work,
    tasks: Sequence[ScreenTask],
    done: Callable[[ScreenTask, pd.DataFrame], None],
    options: RayOptions | None,
) -> None:
    """Screen chunks on workers; `done` is called here, in the order in which they are finished.

    Raises:
        WorkbenchError: Ray is not installed, no worker can start, or too many were lost.
    """
    _Pool(inputs, work, options or RayOptions()).run(
        sorted(tasks, key=lambda task: -task.chunk.cost), lambda worker, task: worker.screen.remote(task), done
    )


def answer_on_ray(
    inputs: SweepInputs,
    work: Work,
    tasks: Sequence[AnswerTask],
    done: Callable[[AnswerTask, pd.DataFrame], None],
    options: RayOptions | None,
) -> None:
    """Answer cells on workers; see `screen_on_ray`."""
    _Pool(inputs, work, options or RayOptions()).run(tasks, lambda worker, task: worker.answer.remote(task), done)


class _Worker:
    """Lives in a process of its own and holds one copy of the model."""

    def __init__(self, model: dict[str, Any], template: str | None, thinking: bool | None, work: Work) -> None:
        threads, weights = int(model.pop("threads")), model.pop("weights_sha256")
        torch.set_num_threads(max(1, threads))
        loaded = load_model(**model, self_check=False, progress=lambda _line: None)
        if loaded.identity.weights_sha256 != weights:
            raise WorkbenchError(
                f"The worker found other weights under {model['source']!r} than the sweep was started with; give all "
                "machines the same model."
            )
        self._session = Session(loaded, Renderer(loaded.tokenizer, template, thinking), work)

    def pid(self) -> int:
        """Return the process id; the answer says that the model is loaded."""
        return os.getpid()

    def screen(self, task: ScreenTask) -> pd.DataFrame:
        """Return a chunk's items."""
        return screened(self._session, task)

    def answer(self, task: AnswerTask) -> pd.DataFrame:
        """Return a cell's answers."""
        return self._session.answer(task.cell_id, task.condition, task.interventions, task.seed)


class _Pool:
    """The workers of one stage."""

    def __init__(self, inputs: SweepInputs, work: Work, options: RayOptions) -> None:
        try:
            import ray
        except ImportError:
            raise WorkbenchError(
                "The engine 'ray' needs the package ray; install it with: pip install 'sgworkbench[ray]'."
            ) from None
        self._ray, self._options = ray, options
        self._own = not ray.is_initialized()
        if self._own:
            started_here = {
                "num_cpus": max(1, math.ceil(options.workers * options.cpus_per_worker)),
                "include_dashboard": False,
            }
            try:
                ray.init(
                    address=options.address or "local",
                    log_to_driver=False,
                    logging_level="error",
                    **({} if options.address else started_here),
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise WorkbenchError(f"No Ray cluster at {options.address!r}: {reason}") from None
        self._check_room()
        identity = inputs.loaded.identity
        model = {
            "source": identity.source,
            "dtype": identity.dtype,
            "device": inputs.spec.device,
            "context_length": identity.context_length,
            "threads": max(1, int(options.cpus_per_worker)),
            "weights_sha256": identity.weights_sha256,
        }
        renderer = inputs.renderer
        shared = ray.put(work)
        remote = ray.remote(num_cpus=options.cpus_per_worker, num_gpus=options.gpus_per_worker, max_restarts=0)(_Worker)
        self._start: Callable[[], Any] = lambda: remote.remote(model, renderer.chat_template, renderer.thinking, shared)

    def _check_room(self) -> None:
        """Refuse workers that no node could ever hold: Ray would wait for one forever."""
        options, nodes = self._options, self._ray.nodes()
        need = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
        if not any(all(node["Resources"].get(k, 0) >= n for k, n in need.items()) for node in nodes if node["Alive"]):
            if self._own:
                self._ray.shutdown()
            raise WorkbenchError(
                f"No node of the Ray cluster has {need['CPU']:g} CPUs and {need['GPU']:g} GPUs for one worker; lower "
                "--cpus-per-worker or --gpus-per-worker."
            )

    def run(
        self,
        tasks: Sequence[Task],
        send: Callable[[Any, Task], Any],
        done: Callable[[Task, pd.DataFrame], None],
    ) -> None:
        """Hand tasks out in order, one at a time to each worker, until all are done."""
        ray = self._ray
        try:
            self._run(list(tasks), send, done)
        finally:
            if self._own:
                ray.shutdown()

    def _run(
        self, waiting: list[Task], send: Callable[[Any, Task], Any], done: Callable[[Task, pd.DataFrame], None]
    ) -> None:
        ray, options, lost = self._ray, self._options, 0
        starting = [self._start() for _ in range(min(options.workers, len(waiting)))]
        greetings: dict[Any, Any] = {worker.pid.remote(): worker for worker in starting}
        running: dict[Any, tuple[Any, Task]] = {}
        while waiting or running:
            ready, _ = ray.wait([*greetings, *running], num_returns=1)
            future = ready[0]
            worker, task = (greetings.pop(future), None) if future in greetings else running.pop(future)
            try:
                result = ray.get(future)
            except ray.exceptions.RayActorError as error:
                lost += 1
                if lost > options.most_lost or "WorkbenchError" in str(error):
                    raise WorkbenchError(_reason(error, lost)) from None
                if task is not None:
                    waiting.insert(0, task)
                replacement = self._start()
                greetings[replacement.pid.remote()] = replacement
                continue
            except ray.exceptions.RayTaskError as error:
                raise WorkbenchError(" ".join(str(error.cause).split())) from None
            if task is not None:
                done(task, result)
            if waiting:
                following = waiting.pop(0)
                running[send(worker, following)] = (worker, following)
            if task is None and options.started is not None:
                options.started(int(result))


def _reason(error: Exception, lost: int) -> str:
    text = str(error)
    if "WorkbenchError" in text:
        lines = [line for line in text.splitlines() if "WorkbenchError" in line]
        return lines[-1].split("WorkbenchError:", 1)[-1].strip()
    return (
        f"{lost} Ray workers were lost, so the sweep stopped; finished cells are kept. Check the machines' memory and "
        "run the same command again."
    )
