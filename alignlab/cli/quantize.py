"""Round the linear layers of a dense model to 8 or 4 bits, for serving by `transformers` or vLLM.

Weights go to the nearest value, without calibration; embeddings, head and norms stay as they are. GPTQ and AWQ need
libraries that do not install beside alignlab: run them on the folder of a model, in an environment of their own. What
is written cannot be trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

from alignlab.cli.made_models import load_whole
from alignlab.cli.places import new_folder
from alignlab.errors import ConfigError

NAME = "quantize"
SUMMARY = "round a model's linear layers to 8 or 4 bits, for serving"
EXAMPLE = "alignlab quantize smollm2-135m-instruct served/smollm2-int8 --scheme int8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a dense model: a Hub id, a folder of a model, a packaged model")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write, which must not exist or be empty")
    parser.add_argument(
        "--scheme", choices=("int8", "int4", "fp8"), required=True,
        help="int8 and fp8: weights and activations; int4: weights alone",
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="of int4: inputs that share a scale; default: 64"
    )


def run(args: argparse.Namespace) -> int:
    """Load the model, round it, save it with its tokenizer."""
    output = new_folder(args.output)
    if args.group_size is not None and (args.scheme != "int4" or args.group_size < 1):
        must = "at least 1" if args.scheme == "int4" else f"left out for {args.scheme}, which has a scale an output"
        raise ConfigError(f"--group-size is {args.group_size}, and must be {must}; remove it, or use int4 with 64")
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ConfigError("quantized checkpoints need compressed-tensors; install it: pip install 'alignlab[quantize]'")
    model, tokenizer = load_whole(args.model, "MODEL", "bfloat16")

    from alignlab.models.hub.quantized_export import SCHEMES, check_quantizable, write_quantized
    from alignlab.models.hub.saving import published

    group_size = args.group_size or 64
    checked = check_quantizable(model, args.scheme, group_size)
    with published(output) as unfinished:
        error = write_quantized(checked, unfinished, args.scheme, group_size)
        tokenizer.save_pretrained(unfinished)
    print(
        f"alignlab quantize: wrote {output}: {SCHEMES[args.scheme]}; rounding moved the weights by {error:.1%}",
        file=sys.stderr,
    )
    return 0
