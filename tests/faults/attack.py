"""What every kind of attack is: cases with names, and what came of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from tests.faults.lab import Ending, Lab
from tests.faults.results import LEFT_OVER

Verdict = Literal[
    "equal", "named", "made again", "harmless", "silent", "unnamed", "vague", "stuck", "hung", "litter"
]
GOOD: tuple[Verdict, ...] = ("equal", "named", "made again", "harmless")
FAULTS: tuple[Verdict, ...] = ("silent", "unnamed", "vague", "stuck", "hung", "litter")
"""silent: other results, and nothing said. unnamed: a traceback. vague: a sentence that does not say where.
stuck: a run that can neither go on nor begin. hung: no end in time. litter: the same results, and files of the broken
run beside them."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case.

    Attributes:
        case: its name, by which it can be tried again: kind:subject:how.
        detail: the message or the first difference.
        seconds: that it took.
    """

    case: str
    verdict: Verdict
    detail: str = ""
    seconds: float = 0.0

    @property
    def is_fault(self) -> bool:
        """Whether it must not be."""
        return self.verdict in FAULTS


class Attack(Protocol):
    """A module of one kind of attack.

    Attributes:
        POINTS: cases of each subject that are taken where no other number is asked for.
    """

    KIND: str
    POINTS: int
    SUBJECTS: Sequence[str]

    def cases(self, lab: Lab, subject: str) -> list[str]:
        """The names of all cases of a subject, such as a trainer's run."""
        ...

    def attempt(self, lab: Lab, case: str) -> Outcome:
        """Try one."""
        ...


def parts(case: str) -> tuple[str, str]:
    """Subject and manner of a case."""
    _, subject, how = case.split(":", 2)
    return subject, how


def verdict_of_failure(ending: Ending) -> tuple[Verdict, str]:
    """Of a run that has not come to its end: whether it said so by name."""
    if ending.was_ended:
        return "hung", ending.message
    return ("named" if ending.is_named else "unnamed"), ending.message


def outcome_of_resumption(lab: Lab, case: str, run: str, overrides: Sequence[str] = ()) -> Outcome:
    """Go on with a run, and see whether it makes what it would have made; but for its config where it has overrides."""
    endings = lab.train(run, overrides=list(overrides))
    failed = next((ending for ending in endings if not ending.is_done), None)
    if failed is not None:
        verdict, detail = verdict_of_failure(failed)
        return Outcome(case, verdict, detail)
    unlike = [sentence for sentence in lab.unlike(run) if not (overrides and sentence.startswith("config.yaml"))]
    return outcome_of_difference(lab, case, unlike)


def outcome_of_difference(lab: Lab, case: str, unlike: Sequence[str]) -> Outcome:
    """Of a run that has come to its end, by what it made otherwise than a run that nothing interrupted.

    An old checkpoint that could not be removed, or whose removal the disk forgot, is no harm if it is whole.
    """
    litter = all(sentence.endswith(LEFT_OVER) for sentence in unlike)
    if unlike and litter and all("checkpoints/step-" in sentence for sentence in unlike):
        [looked] = lab.ask("damaged_checkpoints")
        if looked.value == []:
            return Outcome(case, "equal", "an old checkpoint is still there")
    verdict: Verdict = "equal" if not unlike else "litter" if litter else "silent"
    return Outcome(case, verdict, "; ".join(unlike[:3]))


def table(outcomes: Iterable[Outcome]) -> str:
    """Counts by kind and subject, a line for each."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        kind, subject, _ = outcome.case.split(":", 2)
        counts.setdefault((kind, subject), Counter())[outcome.verdict] += 1
    columns = [*GOOD, *FAULTS]
    lines = [["kind", "subject", "points", *columns]]
    total: Counter[str] = Counter()
    for (kind, subject), found in counts.items():
        lines.append([kind, subject, str(found.total()), *(str(found[column]) for column in columns)])
        total += found
    lines.append(["all", "", str(total.total()), *(str(total[column]) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(_padded(line, widths)) for line in lines)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Cells of one line: two of words, to the left, and the numbers to the right."""
    for place, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield f"{cell:<{width}}" if place < 2 else f"{cell:>{width}}"


def write_faults(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write the outcomes that must not be, with what reproduces each."""
    told = [
        asdict(outcome) | {"again": f"python -m tests.faults --only '{outcome.case}'"}
        for outcome in outcomes if outcome.is_fault
    ]
    path.write_text(json.dumps(told, indent=1) + "\n")
