"""Runs that are killed at an operation on a file, resumed, and compared with a run that nothing interrupted.

Killed before an operation, and inside of a write, of which half is there then.
"""

from __future__ import annotations

import signal

from tests.faults import runs
from tests.faults.attack import Outcome, outcome_of_difference, outcome_of_resumption, parts
from tests.faults.lab import Lab
from tests.faults.operations import Plan

KIND, POINTS = "kills", 60
SUBJECTS = runs.ALL


def cases(lab: Lab, subject: str) -> list[str]:
    """Before each operation of each rank, and inside each write."""
    return [
        f"{KIND}:{subject}:{mode}/{operation.number}/{rank}"
        for rank in range(runs.split_name(subject)[1])
        for operation in lab.log_of(subject, rank)
        for mode in ("before", "inside") if mode == "before" or operation.name == "write"
    ]


def attempt(lab: Lab, case: str) -> Outcome:
    """Kill a run at one operation of one rank, and go on with it."""
    subject, how = parts(case)
    mode, at, rank = how.split("/")
    lab.reference(subject)
    lab.clear()
    endings = lab.train(subject, plan=Plan(mode, int(at)), armed_rank=int(rank))
    if endings[int(rank)].status != -signal.SIGKILL:
        return _unkilled(lab, case, subject)
    outcome = outcome_of_resumption(lab, case, subject)
    # A killed run has lost nothing: an error, however well named, is one too many.
    return outcome if outcome.verdict != "named" else Outcome(case, "stuck", outcome.detail)


def _unkilled(lab: Lab, case: str, subject: str) -> Outcome:
    """Of a run that had fewer operations this time, as where threads meet in another order."""
    return outcome_of_difference(lab, case, lab.unlike(subject))
