"""New folders are on the disk with what is in them, and removed ones are gone before what is in them is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignlab.files import atomic_files
from alignlab.files.atomic_files import make_folder, remove_folder


def test_names_of_new_folders_are_synced_from_the_outermost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(atomic_files, "sync_file", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    assert (tmp_path / "a" / "b" / "c").is_dir()
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(OSError, match="a"):
        make_folder(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_is_renamed_before_its_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_filled(tmp_path / "a")
    seen: list[tuple[bool, list[str]]] = []

    def look(path: Path) -> None:
        assert path == tmp_path
        seen.append((folder.exists(), [file.name for file in tmp_path.rglob("file")]))

    monkeypatch.setattr(atomic_files, "sync_file", look)
    remove_folder(folder)
    assert seen == [(False, ["file"])] and os.listdir(tmp_path) == []


def make_filled(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file").write_text("x")
    return folder
