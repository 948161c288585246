"""The command `alignlab`: one file for each sub-command.

No heavy import stands at the top of these files: a sub-command imports what it needs when it runs, so that `--help` is
quick.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

import alignlab
from alignlab.cli import (
    check,
    evaluate,
    generate,
    judge,
    merge,
    new,
    prune,
    quantize,
    sample,
    serve,
    student,
    train,
    upcycle,
)
from alignlab.cli.ending import ExitStatus
from alignlab.cli.places import expand_home
from alignlab.cli.process_end import end_despite_threads
from alignlab.cli.streams import make_streams_last, stdout_error
from alignlab.errors import ConfigError
from alignlab.files.library_errors import named, reason
from alignlab.runs.interrupt import interrupted_by_sigterm

COMMANDS = (train, check, evaluate, generate, merge, sample, new, student, prune, upcycle, quantize, judge, serve)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status; see `alignlab.cli.ending`."""
    if argv is not None:
        return _run(argv)
    make_streams_last()
    return end_despite_threads(_with_lost_output(_run(None)))


def _run(argv: Sequence[str] | None) -> int:
    prepare_environment()
    args = parse(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write characters that the terminal cannot show
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        _check_working_folder()
        expand_home(args)
        with interrupted_by_sigterm():
            status: int = args.command(args)
        return status
    except Exception as error:
        named_error = named(error)
        if named_error is None or args.debug:
            raise
        print(f"alignlab {args.name}: {named_error}", file=sys.stderr)
        return ExitStatus.ERROR
    except KeyboardInterrupt as error:
        by = f" by {error}" if str(error) else ""
        print(f"alignlab {args.name}: interrupted{by}", file=sys.stderr)
        return ExitStatus.INTERRUPTED


def _with_lost_output(status: int) -> int:
    """Return the exit status; not 0, with a message, if standard output did not accept all that was written."""
    error = stdout_error()
    if error is None:
        return status
    print(f"alignlab: standard output could not be written, and lacks a part: {reason(error)}", file=sys.stderr)
    return status or ExitStatus.ERROR


def _check_working_folder() -> None:
    """Raise if the working folder is gone: libraries would end the process without a message.

    Raises:
        ConfigError: it was removed, or may not be entered any more.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the working folder must be there, and it was removed or cannot be entered ({reason(error)}); change to "
            "another one (cd)"
        ) from error


def prepare_environment() -> None:
    """Set environment variables that must be set before torch is imported; the user's own values stay.

    OpenMP threads spin briefly, then sleep. Waking a thread that sleeps at once takes longer than a small matrix
    product; long spinning, the default, makes threads wait for each other on a shared core (beside one busy process, a
    small product took 20 times as long).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # progress bars would fill a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; overrides (`key=value`) and the models of `eval` may also come after options."""
    parser = make_parser()
    args, words = parser.parse_known_args(argv)
    if "models" in args and not any(word.startswith("-") for word in words):
        args.models, words = args.models + words, []
    if "overrides" in args:
        args.overrides += [word for word in words if "=" in word and not word.startswith("-")]
        words = [word for word in words if word not in args.overrides]
    if words:
        parser.error(f"unrecognized arguments: {' '.join(words)}; see alignlab {args.name} --help")
    return args


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
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
