"""What may be on a disk after a crash, by hand: of files written, synced and renamed in each order."""

from __future__ import annotations

from pathlib import Path

from tests.faults.operations import Operation
from tests.faults.power_model import Disk

ROOT = Path("/root")
OLD, NEW, TEMPORARY = b"old!", b"newer", ROOT / ".a.tmp"
FILE = ROOT / "a"


def contents(*operations: tuple[str, Path] | tuple[str, Path, object]) -> set[bytes | None]:
    """What the file `a` may hold after these operations, None for nothing of that name."""
    disk = Disk(ROOT, {FILE: OLD})
    for number, (name, path, *rest) in enumerate(operations, start=1):
        other = rest[0] if rest and isinstance(rest[0], Path) else None
        data = rest[0] if rest and isinstance(rest[0], bytes) else b""
        disk.do(Operation(number, name, path, other, 0, data))
    return {state.get(FILE) for state in disk.states()}


def test_a_file_that_is_replaced_in_order_is_old_or_new() -> None:
    steps = [("create", TEMPORARY), ("write", TEMPORARY, NEW), ("sync", TEMPORARY), ("rename", TEMPORARY, FILE)]
    assert contents(*steps) == {OLD, NEW}
    assert contents(*steps, ("sync", ROOT)) == {NEW}


def test_a_file_that_is_renamed_before_it_is_synced_may_be_anything() -> None:
    steps = [("create", TEMPORARY), ("write", TEMPORARY, NEW), ("rename", TEMPORARY, FILE), ("sync", ROOT)]
    assert contents(*steps) == {b"", NEW, NEW[:2], bytes(5)}


def test_a_file_that_is_written_in_place_may_be_half_there() -> None:
    assert contents(("truncate", FILE), ("write", FILE, NEW)) == {OLD, NEW, b"", NEW[:2], OLD + b"\0"}


def test_lines_that_are_added_are_lost_until_they_are_synced() -> None:
    line = ("write", FILE, OLD + b"more")
    assert OLD in contents(line) and OLD + b"mo" in contents(line)
    assert contents(line, ("sync", FILE)) == {OLD + b"more"}


def test_a_removed_file_may_come_back() -> None:
    assert contents(("unlink", FILE)) == {None, OLD}
    assert contents(("unlink", FILE), ("sync", ROOT)) == {None}


def test_a_new_folder_is_there_when_the_one_around_it_was_synced() -> None:
    inside = ROOT / "folder" / "b"
    disk = Disk(ROOT, {})
    steps = [
        Operation(1, "mkdir", inside.parent), Operation(2, "create", inside), Operation(3, "write", inside, data=NEW),
        Operation(4, "sync", inside), Operation(5, "sync", inside.parent),
    ]  # fmt: skip
    for step in steps:
        disk.do(step)
    assert {} in list(disk.states())
    disk.do(Operation(6, "sync", ROOT))
    assert list(disk.states()) == [{inside: NEW}]


def test_two_folders_that_are_exchanged_are_both_there_in_one_order_or_the_other() -> None:
    one, other = ROOT / "one", ROOT / "other"
    disk = Disk(ROOT, {one / "b": OLD, other / "b": NEW})
    disk.do(Operation(1, "exchange", one, other))
    assert list(disk.states()) == [{one / "b": NEW, other / "b": OLD}, {one / "b": OLD, other / "b": NEW}]
    disk.do(Operation(2, "sync", ROOT))
    assert list(disk.states()) == [{one / "b": NEW, other / "b": OLD}]


def test_a_folder_that_is_renamed_takes_its_files_along() -> None:
    old, new = ROOT / ".folder.tmp", ROOT / "folder"
    disk = Disk(ROOT, {old / "b": OLD})
    disk.do(Operation(1, "rename", old, new))
    assert list(disk.states()) == [{new / "b": OLD}, {old / "b": OLD}]
    disk.do(Operation(2, "write", new / "b", data=NEW))
    disk.do(Operation(3, "sync", new / "b"))
    disk.do(Operation(4, "sync", ROOT))
    assert list(disk.states()) == [{new / "b": NEW}]
