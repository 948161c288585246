"""The command `alignlab`: one file for each of its sub-commands.

Nothing heavy is imported here: a sub-command imports what it needs when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

import alignlab
from alignlab.cli import check, evaluate, generate, judge, merge, sample, serve, student, train
from alignlab.cli.ending import ExitStatus
from alignlab.cli.process_end import end_despite_threads
from alignlab.library_errors import named

COMMANDS = (train, check, evaluate, generate, merge, sample, student, judge, serve)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, see `alignlab.cli.ending`."""
    status = _run(argv)
    return status if argv is not None else end_despite_threads(status)


def _run(argv: Sequence[str] | None) -> int:
    prepare_environment()
    args = parse(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes what a terminal may not know
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        status: int = args.command(args)
        return status
    except BrokenPipeError:  # whoever read standard output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.ERROR
    except Exception as error:
        named_error = named(error)
        if named_error is None or args.debug:
            raise
        print(f"alignlab {args.name}: {named_error}", file=sys.stderr)
        return ExitStatus.ERROR
    except KeyboardInterrupt:
        print(f"alignlab {args.name}: interrupted", file=sys.stderr)
        return ExitStatus.INTERRUPTED


def prepare_environment() -> None:
    """Set what must be in the environment before torch is imported; whatever the user set stays.

    A thread of a parallel region that waits passively is woken by the kernel, which takes longer than one small matrix
    product; spinning for long, the default, makes threads that share a core with another process wait for each other
    (beside one busy process, a small product took 20 times as long). A short spin has neither fault.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # a log file is no place for progress bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; overrides (`key=value`) and the models of `eval` may also come after options."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if "models" in args and not any(word.startswith("-") for word in rest):
        args.models, rest = args.models + rest, []
    if "overrides" in args:
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}; see alignlab {args.name} --help")
    return args


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="alignlab",
        description="Post-train and align language models with reinforcement learning.",
        epilog="Example: alignlab train configs/grpo_smollm2_cpu.yaml",
    )
    parser.add_argument("--version", action="version", version=f"alignlab {alignlab.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        sub = commands.add_parser(
            module.NAME,
            help=module.SUMMARY,
            description=module.__doc__,
            epilog=f"Example: {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(command=module.run, name=module.NAME)
    return parser
