"""Make a mixture of experts from a dense model, and save it with its tokenizer.

Its experts begin as copies of the dense model's feed-forward layers, or of slices of them, so that it computes at first
what the dense model computes. Train it before use: copies learn to differ.
"""

from __future__ import annotations

import argparse
import sys

from alignlab.cli.made_models import add_dtype, load_whole, num_parameters, save_whole
from alignlab.cli.places import new_folder

FIX = "they come from the dense model: take another checkpoint"
NAME = "upcycle"
SUMMARY = "make a mixture of experts from a dense model"
EXAMPLE = "alignlab upcycle smollm2-135m-instruct mixtures/smollm2-8 --experts 8 --experts-per-token 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a dense model: a Hub id, a folder of a model, a packaged model")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write, which must not exist or be empty")
    parser.add_argument("--experts", type=int, required=True, metavar="E", help="experts of each sparse layer")
    parser.add_argument(
        "--experts-per-token", type=int, required=True, metavar="K", help="experts that compute each token"
    )
    parser.add_argument(
        "--method", choices=("copy", "drop", "virtual_groups"), default="copy",
        help="whole copies; copies of which a part is drawn anew; slices, of which a token takes whole replicas",
    )
    parser.add_argument("--slices", type=int, default=1, metavar="G", help="slices of a layer, of virtual_groups")
    parser.add_argument(
        "--drop-frac", type=float, default=0.5, metavar="R", help="fraction that drop draws anew, from 0 to 1"
    )
    parser.add_argument("--layers", type=int, nargs="+", metavar="I", help="layers with experts, counted from 0")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the routers and of what is drawn")
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Load the dense model, make the mixture, save it."""
    output = new_folder(args.output)
    dense, tokenizer = load_whole(args.model, "MODEL", args.dtype)

    import torch

    from alignlab.models.upcycling import upcycled

    torch.manual_seed(args.seed)
    mixture = upcycled(
        dense, num_experts=args.experts, num_experts_per_tok=args.experts_per_token, method=args.method,
        slices=args.slices, drop_frac=args.drop_frac, layers=args.layers,
    )
    save_whole(mixture, tokenizer, output, "the mixture's weights", fix=FIX)
    print(
        f"alignlab upcycle: wrote {output}, {args.experts} experts, {args.experts_per_token} a token: "
        f"{num_parameters(mixture):,} parameters from {num_parameters(dense):,}",
        file=sys.stderr,
    )
    return 0
