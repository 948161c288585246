"""The power goes: each content that the disk may have then is gone on with, and no step is lost that was synced.

The states come from the log of a whole run, see `power_model`. A step was promised once its checkpoint has its name and
something later has begun.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.faults import runs
from tests.faults.attack import Outcome, outcome_of_resumption, parts
from tests.faults.lab import Lab
from tests.faults.operations import Operation
from tests.faults.power_model import Disk, shape_of

KIND, POINTS = "power", 40
SUBJECTS = tuple(runs.RUNS)


def cases(lab: Lab, subject: str) -> list[str]:
    """Each state after each operation; a state that is the same as one before it counts once."""
    found, known = [], set()
    for at, number, content in _states(lab, subject):
        shape = shape_of(content)
        if shape not in known:
            known.add(shape)
            found.append(f"{KIND}:{subject}:{at}/{number}")
    return found


def attempt(lab: Lab, case: str) -> Outcome:
    """Bring the disk into one state, and go on."""
    subject, how = parts(case)
    at, number = map(int, how.split("/"))
    operations = lab.log_of(subject)
    content = next(state for place, count, state in _states(lab, subject, at) if (place, count) == (at, number))
    shutil.rmtree(lab.root)
    for path, data in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    promised, there = _promised(operations[:at]), _newest(lab.root)
    if there < promised:
        return Outcome(case, "silent", f"step {promised} was saved, and the newest that is there is {there}")
    return outcome_of_resumption(lab, case, subject)


def _states(lab: Lab, subject: str, only: int | None = None):  # type: ignore[no-untyped-def]
    """(operations done, number of the state, content by path), in order."""
    operations = lab.log_of(subject)
    lab.clear()
    start = {path: path.read_bytes() for path in lab.root.rglob("*") if path.is_file()}
    disk = Disk(lab.root, start)
    for at, operation in enumerate(operations, start=1):
        disk.do(operation)
        if only is None or at == only:
            for number, content in enumerate(disk.states()):
                yield at, number, content


def _promised(done: list[Operation]) -> int:
    """The newest step that the run had saved, and had gone on from."""
    promised = 0
    named: int | None = None
    for operation in done:
        if named is not None and operation.name == "write" and "checkpoints" not in operation.path.parts:
            promised = named
        step = _step_of(operation.other) if operation.name == "rename" and operation.other else None
        named = named if step is None else step
    return promised


def _newest(root: Path) -> int:
    steps = [_step_of(path) for path in root.glob("run/**/checkpoints/step-*")]
    return max((step for step in steps if step is not None), default=0)


def _step_of(path: Path) -> int | None:
    number = path.name.removeprefix("step-")
    return int(number) if path.parent.name == "checkpoints" and number.isdigit() else None
