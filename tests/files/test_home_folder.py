"""Paths that begin with a user's home folder."""

from pathlib import Path

import pytest

from alignlab.config.trainers import SFTConfig
from alignlab.errors import ConfigError
from alignlab.files.home_folder import with_home


def test_the_home_folder_of_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert with_home("~/run") == Path("/somewhere/run")
    for make in (with_home, lambda path: SFTConfig(output_dir=path)):
        with pytest.raises(ConfigError, match="~no-such-user/run must begin with the home folder of a user"):
            make("~no-such-user/run")
