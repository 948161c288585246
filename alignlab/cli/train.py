"""Train as a config file says.

Progress and the closing report go to standard error; the last line of standard output is the result as JSON, in which
`learnt` is false, with a `reason`, where no step could teach anything. The exit status is 0 where every step is done,
2 for an error that has a name or where not one update was made, 1 for an error without one or where code that the run
called ended the process, and 130 where Ctrl-C or SIGTERM stopped it: the step is finished and saved then, and --resume
goes on from it.
"""

from __future__ import annotations

import argparse
import sys

from alignlab.cli.ending import ExitStatus, no_silent_exit, print_closing_line

NAME = "train"
SUMMARY = "train as a config file says"
EXAMPLE = "alignlab train configs/grpo_smollm2_cpu.yaml trainer.num_steps=20 trainer.output_dir=runs/short"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in trainer.output_dir")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A config file and overrides of its settings."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the file's")


def run(args: argparse.Namespace) -> int:
    """Train, then print the summary."""
    from alignlab.config.loader import load_config
    from alignlab.config.results import check_results

    config = load_config(args.config, args.overrides)
    check_results(config, args.config)

    from alignlab.errors import NothingLearntError
    from alignlab.trainers.run import run as train

    try:
        with no_silent_exit():
            summary = train(config, resume=args.resume)
    except NothingLearntError as error:
        print_closing_line(error.summary)
        raise
    except SystemExit as error:
        print(
            f"alignlab {NAME}: code that the run called asked to end the process: {error.code!r}; the run is not over, "
            "and --resume goes on with it where a step is saved",
            file=sys.stderr,
        )
        return ExitStatus.UNEXPECTED
    print_closing_line(summary.to_json())
    return ExitStatus.INTERRUPTED if summary.result.interrupted else ExitStatus.DONE
