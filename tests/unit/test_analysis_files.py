"""What results are written with: atomic files, run directories that resume, progress."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pandas as pd
import pytest
import torch

from sgworkbench.errors import WorkbenchError, require_type, unknown_name
from sgworkbench.progress import ConsoleProgress, silent
from sgworkbench.runs import RunDirectory, config_hash, environment
from sgworkbench.tensor_files import atomic_path, read_tensors, write_tensors, write_text


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "a.txt"
    write_text(file, "old ü")
    assert file.read_text(encoding="utf-8") == "old ü"

    def interrupted() -> None:
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            assert temporary.parent == file.parent
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text(encoding="utf-8") == "old ü"
    assert names(tmp_path) == ["deep/er/a.txt"]


def test_results_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "x")
    (tmp_path / "b.txt").write_text("x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == stat.S_IMODE((tmp_path / "b.txt").stat().st_mode)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "a.txt", tmp_path, Path("/proc/none/a.txt")):
        with pytest.raises(WorkbenchError, match=f"Cannot write '{target}': "):
            write_text(target, "x")


def test_tensors_of_any_layout_survive(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": base.T, "same": base, "part": base[:, 1:3], "shared": base.view(-1)[:4]}
    write_tensors(tmp_path / "t.safetensors", tensors, {"format": "f", "é": "🙂"})
    found, metadata = read_tensors(tmp_path / "t.safetensors", "f", ("same",))
    assert metadata == {"format": "f", "é": "🙂"}
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


CONFIG = {"model": "demo", "layers": [1, 2], "alpha": 0.5}


def test_a_run_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute() -> pd.DataFrame:
        calls.append("x")
        return pd.DataFrame({"id": ["a", "b"], "refused": [True, None]})

    first = RunDirectory.open(tmp_path / "run", CONFIG).table("answers", compute)
    again = RunDirectory.open(tmp_path / "run", dict(reversed(CONFIG.items()))).table("answers", compute)
    pd.testing.assert_frame_equal(first, again)
    assert calls == ["x"]
    assert first["refused"].tolist() == [True, None]


def test_an_interrupted_stage_leaves_nothing_and_is_made_again(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, CONFIG)

    def interrupted() -> pd.DataFrame:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.table("answers", interrupted)
    assert names(tmp_path) == ["config.json"]
    assert len(run.table("answers", lambda: pd.DataFrame({"a": [1]}))) == 1


def test_an_error_inside_a_stage_is_not_reported_as_an_error_of_writing(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, CONFIG)

    def offline() -> pd.DataFrame:
        raise ConnectionError("judge unreachable")

    with pytest.raises(ConnectionError, match="judge unreachable"):
        run.table("answers", offline)


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, CONFIG).table("answers", lambda: pd.DataFrame({"a": [1]}))
    changed = CONFIG | {"alpha": 0.7, "seed": 1}
    with pytest.raises(WorkbenchError, match=r"other settings \(changed: alpha, seed\); choose another folder .*--out"):
        RunDirectory.open(tmp_path, changed)
    run = RunDirectory.open(tmp_path, changed, overwrite=True)
    assert run.table("answers", lambda: pd.DataFrame({"a": [2]}))["a"].tolist() == [2]
    assert json.loads((tmp_path / "config.json").read_text()) == changed


def test_damaged_runs_are_named(tmp_path: Path) -> None:
    for content in ("{", "[1]", "\udcff"):
        (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(WorkbenchError, match=r"config\.json' is damaged; remove the folder or choose another"):
            RunDirectory.open(tmp_path, CONFIG)
    (tmp_path / "config.json").unlink()
    run = RunDirectory.open(tmp_path, CONFIG)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "answers.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(WorkbenchError, match=r"answers\.parquet' is damaged \(.+\); remove it and run again"):
        run.table("answers", lambda: pd.DataFrame({"a": [1]}))
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkbenchError, match="Expected a folder for the run, found the file"):
        RunDirectory.open(tmp_path / "file", CONFIG)


def test_a_configuration_counts_as_json_sees_it(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, {"layers": (1, 2), "path": Path("x"), "none": None})
    assert run.config == {"layers": [1, 2], "path": "x", "none": None}
    RunDirectory.open(tmp_path, {"none": None, "path": "x", "layers": [1, 2]})
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1, "b": 3})


def test_the_manifest_says_with_what_it_was_made(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, CONFIG)
    run.write_manifest({"seed": 7, "model": {"name": "demo"}})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["packages"]["torch"] == torch.__version__.split("+")[0] or manifest["packages"]["torch"]
    assert manifest["config_sha256"] == config_hash(CONFIG)
    assert manifest["seed"] == 7
    assert {"created", "command", "python", "platform", "threads"} <= set(manifest)
    assert set(environment()["packages"]) >= {"transformers", "transformer-lens", "numpy"}


def test_progress_goes_to_standard_error_first_and_last_step_always(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress() as progress:
        for done in range(101):
            progress("reading", done, 100)
        progress.note("a note")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("reading: 0/100")
    assert lines[-2].startswith("reading: 100/100")
    assert lines[-1] == "a note"
    assert len(lines) < 20
    with ConsoleProgress(quiet=True) as progress:
        progress("reading", 0, 1)
        progress.note("nothing")
    silent("reading", 0, 1)
    assert capsys.readouterr().err == ""


def test_errors_suggest_the_nearest_name() -> None:
    known = ["same-site", "official"]
    assert str(unknown_name("protocol", "oficial", known)) == (
        "Unknown protocol 'oficial'. Did you mean 'official'? Known: official, same-site."
    )
    assert str(unknown_name("protocol", "xyz", known)) == "Unknown protocol 'xyz'. Known: official, same-site."


def test_a_wrong_type_is_named_with_advice() -> None:
    require_type(3, int, "a number", "x")
    require_type(None, (int, type(None)), "a number", "x")
    with pytest.raises(WorkbenchError, match=r"^Expected a number, found list; write one down\.$"):
        require_type([3], int, "a number", "write one down")
