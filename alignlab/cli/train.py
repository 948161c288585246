"""Train as a config file says.

Progress and the closing report go to standard error; the last line of standard output is the result as JSON, in which
`learnt` is false, with a `reason`, where no step could teach anything. Where not one completion could be trained on,
the exit status is 2, too.
Ctrl-C or SIGTERM finishes the step, saves a checkpoint and exits with status 130; --resume goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

NAME = "train"
SUMMARY = "train as a config file says"
EXAMPLE = "alignlab train configs/grpo_smollm2_cpu.yaml trainer.num_steps=20 trainer.output_dir=runs/short"
EXIT_INTERRUPTED = 130


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
        summary = train(config, resume=args.resume)
    except NothingLearntError as error:
        tell(error.summary)
        raise
    tell(summary.to_json())
    return EXIT_INTERRUPTED if summary.result.interrupted else 0


def tell(summary: Mapping[str, Any]) -> None:
    """Print the closing line, on the first rank alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary), flush=True)
