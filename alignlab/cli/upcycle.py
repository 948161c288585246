"""Make a mixture of experts from a dense model, and save it with its tokenizer.

Its experts begin as copies of the dense model's feed-forward layers, or of slices of them, so that it computes at first
what the dense model computes. Train it before use: copies learn to differ.
"""

from __future__ import annotations

import argparse
import sys

from alignlab.cli.places import new_folder
from alignlab.cli.policy import is_adapter
from alignlab.errors import ConfigError

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
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the saved weights"
    )


def run(args: argparse.Namespace) -> int:
    """Load the dense model, make the mixture, save it."""
    output = new_folder(args.output)
    from alignlab.runs.folder import refuse_run

    refuse_run(args.model, "MODEL")
    if is_adapter(args.model):
        raise ConfigError(f"MODEL must be a model, and {args.model} is an adapter; merge it first: alignlab merge")

    import torch

    from alignlab.models.finite import check_finite
    from alignlab.models.hub.checkpoints import load_model, load_tokenizer, save_model
    from alignlab.models.hub.saving import published
    from alignlab.models.upcycling import upcycled

    tokenizer = load_tokenizer(args.model)
    dense = load_model(args.model, dtype=getattr(torch, args.dtype))
    torch.manual_seed(args.seed)
    mixture = upcycled(
        dense, num_experts=args.experts, num_experts_per_tok=args.experts_per_token, method=args.method,
        slices=args.slices, drop_frac=args.drop_frac, layers=args.layers,
    )
    check_finite(mixture.state_dict().items(), "the mixture's weights", fix=FIX)
    with published(output) as unfinished:
        save_model(mixture, unfinished)
        tokenizer.save_pretrained(unfinished)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (mixture, dense)]
    print(
        f"alignlab upcycle: wrote {output}, {args.experts} experts, {args.experts_per_token} a token: {sizes[0]:,} "
        f"parameters from {sizes[1]:,}",
        file=sys.stderr,
    )
    return 0
