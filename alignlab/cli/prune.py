"""Set weights of a dense model's linear layers to zero, and save it with its tokenizer.

Embeddings, head, norms and biases stay whole. The file is as large as before: zeros pay on hardware for 2:4 patterns,
and in compressed files. Train the model before use, by distillation from what it was made of, with
optim.keep_zeros=true.
"""

from __future__ import annotations

import argparse
import re
import sys

from alignlab.cli.made_models import add_calibration, add_dtype, calibration_text, load_whole, save_whole
from alignlab.cli.places import new_folder
from alignlab.errors import ConfigError

FIX = "they come from the model: take another checkpoint"
NAME = "prune"
SUMMARY = "set weights of a dense model to zero"
EXAMPLE = (
    "alignlab prune smollm2-135m-instruct pruned/smollm2-half --method wanda --sparsity 0.5 --data runs/samples.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a dense model: a Hub id, a folder of a model, a packaged model")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write, which must not exist or be empty")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--sparsity", type=float, metavar="R", help="fraction of the weights that become zero")
    amount.add_argument(
        "--pattern", metavar="N:M", help="of each M inputs that follow each other N stay, such as 2:4"
    )
    parser.add_argument(
        "--method", choices=("magnitude", "wanda"), default="magnitude",
        help="the smallest weights of each matrix, or of each output those that are smallest times the norm of their "
        "input on --data",
    )
    add_calibration(parser)
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Load the model, set weights to zero, save it."""
    output = new_folder(args.output)
    pattern = _pattern(args)
    model, tokenizer = load_whole(args.model, "MODEL", args.dtype)

    from alignlab.models.pruning.masks import choice
    from alignlab.models.pruning.sparsity import check_pattern, prune_by_magnitude, prune_by_wanda, sparsity_of

    if pattern is not None:
        check_pattern(model, pattern[1])
    stays = choice(dropped=args.sparsity, pattern=pattern, by_row=args.method == "wanda")
    if args.method == "wanda":
        prune_by_wanda(model, stays, calibration_text(args.data, tokenizer, args.calibration_tokens))
    else:
        prune_by_magnitude(model, stays)
    save_whole(model, tokenizer, output, "the pruned weights", fix=FIX)
    zeros, size = sparsity_of(model)
    print(
        f"alignlab prune: wrote {output}: {zeros:,} of {size:,} weights of linear layers are zero ({zeros / size:.1%})",
        file=sys.stderr,
    )
    return 0


def _pattern(args: argparse.Namespace) -> tuple[int, int] | None:
    """Return the pattern, after checking the arguments against each other."""
    if (args.method == "wanda") != (args.data is not None):
        raise ConfigError(
            f"--data is {'missing, and wanda measures on it' if args.data is None else 'not read by magnitude'}; "
            f"{'give a file of rows, such as `alignlab sample` writes' if args.data is None else 'use --method wanda'}"
        )
    if args.pattern is None:
        if not 0 < args.sparsity < 1:
            raise ConfigError(f"--sparsity is {args.sparsity}, and must be between 0 and 1; use 0.5")
        return None
    match = re.fullmatch(r"(\d+):(\d+)", args.pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ConfigError(f"--pattern is {args.pattern}, and must be N:M with N from 1 to M - 1; use 2:4")
    return int(match[1]), int(match[2])
