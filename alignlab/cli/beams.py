"""Beam search from the command line: its flags, and the texts that it finds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from alignlab.cli.policy import SAMPLING_FLAGS
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from alignlab.rollout.embedded.beams import BeamParams, BeamResult

# Flags by the field of BeamParams: number of beams first, without which the others mean nothing.
_FLAGS: dict[str, tuple[str, type, str]] = {
    "num_beams": ("--beams", int, "search the likeliest text with this many beams, instead of sampling one"),
    "num_best": ("--best", int, "with --beams: print this many texts, each after its score; default: 1, without it"),
    "length_penalty": ("--length-penalty", float, "with --beams: above 1 prefers long texts, 0 short ones; default: 1"),
    "num_groups": ("--beam-groups", int, "with --beams: groups of beams that write different texts"),
    "diversity": ("--diversity", float, "with --beam-groups: nats that a token costs which another group took"),
}
_SAMPLING = ("stop", "banned_words", "logit_bias", "regex", "json_schema", "begin_with", "seed", "speculate")


def add_beam_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a beam search."""
    for name, (flag, kind, text) in _FLAGS.items():
        parser.add_argument(flag, dest=name, type=kind, metavar="N" if kind is int else "X", help=text)


def beam_params(args: argparse.Namespace, *, max_new_tokens: int) -> BeamParams | None:
    """Return the parameters of the flags; None without --beams.

    Args:
        max_new_tokens: of a completion.

    Raises:
        ConfigError: a flag is of no use with the others.
    """
    flags: dict[str, Any] = {name: getattr(args, name) for name in _FLAGS if getattr(args, name) is not None}
    if args.num_beams is None:
        for name in flags:
            raise ConfigError(f"{_FLAGS[name][0]} is {flags[name]}, and needs --beams; add it, such as --beams 4")
        return None
    for name in (*SAMPLING_FLAGS, *_SAMPLING):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and name != "max_new_tokens":
            shown = "--ban" if name == "banned_words" else flag
            raise ConfigError(f"{shown} is {value}, and --beams samples nothing and takes none; remove one of both")
    from alignlab.rollout.embedded.beams import BeamParams

    return BeamParams(max_new_tokens=max_new_tokens, **flags)


def print_beams(result: BeamResult) -> None:
    """Print the text of the only completion, or each after its score."""
    completions = result.rollout.completions
    for score, completion in zip(result.scores, completions, strict=True):
        print(completion.text if len(completions) == 1 else f"{score:8.3f}  {completion.text}", flush=True)
