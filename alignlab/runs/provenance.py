"""Record of a start: the time, the process and its command, the versions of packages and the commit of the sources."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import alignlab
from alignlab.runs.lock import identity_of_process

PACKAGES = ("alignlab", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def timestamp() -> str:
    """Return the local time with its offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def start_record(resume: bool) -> dict[str, Any]:
    """Return the record of a start: the process, its command and the versions of packages."""
    return {
        "time": timestamp(),
        "resume": resume,
        **identity_of_process(),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": source_commit(Path(alignlab.__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_commit(folder: Path) -> str | None:
    """Return the git commit of the sources in a folder, with "-dirty" if tracked files were changed.

    None if git does not track the folder: an installed package may lie inside the repository of another project.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "describe", "--always", "--abbrev=40", "--exclude=*")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")  # `describe --dirty` locks the index
    return None if commit is None or changed is None else f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None if it fails or there is no git."""
    try:
        result = subprocess.run(  # without locks, which would stay if this process were killed
            ["git", "--no-optional-locks", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
