"""Experiment configurations: what they may say, what they are refused for, and the plan that follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sgworkbench.analysis.directions import mean_difference_directions
from sgworkbench.analysis.site import Site
from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.experiment.arms import PlannedArm, comparison_pairs, plan_arms, what_changes
from sgworkbench.evaluation.experiment.config import PRESETS, ExperimentConfig
from sgworkbench.evaluation.experiment.config_files import example_names
from sgworkbench.evaluation.experiment.prompts import check_held_out, load_prompt_sets
from sgworkbench.evaluation.experiment.sources import along, shuffled_classes, shuffled_shift, training_prompts
from sgworkbench.steering import SteeringVector
from sgworkbench.steering.recipe import InterventionSpec, SteeringRecipe


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "arms": ["vanilla", "both"],
        "prompt_sets": [{"name": "harmful", "source": "builtin:contrast/harmful/test", "n": 4}],
    } | changes


def refused(**changes: Any) -> str:
    with pytest.raises(WorkbenchError) as error:
        ExperimentConfig.parse(settings(**changes))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"promt_sets": []}, "prompt_sets"),
        ({"prompt_sets": [{"name": "a", "sorce": "b"}]}, "source"),
        ({"generation": {"temprature": 0.5}}, "temperature"),
        ({"train": {"harmfull": "x"}}, "harmful"),
        ({"arms": [{"name": "a", "coeficient": 2.0}]}, "coefficient"),
        ({"arms": ["refusal-directions"]}, "refusal-direction"),
        ({"arms": [{"name": "a", "interventions": [{"vectr": "safety", "layers": 1}]}]}, "vector"),
        ({"sources": {"x": {"kind": "random", "off": "safety"}}}, "of"),
        ({"coherence": {"minimum_zlib": 0.2}}, "minimum_zlib_ratio"),
        ({"judges": ["refusl"]}, "refusal"),
        ({"judges": [{"name": "refusal", "endpont": "x"}]}, "endpoint"),
        ({"comparisons": [["vanilla", "bth"]]}, "both"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(changes: dict[str, Any], nearest: str) -> None:
    assert f"Did you mean {nearest!r}?" in refused(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": []}, "arms"),
        ({"prompt_sets": []}, "prompt_sets"),
        ({"arms": ["vanilla", "Vanilla"]}, "Vanilla"),
        ({"arms": ["vanilla", {"preset": "both", "name": "VANILLA"}]}, "names must differ"),
        ({"arms": [{"condition": "plain"}]}, "name"),
        ({"arms": [{"name": "a/b"}]}, "file names"),
        ({"arms": [{"name": "a__b"}]}, "file names"),
        ({"arms": [{"name": "a", "preset": "both", "recipe": "x"}]}, "several"),
        ({"arms": [{"name": "a", "layers": 3}]}, "preset"),
        ({"judges": ["llama-guard-3"]}, "endpoint"),
        ({"judges": ["refusal", "refusal"]}, "twice"),
        ({"generation": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"prompt_sets": [{"name": "a", "source": "b", "transforms": ["nothing-known"]}]}, "nothing-known"),
        ({"awareness": ["guess"]}, "awareness"),
    ],
)
def test_values_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    assert words in refused(**changes)


def test_every_preset_is_planned_and_the_settings_survive_json() -> None:
    config = ExperimentConfig.parse(
        settings(
            arms=list(PRESETS),
            prompt_sets=[
                {
                    "name": "h",
                    "source": "builtin:contrast/harmful/test",
                    "transforms": ["none", "prefill", ["past-tense", "refusal-suppression"]],
                }
            ],
            steering={"layers": [3, 5], "coefficient": 2.0},
            costs={"perplexity": None},
        )
    )
    again = ExperimentConfig.parse(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    planned = {arm.name: arm for arm in plan_arms(config)}
    conditions = {name: arm.condition.name for name, arm in planned.items()}
    assert conditions == dict.fromkeys(PRESETS, "self-reminder") | {"vanilla": "plain", "steer-only": "plain"}
    assert not planned["vanilla"].specs
    assert not planned["prompt-only"].specs
    for name in ("both", "random-direction", "shuffled-labels", "refusal-direction", "gated"):
        (spec,) = planned[name].specs
        assert (spec.layers, spec.coefficient) == ((3, 5), 2.0)
    assert planned["gated"].fits_gate
    assert planned["gated"].source_names == ("safety", "awareness")


def test_an_arm_may_override_dose_and_condition() -> None:
    arms = ["vanilla", {"preset": "random-direction", "condition": "plain", "coefficient": 0.1, "layers": "50%"}]
    arm = plan_arms(ExperimentConfig.parse(settings(arms=arms)))[1]
    assert arm.condition.is_plain
    assert (arm.specs[0].coefficient, arm.specs[0].layers) == (0.1, "50%")


def test_differently_worded_safety_prompts_are_refused_unless_allowed() -> None:
    arms = ["prompt-only", {"preset": "both", "condition": "self-reminder-assistant"}]
    with pytest.raises(WorkbenchError, match="2 safety prompts of different wording"):
        plan_arms(ExperimentConfig.parse(settings(arms=arms)))
    first, second = plan_arms(ExperimentConfig.parse(settings(arms=arms, several_safety_prompts=True)))
    assert what_changes(first, second) == "prompt and steering"


def test_recipe_brings_its_own_condition_and_vectors(tmp_path: Path) -> None:
    from sgworkbench.prompting import PromptCondition

    vector = SteeringVector((0, 1), torch.ones(2, 4))
    recipe = SteeringRecipe.additive(vector, 1, 0.7, condition=PromptCondition.preset("self-reminder"))
    recipe.save(tmp_path / "r.safetensors")
    config_file = tmp_path / "e.json"
    config_file.write_text(json.dumps(settings(arms=["vanilla", {"name": "r", "recipe": "r.safetensors"}])))
    arm = plan_arms(ExperimentConfig.load(config_file))[1]
    assert arm.condition.name == "self-reminder"
    assert arm.source_names == ()
    assert arm.specs[0].coefficient == 0.7


def test_comparisons_isolate_prompt_and_steering() -> None:
    arms = plan_arms(
        ExperimentConfig.parse(settings(arms=["vanilla", "prompt-only", "steer-only", "both", "random-direction"]))
    )
    pairs = comparison_pairs(arms, [("both", "steer-only"), ("both", "vanilla")])
    assert pairs == [
        ("vanilla", "prompt-only"),
        ("vanilla", "steer-only"),
        ("vanilla", "both"),
        ("vanilla", "random-direction"),
        ("prompt-only", "both"),
        ("prompt-only", "random-direction"),
        ("both", "random-direction"),
        ("both", "steer-only"),
    ]
    by_name = {arm.name: arm for arm in arms}
    changes = {pair: what_changes(by_name[pair[0]], by_name[pair[1]]) for pair in pairs}
    assert changes["vanilla", "prompt-only"] == "prompt"
    assert changes["vanilla", "steer-only"] == "steering"
    assert changes["vanilla", "both"] == "prompt and steering"
    assert changes["both", "random-direction"] == "steering"
    same = PlannedArm("again", by_name["both"].condition, by_name["both"].specs)
    assert what_changes(by_name["both"], same) == "nothing"


def test_wrapped_prompts_keep_their_request() -> None:
    sets = load_prompt_sets(
        ExperimentConfig.parse(
            settings(
                prompt_sets=[
                    {
                        "name": "h",
                        "source": "builtin:contrast/harmful/test",
                        "n": 3,
                        "transforms": ["none", "prefill", ["past-tense", "refusal-suppression"]],
                    }
                ]
            )
        )
    )
    assert [each.name for each in sets] == ["h", "h+prefill", "h+past-tense+refusal-suppression-rules"]
    plain, prefilled, rewritten = sets
    assert plain.requests == prefilled.requests == rewritten.requests == tuple(plain.prompts.texts)
    assert prefilled.wrapped.condition().prefill != ""
    assert all(text not in plain.requests for text in rewritten.prompts.texts)


def test_training_prompts_are_not_evaluated() -> None:
    held_out = ExperimentConfig.parse(settings())
    check_held_out(load_prompt_sets(held_out), training_prompts(held_out))
    leaking = ExperimentConfig.parse(
        settings(prompt_sets=[{"name": "h", "source": "builtin:contrast/harmful/train", "transforms": ["prefill"]}])
    )
    with pytest.raises(WorkbenchError, match="are training prompts"):
        check_held_out(load_prompt_sets(leaking), training_prompts(leaking))


def test_limited_never_asks_for_more() -> None:
    config = ExperimentConfig.parse(settings()).limited(2, 5)
    assert (config.prompt_sets[0].n, config.generation.max_new_tokens) == (2, 5)
    assert (config.train.n, config.costs) == (8, None)
    more = ExperimentConfig.parse(settings(train={"n": 5}, costs={"generated": [{"puzzles": "chain_sum"}]})).limited(9)
    assert (more.prompt_sets[0].n, more.train.n) == (4, 5)
    assert more.costs is not None
    assert more.costs.multiple_choice is not None
    assert (more.costs.multiple_choice.n, more.costs.generated[0].n) == (9, 9)


def test_examples_are_valid() -> None:
    assert "seven-arms" in example_names()
    for name in example_names():
        config = ExperimentConfig.load(name)
        assert len(plan_arms(config)) == len(config.arms)
    assert [arm.name for arm in ExperimentConfig.load("seven-arms").arms] == list(PRESETS[:7])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("e.yaml", "- a list", "mapping"),
        ("e.yaml", "a: [unclosed", "cannot be parsed"),
        ("e.json", "{", "cannot be parsed"),
        ("e.txt", "model: demo", "must end in"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(WorkbenchError, match=words):
        ExperimentConfig.load(tmp_path / name)


def test_files_that_are_not_there() -> None:
    with pytest.raises(WorkbenchError, match="does not exist"):
        ExperimentConfig.load("nowhere.yaml")
    with pytest.raises(WorkbenchError, match="Did you mean 'seven-arms'"):
        ExperimentConfig.load("seven-arm")


def test_shuffled_shift_exchanges_half_of_the_pairs_and_keeps_the_norm() -> None:
    generator = torch.Generator().manual_seed(1)
    plain, prompted = torch.randn(2, 6, 3, 5, generator=generator)
    real = (prompted - plain).mean(0)
    shuffled = shuffled_shift(plain, prompted, real, seed=4)
    assert torch.allclose(shuffled.norm(dim=-1), real.norm(dim=-1), rtol=1e-5)
    # One of the 20 ways to exchange three of six pairs, up to scale, and the same one at every layer.
    from itertools import combinations

    unit = torch.nn.functional.normalize(shuffled, dim=-1)
    matches = []
    for chosen in combinations(range(6), 3):
        sign = torch.ones(6)
        sign[list(chosen)] = -1
        mean = torch.nn.functional.normalize((sign[:, None, None] * (prompted - plain)).mean(0), dim=-1)
        matches.append(bool(torch.allclose(mean, unit, atol=1e-5)))
    assert sum(matches) == 1
    assert not torch.equal(shuffled, shuffled_shift(plain, prompted, real, seed=5))
    with pytest.raises(WorkbenchError, match="at least two"):
        shuffled_shift(plain[:1], prompted[:1], real, seed=0)


def test_control_directions() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(8, 2, 4, generator=generator)
    positive = torch.tensor([True] * 4 + [False] * 4)
    sites = (Site(0), Site(1))
    real = mean_difference_directions(
        values[positive], values[~positive], concept="awareness", source="s", read_at="last_instruction", sites=sites
    )
    shuffled = shuffled_classes(values, positive, real, seed=0)
    assert shuffled.provenance["n_positive"] == shuffled.provenance["n_negative"] == 4
    assert not torch.allclose(shuffled.unit, real.unit)
    like = SteeringVector((1, 0), torch.tensor([[3.0, 0, 0, 0], [0, 0, 5.0, 0]]))
    vector = along(real, like, "refusal")
    assert torch.allclose(vector.values[0], 3.0 * real.unit[1], atol=1e-6)
    assert torch.allclose(vector.values[1], 5.0 * real.unit[0], atol=1e-6)


def test_written_interventions_are_kept_as_they_are() -> None:
    arm = {"name": "ablate", "interventions": [{"operator": "ablate", "directions": "refusal", "layers": "all"}]}
    planned = plan_arms(ExperimentConfig.parse(settings(arms=["vanilla", arm])))[1]
    assert planned.specs == (InterventionSpec(operator="ablate", directions="refusal", layers="all"),)
    assert planned.source_names == ("refusal",)
