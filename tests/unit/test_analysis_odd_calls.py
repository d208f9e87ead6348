"""Calls that a researcher makes in a notebook with the wrong kind of thing: an answer in one sentence, or a result.

The tests' own shape and type checks would step in first, so the calls are made in an interpreter without them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each call with the start of its answer; "ok" means that it must work.
CALLS: dict[str, str] = {
    "Site(np.int64(2)) == Site(2) and str(Site(np.int64(2)))": "ok resid_post[2]",
    "json.dumps(Site(np.int32(2)).layer)": "ok 2",
    "Site(2.0)": "A site's layer is a whole number, found 2.0; read text with Site.parse.",
    "Site('2')": "A site's layer is a whole number, found '2'",
    "Site(2, 'resid_pst')": "Unknown site kind 'resid_pst'. Did you mean 'resid_post'?",
    "Site(2, 3)": "Unknown site kind '3'.",
    "len(capture(loaded, [one], [Site(layer) for layer in np.arange(3)]).values)": "ok 1",
    "len(capture(loaded, (one, one), all_sites(3), np.array([[0], [1]])).values)": "ok 2",
    "capture(loaded, one, all_sites(3))": "Expected a list of rendered prompts, found RenderedPrompt; put a",
    "capture(loaded, 'How?', all_sites(3))": "Expected a list of rendered prompts, found str",
    "capture(loaded, ['How?'], all_sites(3))": "Expected rendered prompts, found str; render texts with",
    "capture(loaded, prompts, all_sites(3))": "Expected a list of rendered prompts, found PromptSet",
    "capture(loaded, [one], Site(1))": "Expected a list of sites, found Site; put a single one into a list.",
    "capture(loaded, [one], [1, 2])": "Expected sites, found int; write Site(3)",
    "capture(loaded, [one], [])": "No sites were given",
    "capture(loaded, [], all_sites(3))": "No prompts were given",
    "read_for_gap(loaded, [], all_sites(3))": "No prompts were given",
    "Renderer(loaded.tokenizer, Path('chat.jinja'))": "Expected a chat template as Jinja text, found PosixPath; read",
    "renderer.render(['a', 'b'])": "Expected one prompt, found list; render the prompts of a list one by one.",
    "renderer.render(prompts)": "Expected one prompt, found PromptSet",
    "renderer.render(None)": "Expected one prompt, found NoneType",
    "renderer.render('a', 'self-reminder')": "Expected a PromptCondition, found str; presets are",
    "safety_shift(loaded, renderer, ['a'], reminder)": "Expected a PromptSet, found list; wrap texts with",
    "safety_shift(loaded, renderer, 'a', reminder)": "Expected a PromptSet, found str",
    "safety_shift(loaded, renderer, prompts, 'self-reminder')": "Expected a PromptCondition, found str; presets are",
    "safety_shift(loaded, renderer, prompts, None)": "Expected a PromptCondition, found NoneType",
    "len(safety_shift(loaded, renderer, prompts, reminder, sites=list(all_sites(2))).mean)": "ok 2",
    "shift_map(loaded, renderer, ['a'], reminder, None)": "Expected a PromptSet, found list",
    "measure_gap({}, ['a'], None, None)": "Expected a PromptSet, found list",
    "PromptSet.from_texts(Path('prompts.txt'))": "Expected a list of prompts, found PosixPath",
    "PromptSet.from_texts(None)": "Expected a list of prompts, found NoneType",
    "PromptSet.from_texts([1, 2])": "Expected text as prompt 0, found int; give the instructions as strings.",
    "PromptSet.from_texts(['a', None])": "Expected text as prompt 1, found NoneType",
    "PromptSet.from_texts(['a'], label='bad')": "Unknown label 'bad'. Known: harmful, harmless, unlabelled.",
    "PromptSet('s', ('a',))": "Expected Prompt objects, found str; wrap plain texts with PromptSet.from_texts",
    "prompts.labelled('harmfull')": "Unknown label 'harmfull'. Did you mean 'harmful'?",
    "prompts.sample(np.int64(1)).texts": "ok",
    "load_prompts('builtin:contrast', label='bad')": "Unknown label 'bad'.",
    "load_prompts(Path('builtin:contrast/test')).name": "ok contrast/test",
    "PromptCondition.load(Path('self-reminder')).name": "ok self-reminder",
    "directions.project(np.zeros((3, 3, 32)))": "Expected activations as a torch tensor, found ndarray",
    "directions.project(torch.zeros(3, 32, dtype=torch.float64)).dtype": "ok torch.float32",
    "directions.project(torch.zeros(32))": "Expected activations of shape (..., sites, d_model) = (..., 3, 32)",
    "directions.at(2)": "There is no awareness direction at 2; sites: resid_post[0] ... resid_post[2] (3).",
    "resolve_positions([one], 'last')": "Unknown position selector 'last'.",
    "resolve_positions([one], 3)": "Expected a selector name or token indices for every prompt, found int",
    "resolve_positions([one], [3])": "Expected a list of token indices for prompt '0', found int",
    "parse_layers('all', 3)": "Expected layers such as 20 or 10-14,20; found 'all'.",
    "parse_layers(2, 3)": "ok (2,)",
    "Site.parse(2)": "ok resid_post[2]",
    "Site.from_svec_key(1, 3)": "ok resid_post[1]",
}

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np, torch
from sgworkbench.analysis import *
from sgworkbench.analysis.capture import resolve_positions
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import load_model
from sgworkbench.prompting import *

loaded = load_model(sys.argv[1], self_check=False, progress=lambda line: None)
renderer = Renderer(loaded.tokenizer)
reminder = PromptCondition("c", suffix=" Be safe.")
prompts = PromptSet.from_texts(["How do I bake bread?", "Why?"])
one = renderer.render("How do I bake bread?")
directions = awareness_directions(torch.randn(4, 3, 32) + 1, torch.randn(4, 3, 32), all_sites(3))
answers = {}
for call in json.load(sys.stdin):
    try:
        answers[call] = f"ok {eval(call)}"
    except WorkbenchError as error:
        answers[call] = str(error)
    except Exception as error:
        answers[call] = f"CRASH {type(error).__name__}: {error}"
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(tiny_model: Callable[..., Any]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tiny_model("llama").folder)],
        input=json.dumps(list(CALLS)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("call", CALLS)
def test_an_odd_call_has_a_plain_answer(call: str, answers: dict[str, str]) -> None:
    answer = answers[call]
    assert answer.startswith(CALLS[call]), answer
    assert "\n" not in answer
