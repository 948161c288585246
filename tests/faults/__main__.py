"""Attack runs, files, peers and inputs, and count what came of it.

    python -m tests.faults --all --jobs 2
    python -m tests.faults --kind kills --subject grpo --budget-minutes 5
    python -m tests.faults --only 'kills:grpo:inside/17'

The exit status is 1 where anything was silent, unnamed, stuck or hung; those are in the file of --faults.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from tests.faults import corruption, disk, inputs, kills, peers, power, ranks
from tests.faults.attack import Attack, Outcome, table, write_faults
from tests.faults.lab import Lab

ATTACKS: tuple[Attack, ...] = (kills, corruption, disk, power, inputs, peers, ranks)
BY_KIND = {attack.KIND: attack for attack in ATTACKS}


def main(argv: Sequence[str] | None = None) -> int:
    """Try the cases that the arguments choose; returns the exit status."""
    args = _parser().parse_args(argv)
    attacks = ATTACKS if args.all else [BY_KIND[kind] for kind in args.kind or ()]
    if not attacks and args.only is None:
        _parser().error("give --all, --kind or --only")
    with tempfile.TemporaryDirectory(prefix="alignlab-faults-") as temporary:
        outcomes = _run(args, attacks, Path(args.folder or temporary))
    print(table(outcomes))
    faults = [outcome for outcome in outcomes if outcome.is_fault]
    write_faults(args.faults, faults)
    for outcome in faults[:20]:
        print(f"{outcome.verdict}: {outcome.case}: {' '.join(outcome.detail.split())[-300:]}", file=sys.stderr)
    return int(bool(faults))


def _run(args: argparse.Namespace, attacks: Sequence[Attack], folder: Path) -> list[Outcome]:
    until = time.monotonic() + 60 * args.budget_minutes if args.budget_minutes else float("inf")
    jobs = 1 if args.only is not None else args.jobs
    with ThreadPoolExecutor(jobs) as pool:
        labs = list(pool.map(lambda job: Lab(folder / f"job{job}"), range(jobs)))
        try:
            if args.only is not None:
                return [attempt(labs[0], args.only)]
            chosen = _chosen(args, attacks, labs[0])
            shares = [_Share(chosen, until) for _ in labs[:1]] * len(labs)
            done = pool.map(lambda lab, share: list(share.work(lab)), labs, shares)
            return sorted((outcome for part in done for outcome in part), key=lambda outcome: outcome.case)
        finally:
            for lab in labs:
                lab.close()


class _Share:
    """Cases that workers take one after the other, until none is left or the time is over."""

    def __init__(self, cases: Sequence[str], until: float) -> None:
        self._cases, self._until = iter(cases), until
        self._total, self._taken = len(cases), 0
        self._lock = threading.Lock()

    def work(self, lab: Lab) -> Iterator[Outcome]:
        """Take cases and try them."""
        while time.monotonic() < self._until:
            with self._lock:
                case = next(self._cases, None)
                self._taken += case is not None
            if case is None:
                return
            outcome = attempt(lab, case)
            if outcome.is_fault:
                print(f"{outcome.verdict}: {case}", file=sys.stderr)
            if self._taken % 50 == 0:
                print(f"{self._taken} of {self._total}", file=sys.stderr, flush=True)
            yield outcome


def attempt(lab: Lab, case: str) -> Outcome:
    """Try a case of any kind, and take the time."""
    start = time.monotonic()
    outcome = BY_KIND[case.partition(":")[0]].attempt(lab, case)
    return replace(outcome, seconds=time.monotonic() - start)


def _chosen(args: argparse.Namespace, attacks: Sequence[Attack], lab: Lab) -> list[str]:
    """Cases of all subjects in turn, each subject's in a random order, so that any budget sees something of each."""
    draw = random.Random(args.seed)
    found = []
    for attack in attacks:
        for subject in attack.SUBJECTS:
            if args.subject and subject not in args.subject:
                continue
            cases = attack.cases(lab, subject)
            wanted = attack.POINTS if args.points is None else args.points or len(cases)
            found.append(draw.sample(cases, min(len(cases), wanted)))
    return [case for turn in zip_longest(*found) for case in turn if case is not None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every kind")
    parser.add_argument("--kind", action="append", choices=sorted(BY_KIND), help="one kind; may be given again")
    parser.add_argument("--subject", action="append", help="one run or table of a kind; may be given again")
    parser.add_argument("--only", metavar="CASE", help="one case, as the table of faults names it")
    parser.add_argument("--points", type=int, help="of each subject at most so many; 0 takes all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-minutes", type=float, help="end after so long; default: when all are done")
    parser.add_argument("--jobs", type=int, default=1, help="workers, each with a folder and a server of its own")
    parser.add_argument("--folder", help="to work in; default: a temporary one")
    parser.add_argument("--faults", type=Path, default=Path("faults.json"), help="where faults are written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
