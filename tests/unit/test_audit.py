"""The audit says what the hooks do: known indices by hand, and a changed hook changes the audit."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import QWEN3_THINKING
from torch import Tensor
from typer.testing import CliRunner

from sgworkbench.analysis import Site
from sgworkbench.cli import app
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import LoadedModel
from sgworkbench.prompting import PRESETS, PromptSet, Renderer
from sgworkbench.prompting.token_batch import TokenBatch
from sgworkbench.steering import Selector, SteeringVector
from sgworkbench.steering.audit import Audit, audit

PROMPT = "Why is the sky blue?"
REMINDER = PRESETS["self-reminder"]
PROMPTS = PromptSet.from_texts([PROMPT, "How do I bake a loaf of bread at home?"], label="harmful")


@pytest.fixture(scope="module")
def qwen(tiny_model: Callable[..., LoadedModel]) -> tuple[LoadedModel, Renderer]:
    loaded = tiny_model("qwen3", chat_template=QWEN3_THINKING)
    return loaded, Renderer(loaded.tokenizer)


def vector_of(qwen: tuple[LoadedModel, Renderer], protocol: str = "same-site") -> SteeringVector:
    return SteeringVector.extract(*qwen, PROMPTS, REMINDER, protocol)


def by_hand(loaded: LoadedModel) -> dict[str, list[int]]:
    """Token ids of both renderings by the tokenizer's own template."""
    system = {"role": "system", "content": REMINDER.system}
    messages = {
        "prompted": [system, {"role": "user", "content": PROMPT + REMINDER.suffix}],
        "plain": [{"role": "user", "content": PROMPT}],
    }
    texts = {
        name: loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for name, turns in messages.items()
    }
    return {name: loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}


class TestReads:
    @pytest.mark.parametrize("protocol", ["same-site", "official"])
    def test_the_last_token_of_both_renderings(self, qwen: tuple[LoadedModel, Renderer], protocol: str) -> None:
        reads = audit(*qwen, vector_of(qwen, protocol), PROMPT, layers="0-2").reads
        assert len(reads) == 6
        for name, ids in by_hand(qwen[0]).items():
            mine = reads[reads["rendering"] == name]
            assert set(mine["index"]) == {len(ids) - 1}
            assert set(mine["token_id"]) == {ids[-1]}
            assert set(mine["role"]) == {"template"}
            assert list(mine["site"]) == ["resid_post[0]", "resid_post[1]", "resid_post[2]"]
            assert list(mine["hook_name"]) == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
            assert mine["hidden_states_index"].fillna(-1).tolist() == [1, 2, -1]
            assert mine["svec_key"].fillna("-").tolist() == ["0", "1", "-"]
        assert reads["mismatch"].max() < 1e-3

    def test_a_pad_under_the_padded_protocol(self, qwen: tuple[LoadedModel, Renderer]) -> None:
        found = audit(*qwen, vector_of(qwen, "official-padded"), PROMPT, layers=1)
        prompted, plain = found.reads.to_dict("records")
        last = len(by_hand(qwen[0])["prompted"]) - 1
        assert (prompted["index"], prompted["role"]) == (last, "template")
        assert (plain["index"], plain["role"]) == (last, "pad")
        assert any("A pad was read (plain)" in note for note in found.notes)

    def test_a_prefilled_thought_is_read_at_its_end(self, qwen: tuple[LoadedModel, Renderer]) -> None:
        condition = PRESETS["thinking-intervention"]
        vector = SteeringVector.extract(*qwen, PROMPTS, condition)
        reads = audit(*qwen, vector, PROMPT, layers=1).reads.set_index("rendering")
        assert reads.loc["prompted", "role"] == "prefill"
        assert reads.loc["plain", "role"] == "template"
        assert reads.loc["prompted", "index"] > reads.loc["plain", "index"]


class TestWrites:
    def test_every_token_at_every_steered_layer(self, qwen: tuple[LoadedModel, Renderer]) -> None:
        vector = vector_of(qwen)
        found = audit(*qwen, vector, PROMPT, layers=[0, 2], alpha=0.5, n_decode=3)
        ids = by_hand(qwen[0])["prompted"]
        assert found.n_tokens == {"prefill": len(ids), "decode": 3}
        for layer in (0, 2):
            mine = found.writes[found.writes["layer"] == layer]
            assert mine["index"].tolist() == list(range(len(ids) + 3))
            assert mine["token_id"].tolist()[: len(ids)] == ids
            assert mine["phase"].tolist() == ["prefill"] * len(ids) + ["decode"] * 3
            assert set(mine["site"]) == {f"resid_post[{layer}]"}
            np.testing.assert_allclose(mine["added_norm"], 0.5 * float(vector.at(layer).norm()), rtol=1e-4)
            np.testing.assert_allclose(mine["coefficient"], 0.5, rtol=1e-4)
        assert not any("not where it was read" in note for note in found.notes)

    @pytest.mark.parametrize("protocol", ["official", "official-padded"])
    def test_one_block_before_it_was_read(self, qwen: tuple[LoadedModel, Renderer], protocol: str) -> None:
        found = audit(*qwen, vector_of(qwen, protocol), PROMPT, layers=2, arm="steered")
        assert set(found.writes["site"]) == {"resid_pre[2]"}
        assert set(found.writes["hidden_states_index"]) == {2}
        assert set(found.writes["svec_key"]) == {"1"}
        assert found.n_tokens["prefill"] == len(by_hand(qwen[0])["plain"])
        assert any("resid_post[2] and is written to resid_pre[2], the output of block 1" in n for n in found.notes)

    def test_selectors(self, qwen: tuple[LoadedModel, Renderer]) -> None:
        vector = vector_of(qwen)
        few = audit(*qwen, vector, PROMPT, layers=1, selector=Selector("positions", positions=(1, 4)))
        assert few.writes["index"].tolist() == [1, 4]
        assert any("In decode, 0 of 3 tokens are written" in note for note in few.notes)
        instruction = audit(*qwen, vector, PROMPT, layers=1, selector=Selector("instruction"))
        assert "".join(instruction.writes["token"]).strip() == PROMPT
        generated = audit(*qwen, vector, PROMPT, layers=1, selector=Selector("generated", phases=("decode",)))
        assert set(generated.writes["phase"]) == {"decode"}
        assert set(generated.writes["role"]) <= {"reasoning", "answer"}


