"""Folders are replaced whole, and their manifests know what was changed in them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.files import atomic_files
from alignlab.files.atomic_files import (
    publish_folder,
    recover_folder,
    remove,
    remove_folder,
    replacing,
    write_atomically,
)
from alignlab.files.digests import json_digest
from alignlab.files.manifest import MODEL_MANIFEST, find_damage, has_manifest, read_manifest, write_manifest

OLD, NEW = {"a": "old", "only/old": "x"}, {"a": "new"}


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["exchange", "two renames"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can exchange two names at once."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic_files, "_exchange", lambda one, other: False)
    return bool(request.param == "exchange")


def test_publishing_replaces_an_earlier_folder(tmp_path: Path, exchanges: bool) -> None:
    place = tmp_path / "model"
    publish_folder(fill(tmp_path / ".model.tmp", OLD), place)
    assert content(place) == OLD
    publish_folder(fill(tmp_path / ".model.tmp", NEW), place)
    assert content(place) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("at", range(1, 12))
def test_a_kill_at_any_operation_leaves_one_of_the_two_folders_whole(
    tmp_path: Path, exchanges: bool, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = fill(tmp_path / "model", OLD)
    new = fill(tmp_path / ".model.tmp", NEW)
    operations: list[str] = []

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def kill_or_do(*args: Any, **options: Any) -> Any:
            operations.append(function.__name__)
            if len(operations) == at:
                raise Killed
            return function(*args, **options)

        return kill_or_do

    with monkeypatch.context() as patched:
        for module, name in ((os, "replace"), (atomic_files, "_exchange"), (atomic_files.shutil, "rmtree"),
                             (atomic_files, "sync_file")):
            patched.setattr(module, name, killing(getattr(module, name)))
        with contextlib.suppress(Killed):
            publish_folder(new, place)
    if exchanges:
        assert content(place) in (OLD, NEW), "at no time is there none"
    recover_folder(place)
    assert content(place) in (OLD, NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_removal_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(path: Path) -> None:
        raise Killed

    monkeypatch.setattr(atomic_files.shutil, "rmtree", cut_short)
    with pytest.raises(Killed):
        remove_folder(fill(tmp_path / "step", OLD))
    assert not (tmp_path / "step").exists()


def test_a_manifest_lists_every_file(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", OLD)
    assert not has_manifest(folder)
    write_manifest(folder, run_id="a" * 32, entries={"step": 3})
    manifest = read_manifest(folder)
    assert manifest["run"] == "a" * 32 and manifest["step"] == 3
    assert manifest["files"].keys() == OLD.keys()
    assert find_damage(folder) is None
    (folder / "README.md").write_text("of the user's own")
    assert find_damage(folder) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "only/old").unlink(), "only/old is missing"),
        (lambda folder: (folder / "a").write_text("older"), "a has 5 bytes and was written with 3"),
        (lambda folder: (folder / "a").write_text("odd"), "a is damaged: its SHA-256 is not the one"),
        (lambda folder: (folder / MODEL_MANIFEST).unlink(), "cannot be read"),
        (lambda folder: (folder / MODEL_MANIFEST).write_text("{"), "cannot be read"),
        (lambda folder: (folder / MODEL_MANIFEST).write_text("[" * 100_000), "cannot be read"),
    ],
)
def test_a_changed_file_in_a_folder_is_detected(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    folder = fill(tmp_path / "model", OLD)
    write_manifest(folder)
    spoil(folder)
    assert message in str(find_damage(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "has format 99, and this version reads"),
        ({"run": "b"}, "is damaged: its SHA-256"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": "a"}}}, "is damaged: its SHA-256"),
    ],
)
def test_a_changed_manifest_is_detected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = fill(tmp_path / "model", OLD)
    write_manifest(folder)
    file = folder / MODEL_MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert message in str(find_damage(folder))


@pytest.mark.parametrize("entry", [{"../a": {"bytes": 1, "sha256": ""}}, {"/a": {"bytes": 1, "sha256": ""}}, {"a": 3}])
def test_a_manifest_of_an_unknown_format_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    from alignlab.files import manifest

    folder = fill(tmp_path / "model", OLD)
    entries = {"format": manifest.FORMAT, "run": None, "files": entry}
    (folder / MODEL_MANIFEST).write_text(json.dumps(entries | {"sha256": json_digest(entries)}))
    assert "has an entry that no version writes" in str(find_damage(folder))


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    folder = fill(tmp_path / "disk", OLD)
    (tmp_path / "link").symlink_to("disk")
    remove_folder(tmp_path / "link")
    assert content(folder) == OLD and [path.name for path in tmp_path.iterdir()] == ["disk"]
    remove(folder)
    remove(folder)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fails", ["write", "sync", "rename"])
def test_a_file_that_cannot_be_replaced_is_as_it_was_and_nothing_is_left_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    place = tmp_path / "state.json"
    write_atomically(place, "old")
    name = {"sync": "fsync", "rename": "replace"}.get(fails)
    if name is not None:
        monkeypatch.setattr(os, name, lambda *arguments: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), replacing(place) as temporary:
        temporary.write_text("new")
        if fails == "write":
            raise OSError(errno.EIO, "broken")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("state.json", "old")]
