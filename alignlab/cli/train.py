"""Train the model of a config file.

Progress and the closing report go to standard error. The last line of standard output is the result as JSON; its
`learnt` is false, with a `reason`, if no step could teach anything. Exit status: 0 if every step is done; 2 for an
error that has a name, or if not one update was made; 1 for any other error, or if code that the run called ended the
process; 130 if Ctrl-C or SIGTERM stopped the run: the step is then finished and saved, and --resume continues from it.
"""

from __future__ import annotations

import argparse
import sys

from alignlab.cli.ending import ExitStatus, no_silent_exit, print_closing_line

NAME = "train"
SUMMARY = "train the model of a config file"
EXAMPLE = "alignlab train configs/grpo_smollm2_cpu.yaml trainer.num_steps=20 trainer.output_dir=runs/short"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in trainer.output_dir"
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a config file and overrides of its settings."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of the file")


def run(args: argparse.Namespace) -> int:
    """Train, then print the summary."""
    from alignlab.cli.prerequisites import check_prerequisites
    from alignlab.config.loader import load_config

    config = load_config(args.config, args.overrides)
    check_prerequisites(config, args.config)

    from alignlab.errors import NothingLearntError
    from alignlab.run_from_config import run as train

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
