"""The project's own files agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)


def test_environment_defers_to_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, installs = environment["dependencies"]
    assert python == f"python{PYPROJECT['project']['requires-python']}"
    assert pip == "pip"
    assert installs == {"pip": ["-c constraints.txt", "-e .[dev]"]}


def test_every_requirement_is_pinned_within_its_range() -> None:
    from packaging.requirements import Requirement

    extras = PYPROJECT["project"]["optional-dependencies"]
    stated = [*PYPROJECT["project"]["dependencies"], *(r for extra in extras.values() for r in extra)]
    for text in stated:
        requirement = Requirement(text)
        if requirement.name == "sgworkbench":
            assert requirement.extras <= set(extras)
            continue
        pinned = pins()[requirement.name.lower()]
        assert requirement.specifier.contains(pinned), (text, pinned)


def test_torch_is_pinned_to_the_tested_release() -> None:
    assert pins()["torch"] == "2.13.0"
    assert "transformer-lens>=3.9,<4" in PYPROJECT["project"]["dependencies"]


def test_readme_starts_with_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.search(r"```bash\n(.*?)```", readme, re.S)
    assert commands is not None
    assert re.findall(r"^make \w+", commands[1], re.M) == ["make demo", "make test"]


def test_rooms_import_only_from_their_left() -> None:
    """Data flows left to right (prompting to reporting); imports inside functions are conveniences and do not count."""
    rooms = ["prompting", "analysis", "steering", "evaluation", "plotting", "reporting"]
    for index, room in enumerate(rooms):
        for file in (ROOT / "sgworkbench" / room).rglob("*.py"):
            body = file.read_text(encoding="utf-8").split("if TYPE_CHECKING:")
            top = body[0] + "".join(re.split(r"\n(?=\S)", part, maxsplit=1)[-1] for part in body[1:])
            for found in re.findall(r"^from sgworkbench\.(\w+)", top, re.M):
                assert found not in rooms[index + 1 :], f"{file.name} in {room} imports from {found}"
