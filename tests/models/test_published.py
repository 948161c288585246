"""A saved model replaces the one before it only once it is complete."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignlab.files.manifest import find_damage, read_manifest
from alignlab.models.hub import saving
from alignlab.models.hub.saving import published


def save(folder: Path, text: str) -> None:
    with published(folder, run_id="a" * 32) as unfinished:
        (unfinished / "config.json").write_text(text)


def test_a_model_is_published_with_its_manifest(tmp_path: Path) -> None:
    for text in ("one", "two"):
        save(tmp_path / "model", text)
        assert (tmp_path / "model" / "config.json").read_text() == text
        assert find_damage(tmp_path / "model") is None
        assert read_manifest(tmp_path / "model")["run"] == "a" * 32
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    save(tmp_path / "model", "one")
    with pytest.raises(OSError, match="disk full"), published(tmp_path / "model") as unfinished:
        (unfinished / "config.json").write_text("tw")
        raise OSError("disk full")
    assert (tmp_path / "model" / "config.json").read_text() == "one"
    assert find_damage(tmp_path / "model") is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left over"


@pytest.mark.parametrize("was_there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(was_there: bool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    if was_there:
        save(tmp_path / "disk" / "model", "one")
    (tmp_path / "run" / "model").symlink_to("../disk/model")
    save(tmp_path / "run" / "model", "two")
    assert (tmp_path / "run" / "model").is_symlink()
    assert (tmp_path / "disk" / "model" / "config.json").read_text() == "two"
    assert [path.name for path in (*(tmp_path / "run").iterdir(), *(tmp_path / "disk").iterdir())] == ["model"] * 2


def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder may be one that cannot be replaced, such as a mount point."""
    (tmp_path / "plain").mkdir()
    save(tmp_path / "plain", "one")
    assert find_damage(tmp_path / "plain") is None
    place = tmp_path / "mounted"
    place.mkdir()
    inode = place.stat().st_ino
    monkeypatch.setattr(saving.os, "access", lambda path, mode: os.fspath(path) != str(tmp_path))
    save(place, "one")
    assert find_damage(place) is None and place.stat().st_ino == inode
