"""Paths that begin with a user's home folder."""

from __future__ import annotations

from pathlib import Path

from alignlab.errors import ConfigError


def with_home(path: str | Path) -> Path:
    """Return a path in which `~`, or `~name`, is the home folder that it stands for.

    Raises:
        ConfigError: there is no such user, or it is not known where the home folder is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path} must begin with the home folder of a user of this machine, and none is known; write the whole "
            "path, or set HOME"
        ) from error
