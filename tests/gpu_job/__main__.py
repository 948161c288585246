"""Prove on a GPU what a CPU cannot: kernels, waits, memory, engines, whole steps; prints a table.

    bash launch/gpu_check.sh                  # all parts, under ten minutes on one card
    bash launch/gpu_check.sh attention waits  # some of them
    bash launch/gpu_check.sh --device cpu     # tries the job itself

Each part is a process of its own, so that one that fails, hangs or takes all memory leaves the others. The exit status
is 1 where a line has failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from tests.gpu_job.decoding import decoding, paged
from tests.gpu_job.kernels import attention, experts, head, waits
from tests.gpu_job.lines import Line
from tests.gpu_job.machine import limits, machine
from tests.gpu_job.training import determinism, engine, grpo, vllm
from tests.gpu_job.zoo import caches, layers

PARTS: Mapping[str, Callable[[torch.device], Iterator[Line]]] = {
    part.__name__: part
    for part in (
        machine, limits, attention, paged, experts, head, waits, decoding, layers, caches, engine, grpo, determinism,
        vllm,
    )
}
TIME_LIMIT_S = 240.0
_MARK = "LINE "


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, and return the exit status."""
    args = _parser().parse_args(argv)
    if args.alone:
        for line in PARTS[args.parts[0]](torch.device(args.device)):
            print(f"{_MARK}{line.to_json()}", flush=True)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible to torch; --device cpu tries the job itself", file=sys.stderr)
        return 2
    lines = []
    for name in args.parts or PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        lines += _run(name, args.device)
    Console().print(_table(lines))
    return int(any(line.verdict == "failed" for line in lines))


def _run(part: str, device: str) -> list[Line]:
    """Run a part in a process of its own, and return its lines; its failure is one more."""
    command = [sys.executable, "-m", "tests.gpu_job", part, "--alone", "--device", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        printed = output.decode(errors="replace") if isinstance(output, bytes) else output
        return [*_lines_in(printed), Line(part, "failed", f"no end within {TIME_LIMIT_S:.0f} s")]
    lines = _lines_in(done.stdout)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        lines.append(Line(part, "failed", last[:300]))
    return lines


def _lines_in(output: str) -> list[Line]:
    marked = [line.removeprefix(_MARK) for line in output.splitlines() if line.startswith(_MARK)]
    return [Line(**json.loads(line)) for line in marked]


def _table(lines: Sequence[Line]) -> Table:
    table = Table("what", "", "detail", title="GPU job")
    for line in lines:
        table.add_row(line.name, line.verdict, line.detail, style="bold red" if line.verdict == "failed" else None)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
