"""One of two ranks in trouble: the other ends by itself in time, says so, and the run can be gone on with."""

from __future__ import annotations

import time

from tests.faults.attack import Outcome, outcome_of_resumption, parts
from tests.faults.lab import Ending, Lab
from tests.faults.trouble import ACTIONS, PHASES

KIND, POINTS = "ranks", 12
SUBJECTS = ("grpo@2", "dpo@2", "ahead@2", "grpo_fsdp2@2", "grpo_zero3@2")
LIMIT_S = 8.0
"""How long ranks wait for each other, of half an hour by default."""
PATIENCE_S = 60.0
_ONLINE_ONLY = ("collecting", "scoring", "evaluating")


def cases(lab: Lab, subject: str) -> list[str]:
    """Each trouble of each rank in each phase."""
    phases = [phase for phase in PHASES if not (subject == "dpo@2" and phase in _ONLINE_ONLY)]
    phases = [phase for phase in phases if not (subject == "ahead@2" and phase == "evaluating")]
    return [f"{KIND}:{subject}:{phase}/{action}/{rank}" for phase in phases for action in ACTIONS for rank in (0, 1)]


def attempt(lab: Lab, case: str) -> Outcome:
    """Let one rank have the trouble, see how the other ends, and go on with the run."""
    subject, how = parts(case)
    phase, action, number = how.split("/")
    rank = int(number)
    overrides = [f"trainer.rank_timeout_s={LIMIT_S:g}"]
    lab.reference(subject)
    lab.clear()
    start = time.monotonic()
    endings = lab.train(
        subject, timeout_s=PATIENCE_S, grace_s=PATIENCE_S, overrides=overrides,
        trouble={"phase": phase, "action": action, "rank": rank},
    )
    other = endings[1 - rank]
    told = f"after {time.monotonic() - start:.0f} s: {other.message[-600:]}"
    if other.was_ended:
        return Outcome(case, "hung", told)
    if not _is_told(other):
        return Outcome(case, "unnamed", told)
    resumed = outcome_of_resumption(lab, case, subject, overrides)
    if resumed.verdict == "equal":
        return Outcome(case, "named", told)
    return Outcome(case, "stuck", resumed.detail) if resumed.verdict == "named" else resumed


def _is_told(ending: Ending) -> bool:
    """Whether the rank that had no trouble ended with a sentence about ranks, and no traceback."""
    said = ending.text.strip().splitlines()
    quiet = "Traceback (most recent call last)" not in ending.text
    return not ending.is_done and ending.traceback is None and quiet and any("rank" in line for line in said[-8:])
