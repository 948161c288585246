"""Make a student from some of a teacher's layers, neurons, heads and channels, and save it with its tokenizer.

Layers are cut first, widths then, of what says least on the rows of --data. The student has the teacher's Hub family
where the family has such a shape. Train it before use: by distillation, or on the teacher's samples.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from alignlab.cli.made_models import (
    add_calibration,
    add_dtype,
    calibration_text,
    load_whole,
    num_parameters,
    save_whole,
)  # fmt: skip
from alignlab.cli.places import new_folder
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIX = "they come from the teacher: take another checkpoint"
NAME = "student"
SUMMARY = "make a smaller model from some of a teacher's layers, neurons, heads and channels"
EXAMPLE = "alignlab student smollm2-135m-instruct students/smollm2-15 --num-layers 15"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("teacher", metavar="TEACHER", help="a Hub id, a folder of a model, a packaged model")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write, which must not exist or be empty")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--layers", type=int, nargs="+", metavar="I", help="layers to keep, counted from 0")
    choice.add_argument(
        "--num-layers", type=int, metavar="N",
        help="number of layers to keep, evenly spaced, the first and last included"
    )
    parser.add_argument("--intermediate-size", type=int, metavar="N", help="neurons of each feed-forward to keep")
    parser.add_argument(
        "--key-value-heads", type=int, metavar="N", help="keys of each layer to keep, with all their query heads"
    )
    parser.add_argument("--hidden-size", type=int, metavar="N", help="channels of the stream to keep")
    add_calibration(parser)
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Load the teacher, cut it, save the student."""
    output = new_folder(args.output)
    widths = (args.intermediate_size, args.key_value_heads, args.hidden_size)
    cuts_width = any(size is not None for size in widths)
    _check(args, cuts_width)
    teacher, tokenizer = load_whole(args.teacher, "TEACHER", args.dtype)
    size = num_parameters(teacher)
    student, said = teacher, []
    if args.layers or args.num_layers is not None:
        from alignlab.models.layer_pruning import chosen_layers, student_from

        layers = chosen_layers(teacher, args.layers, args.num_layers)
        student = student_from(teacher, layers)
        said.append(f"layers {' '.join(map(str, layers))}")
    if cuts_width:
        student = _narrowed(student, tokenizer, args)
        config = student.config
        said.append(
            f"{config.intermediate_size} neurons, {config.num_attention_heads} heads on {config.num_key_value_heads} "
            f"keys, {config.hidden_size} channels"
        )
    save_whole(student, tokenizer, output, "the student's weights", fix=FIX)
    left = num_parameters(student)
    print(
        f"alignlab student: wrote {output}, {', '.join(said)}: {left:,} of {size:,} parameters ({left / size:.0%})",
        file=sys.stderr,
    )
    return 0


def _check(args: argparse.Namespace, cuts_width: bool) -> None:
    if not cuts_width and args.data is not None:
        raise ConfigError("--data is read to cut widths, and none is cut; remove it, or give --intermediate-size")
    if cuts_width and args.data is None:
        raise ConfigError(
            "widths are cut by what neurons, heads and channels say on text, and there is no --data; give a file of "
            "rows, such as `alignlab sample` writes"
        )
    if not cuts_width and args.layers is None and args.num_layers is None:
        raise ConfigError(
            "a student has less than its teacher; give --num-layers, --layers, --intermediate-size, --key-value-heads "
            "or --hidden-size"
        )


def _narrowed(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> PreTrainedModel:
    from alignlab.models.pruning.importance import importance_of
    from alignlab.models.pruning.width import Width, check_width, narrowed

    width = Width(args.intermediate_size, args.key_value_heads, args.hidden_size)
    checked = check_width(teacher, width)
    text = calibration_text(args.data, tokenizer, args.calibration_tokens)
    return narrowed(checked, width, importance_of(checked, text))
