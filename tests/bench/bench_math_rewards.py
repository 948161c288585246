"""How many answers of one table rewards judge right: alignlab's, math-verify's plain use, TRL's and verl's.

    python -m tests.bench.bench_math_rewards [--verl FOLDER] [--only NAME ...]

The table is tests/rewards/answer_rows, in the main thread, so that math-verify's own time limits work. It was written
for `math_answer`, so a peer's number says how often it decides otherwise, not how good it is at its own conventions:

- math-verify: `verify(parse(gold), parse(completion))` with its defaults; and with `$gold$`, since it asks for LaTeX
  golds between dollars.
- TRL's `accuracy_reward` asks for LaTeX in the completion and returns None where it cannot read the gold, counted here
  as 0; again with the gold as it is and as `$gold$`.
- verl's scorers take the gold without marks. `math_reward` compares the last box as text, `math_dapo` what stands
  behind "Answer:" in the last 300 characters; `gsm8k` looks for `#### number`; `math_verify` puts the gold in a box.
  verl is not installed: FOLDER is where its wheel was unpacked (`pip download --no-deps verl`), and its files are
  loaded by path.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from alignlab_rewards.math_answer import math_answer
from math_verify import parse, verify
from trl.rewards import accuracy_reward

from tests.rewards.answer_rows import ROWS

Judge = Callable[[str, str], Any]


def judges(verl: Path | None) -> dict[str, Judge]:
    """Return each reward under its name: a function of gold and completion."""
    rewards: dict[str, Judge] = {
        "alignlab math_answer": lambda gold, text: math_answer(completions=[text], answer=[gold])[0],
        "math-verify": lambda gold, text: verify(parse(gold), parse(text)),
        "math-verify, $gold$": lambda gold, text: verify(parse(f"${gold}$"), parse(text)),
        "TRL accuracy_reward": lambda gold, text: accuracy_reward([[{"content": text}]], [gold])[0],
        "TRL, $gold$": lambda gold, text: accuracy_reward([[{"content": text}]], [f"${gold}$"])[0],
    }
    if verl is not None:
        folder = verl / "verl" / "utils" / "reward_score"
        # The function that verl runs in a subprocess, for the sake of signals, which work here as well.
        boxed_verify = load(folder / "math_verify.py")._verify_in_subprocess
        files = {name: load(folder / f"{name}.py") for name in ("math_reward", "math_dapo", "gsm8k")}
        rewards |= {
            "verl math_reward": lambda gold, text: files["math_reward"].compute_score(text, gold),
            "verl math_dapo": lambda gold, text: files["math_dapo"].compute_score(text, gold)["acc"],
            "verl gsm8k": lambda gold, text: files["gsm8k"].compute_score(text, gold),
            "verl gsm8k, flexible": lambda gold, text: files["gsm8k"].compute_score(text, gold, method="flexible"),
        }
        rewards["verl math_verify"] = lambda gold, text: boxed_verify(rf"\boxed{{{gold}}}", text)
    return rewards


def load(path: Path) -> ModuleType:
    """Load a module from its file alone."""
    spec = importlib.util.spec_from_file_location(f"verl_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(judge: Judge) -> dict[str, Any]:
    """Judge every row; an exception counts as 0."""
    counts: dict[str, Any] = dict.fromkeys(("right", "accepted wrong", "refused right", "raised"), 0)
    counts["slowest"] = (0.0, "", "")
    judge("1", r"\boxed{1}")  # what is loaded at the first call is not measured
    started = time.perf_counter()
    for gold, text, value in (row for rows in ROWS.values() for row in rows):
        row_started = time.perf_counter()
        try:
            given = float(judge(gold, text) or 0.0) > 0
        except Exception:
            given = False
            counts["raised"] += 1
        counts["slowest"] = max(counts["slowest"], (time.perf_counter() - row_started, gold, text))
        counts["right"] += given == bool(value)
        counts["accepted wrong"] += given and not value
        counts["refused right"] += bool(value and not given)
    counts["seconds"] = time.perf_counter() - started
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl", type=Path, help="folder in which verl's wheel was unpacked")
    parser.add_argument("--only", nargs="+", help="names of the rewards to measure; all of them by default")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    values = [value for rows in ROWS.values() for _, _, value in rows]
    print(f"{len(values)} rows, {values.count(0.0)} of them wrong answers")
    heads = (
        ("right", 7), ("wrong, accepted", 17), ("right, refused", 16), ("raised", 8), ("seconds", 9), ("slowest", 9),
    )  # fmt: skip
    print(f"{'':24}" + "".join(f"{head:>{width}}" for head, width in heads) + "  slowest row")
    for name, judge in judges(options.verl).items():
        if options.only and name not in options.only:
            continue
        counts = measure(judge)
        seconds, gold, text = counts["slowest"]
        print(
            f"{name:24}{counts['right']:7}{counts['accepted wrong']:17}{counts['refused right']:16}"
            f"{counts['raised']:8}"
            f"{counts['seconds']:9.1f}{seconds:9.3f}  {gold[:24]!r} <- {text[-40:]!r}",
            flush=True,
        )


if __name__ == "__main__":
    main()