class TestItIsRecordedNotRetold:
    def test_a_selector_that_does_otherwise_shows(
        self, qwen: tuple[LoadedModel, Renderer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def only_third(_self: Selector, batch: TokenBatch | None) -> Tensor:
            assert batch is not None
            return batch.positions == 2

        monkeypatch.setattr(Selector, "mask", only_third)
        assert audit(*qwen, vector_of(qwen), PROMPT, layers=1).writes["index"].tolist() == [2]

    def test_a_vector_written_elsewhere_shows(
        self, qwen: tuple[LoadedModel, Renderer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vector = vector_of(qwen)
        monkeypatch.setattr(SteeringVector, "write_site", lambda _self, layer: Site(layer - 1, "resid_mid"))
        found = audit(*qwen, vector, PROMPT, layers=2)
        assert set(found.writes["site"]) == {"resid_mid[1]"}
        assert found.writes["hidden_states_index"].isna().all()

    def test_a_reading_from_another_token_shows(
        self, qwen: tuple[LoadedModel, Renderer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vector = vector_of(qwen)
        # The package exports a function of the same name as the module.
        capture = importlib.import_module("sgworkbench.analysis.capture")
        monkeypatch.setitem(capture._SINGLE, "last_prompt", lambda item: item.last_instruction_position)
        reads = audit(*qwen, vector, PROMPT, layers=1).reads
        assert set(reads["role"]) == {"instruction"}

    def test_the_model_is_left_as_it_was(self, qwen: tuple[LoadedModel, Renderer]) -> None:
        before = {name: len(point._forward_hooks) for name, point in qwen[0].model.hook_dict.items()}
        audit(*qwen, vector_of(qwen, "official-padded"), PROMPT, layers=1)
        assert {name: len(point._forward_hooks) for name, point in qwen[0].model.hook_dict.items()} == before


class TestTheResult:
    def test_tables_and_page(self, qwen: tuple[LoadedModel, Renderer]) -> None:
        found = audit(*qwen, vector_of(qwen), "Is 1 < 2?", layers=[0, 1])
        frame = found.to_dataframe()
        assert (frame["action"] == "read").sum() == 4
        assert (frame["action"] == "write").sum() == len(found.writes)
        merged = found.by_token()
        assert len(merged) == sum(found.n_tokens.values())
        assert set(merged["sites"]) == {"resid_post[0], resid_post[1]"}
        page = found._repr_html_()
        assert "resid_post[0], resid_post[1]" in page
        assert " < 2" not in page
        assert json.loads(json.dumps(found.to_dict()))["reads"][0]["site"] == "resid_post[0]"

    def test_wrong_requests(self, qwen: tuple[LoadedModel, Renderer]) -> None:
        vector = vector_of(qwen)
        for options, message in (
            ({"layers": 1, "arm": "bth"}, "Unknown arm 'bth'. Did you mean 'both'"),
            ({"layers": 1, "alpha": 0.0}, "coefficient other than 0"),
            ({"layers": 1, "n_decode": 0}, "at least one decode step"),
            ({"layers": 7}, "Layer 7 is outside the model"),
        ):
            with pytest.raises(WorkbenchError, match=message):
                audit(*qwen, vector, PROMPT, **options)  # type: ignore[arg-type]
        nameless = SteeringVector(vector.layers, vector.values)
        with pytest.raises(WorkbenchError, match="does not record the safety prompt"):
            audit(*qwen, nameless, PROMPT, layers=1)
        assert isinstance(audit(*qwen, nameless, PROMPT, layers=1, condition=REMINDER), Audit)


def test_command(qwen: tuple[LoadedModel, Renderer], tmp_path: Path) -> None:
    file = tmp_path / "v.safetensors"
    vector_of(qwen).save(file)
    arguments = ["audit", "--vector", str(file), "--prompt", PROMPT, "--model", str(qwen[0].folder), "-q"]
    run = CliRunner().invoke(app, [*arguments, "--layers", "1-2", "--protocol", "official", "--alpha", "0.5", "--json"])
    assert run.exit_code == 0, run.output
    summary = json.loads(run.stdout)
    assert {row["site"] for row in summary["writes"]} == {"resid_pre[1]", "resid_pre[2]"}
    assert summary["layers"] == [1, 2]
    wide = CliRunner(env={"COLUMNS": "160"})
    shown = wide.invoke(app, [*arguments, "--layers", "1", "--condition", "self-reminder-ai"])
    assert shown.exit_code == 0, shown.output
    assert "resid_post[1]" in shown.stdout
    assert "blocks.1.hook_resid_post" in shown.stdout
    assert "The vector was made with self-reminder, the audit uses self-reminder-ai" in " ".join(shown.stdout.split())
    failed = CliRunner().invoke(app, [*arguments, "--layers", "1", "--protocol", "official-padded"])
    assert failed.exit_code == 2
    assert "cannot become 'official-padded'" in failed.stderr
