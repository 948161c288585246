"""Paths on the command line: `~` in them, and places that a command may write to without overwriting anything."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from alignlab.errors import ConfigError
from alignlab.files.home_folder import with_home

_PATHS = (
    "adapter", "calibrate", "config", "data", "model", "output", "pairs", "perplexity", "plot", "pool", "teacher",
    "write_examples",
)  # fmt: skip


def expand_home(args: argparse.Namespace) -> None:
    """Replace a leading `~` in the arguments that are paths: in quotes, or behind `=`, the shell leaves it.

    Raises:
        ConfigError: see `with_home`.
    """
    for name in _PATHS:
        value = getattr(args, name, None)
        if value is not None and str(value).startswith("~"):
            setattr(args, name, type(value)(with_home(value)))


def new_folder(path: str) -> Path:
    """Return OUTPUT as a path, after checking that nothing is there but an empty folder.

    Raises:
        ConfigError: a file, a link that leads to nothing, or a folder with files is there.
    """
    folder = Path(path)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"OUTPUT must be a new or empty folder, and {folder} is {_kind(folder)}; choose another one")
    return folder


def new_file(path: str, flag: str) -> Path:
    """Return the path of a flag, after checking that nothing is there.

    Raises:
        ConfigError: something is there, be it a link that leads to nothing.
    """
    file = Path(path)
    if os.path.lexists(file):
        raise ConfigError(
            f"{flag} must be a new file, and {file} is {_kind(file)}, which is not overwritten; remove it, or choose "
            "another one"
        )
    return file


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder that is not empty" if any(path.iterdir()) else "a folder"
    return "a file" if path.exists() else "a link that leads to nothing"
