"""The part of `alignlab eval` for the likelihood of given texts: --perplexity, --window, --stride, --calibrate."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignlab.cli.candidates import Candidate
from alignlab.cli.policy import SAMPLING_FLAGS, load_policy, resolved_dtype, tokenizer_source
from alignlab.errors import AlignlabError, ConfigError

if TYPE_CHECKING:
    from alignlab.evaluation.likelihood.measure import TextLikelihood
    from alignlab.evaluation.likelihood.texts import ScoredText

DEFAULT_WINDOW = 1024
_OTHERS = (
    "set", "system_prompt", "extract", "num_problems", "num_samples", "pass_at", "strategy", "pool",
    *SAMPLING_FLAGS, "stop", "banned_words", "logit_bias", "regex", "json_schema",
)  # fmt: skip
"""Flags that have nothing to say about given texts."""


def add_perplexity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --window, --stride and --calibrate."""
    parser.add_argument(
        "--window", type=int, metavar="N", help="for --perplexity: tokens that the model reads at once; default: 1024"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="for --perplexity: tokens from window to window; default: half of one"
    )
    parser.add_argument(
        "--calibrate", metavar="FILE", help="for --perplexity: held-out texts that a temperature is fitted on"
    )


def check_perplexity_arguments(args: argparse.Namespace) -> None:
    """Raise if a flag would be ignored, or the temperature would be measured on what it is fitted on.

    Raises:
        ConfigError: with the fix.
    """
    if args.perplexity is None:
        given = next((name for name in ("window", "stride", "calibrate") if getattr(args, name) is not None), None)
        if given is not None:
            raise ConfigError(f"--{given} is for --perplexity FILE; leave it out, or add that")
        return
    given = next((name for name in _OTHERS if getattr(args, name) not in (None, [])), "show" if args.show else None)
    if given is not None:
        flag = "--ban" if given == "banned_words" else f"--{given.replace('_', '-')}"
        raise ConfigError(f"{flag} is about sampled answers, and --perplexity about given texts; leave one out")
    if args.calibrate is not None and args.calibrate == args.perplexity:
        raise ConfigError(
            f"--calibrate is {args.calibrate}, and must be other texts than those of --perplexity, or the error after "
            "calibration would be too small; give held-out texts"
        )


def measure_texts(candidates: Sequence[Candidate], args: argparse.Namespace) -> None:
    """Measure the likelihood of texts under each model, and report it."""
    texts = [texts_of(candidate, args) for candidate in candidates]
    dtype = resolved_dtype(args.dtype, adapted=any(candidate.adapted for candidate in candidates))
    measured: dict[str, TextLikelihood] = {}
    try:
        for candidate, (to_measure, held_out) in zip(candidates, texts, strict=True):
            print(f"{candidate.name}: reading {len(to_measure)} texts, {dtype}", file=sys.stderr, flush=True)
            measured[candidate.name] = measure_model(candidate, to_measure, held_out, dtype, args)
    finally:
        if measured:
            report(measured, {"dtype": dtype, "complete": len(measured) == len(candidates)}, args)


def texts_of(candidate: Candidate, args: argparse.Namespace) -> tuple[list[ScoredText], list[ScoredText]]:
    """Return the texts to measure and the held-out ones, by a model's tokenizer; all is checked before it is loaded.

    Raises:
        AlignlabError: with the name of the model that cannot read them.
    """
    from alignlab.evaluation.likelihood.texts import check_windows, read_texts
    from alignlab.models.decoder import num_positions
    from alignlab.models.hub.checkpoints import empty_model, load_tokenizer

    try:
        positions = num_positions(empty_model(candidate.model))
        check_windows(*window_and_stride(args, positions), positions)
        tokenizer = load_tokenizer(tokenizer_source(candidate.model, candidate.adapter))
        held_out = [] if args.calibrate is None else read_texts(args.calibrate, tokenizer)
        return read_texts(args.perplexity, tokenizer), held_out
    except AlignlabError as error:
        raise type(error)(f"MODEL {candidate.name}: {error}; nothing was measured") from error


def window_and_stride(args: argparse.Namespace, positions: float) -> tuple[int, int]:
    """Return --window and --stride, or their defaults."""
    width = int(min(DEFAULT_WINDOW, positions)) if args.window is None else args.window
    return width, max(1, width // 2) if args.stride is None else args.stride


def measure_model(
    candidate: Candidate, texts: Sequence[ScoredText], held_out: Sequence[ScoredText], dtype: str,
    args: argparse.Namespace,
) -> TextLikelihood:
    """Load a model, and return the likelihood of the texts."""
    from alignlab.evaluation.likelihood.measure import LikelihoodMeter
    from alignlab.evaluation.likelihood.texts import windows_of
    from alignlab.models.decoder import num_positions

    policy, _ = load_policy(candidate.model, candidate.adapter, dtype)
    width, stride = window_and_stride(args, num_positions(policy))
    meter = LikelihoodMeter(policy)
    temperature = None
    if held_out:
        temperature, count = meter.fit_temperature(list(windows_of(held_out, width=width, stride=stride)))
        print(f"{candidate.name}: temperature {temperature:.3f} from {count} tokens", file=sys.stderr, flush=True)
    windows = list(windows_of(texts, width=width, stride=stride))
    return meter.measure(texts, windows, temperature=temperature, seed=args.seed or 0)


def report(measured: dict[str, TextLikelihood], facts: dict[str, object], args: argparse.Namespace) -> None:
    """Print the table on standard error, JSON on standard output, and draw the reliability diagram."""
    from rich.console import Console

    from alignlab.evaluation.likelihood.measure import difference
    from alignlab.evaluation.likelihood.report import likelihood_table, plot_reliability

    Console(stderr=True).print(likelihood_table(measured))
    first = next(iter(measured.values()))
    models = []
    for name, result in measured.items():
        change = difference(first, result)
        models.append({"name": name, **result.to_json(), "difference_bits_per_byte": change and change.to_json()})
    print(json.dumps({"texts": args.perplexity, **facts, "models": models}), flush=True)
    if args.plot is not None:
        plot_reliability(measured, args.plot)
        print(f"plot: {args.plot}", file=sys.stderr)
