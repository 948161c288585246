"""Disks that are full or break: the run ends with an error that says where, loses no checkpoint, and goes on later."""

from __future__ import annotations

import re

from tests.faults import runs
from tests.faults.attack import Outcome, outcome_of_difference, outcome_of_resumption, parts, verdict_of_failure
from tests.faults.lab import Ending, Lab
from tests.faults.operations import ERRORS, Plan

KIND, POINTS = "disk", 25
SUBJECTS = (*runs.RUNS, "grpo@2", "sft@2", "dpo@2")
_LIMITS = (1, 100, 1_000, 3_000, 5_000, 8_000, 12_000, 20_000, 30_000, 50_000, 70_000, 100_000)
"""Largest size of a file, in bytes: of the tiny runs' files some are above each."""


def cases(lab: Lab, subject: str) -> list[str]:
    """Each kind of error at each operation, alone or from there on; and limits of a file's size."""
    number = max(operation.number for operation in lab.log_of(subject))
    failing = [
        f"{KIND}:{subject}:{error}/{mode}/{at}"
        for error in ERRORS for mode in ("fail_once", "fail_from") for at in range(1, number + 1)
    ]
    return failing + [f"{KIND}:{subject}:limit/{size}" for size in _LIMITS]


def attempt(lab: Lab, case: str) -> Outcome:
    """Let operations fail, look at what is left, and go on with a disk that works."""
    subject, how = parts(case)
    lab.reference(subject)
    lab.clear()
    endings = lab.train(subject, plan=_plan(how), grace_s=20.0)
    if all(ending.is_done for ending in endings):
        return outcome_of_difference(lab, case, lab.unlike(subject))  # what failed is not needed, or is tried again
    first = next(ending for ending in endings if not ending.is_done)
    verdict, detail = verdict_of_failure(first)
    if verdict != "named":
        return Outcome(case, verdict, detail)
    if not _says_where(endings):
        return Outcome(case, "vague", f"it does not say where: {detail}")
    [looked] = lab.ask("damaged_checkpoints")
    if looked.value or looked.traceback:
        return Outcome(case, "silent", f"a checkpoint is damaged: {looked.value or looked.traceback}")
    resumed = outcome_of_resumption(lab, case, subject)
    if resumed.verdict == "equal":
        return Outcome(case, "named", detail)
    return Outcome(case, "stuck", resumed.detail) if resumed.verdict == "named" else resumed


def _plan(how: str) -> Plan:
    first, *rest = how.split("/")
    if first == "limit":
        return Plan(file_bytes=int(rest[0]))
    mode, at = rest
    return Plan(mode, int(at), error=first)


def _says_where(endings: list[Ending]) -> bool:
    """Whether an error names a path."""
    said = "\n".join(ending.text.rpartition("alignlab train: ")[2] for ending in endings)
    return re.search(r"(^|[\s'\"])(/|run/|cache/)[\w.-]", said) is not None
