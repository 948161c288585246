"""Make a student from some of a teacher's layers, and save it as the teacher's Hub family, with its tokenizer.

The student has the teacher's widths, embeddings, norms and head. Train it before use: by distillation, or on the
teacher's samples.
"""

from __future__ import annotations

import argparse
import sys

from alignlab.cli.places import new_folder
from alignlab.cli.policy import is_adapter
from alignlab.errors import ConfigError

FIX = "they come from the teacher: take another checkpoint"
NAME = "student"
SUMMARY = "make a smaller model from some of a teacher's layers"
EXAMPLE = "alignlab student smollm2-135m-instruct students/smollm2-15 --num-layers 15"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("teacher", metavar="TEACHER", help="a Hub id, a folder of a model, a packaged model")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write, which must not exist or be empty")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--layers", type=int, nargs="+", metavar="I", help="layers to keep, counted from 0")
    choice.add_argument(
        "--num-layers", type=int, metavar="N",
        help="number of layers to keep, evenly spaced, the first and last included"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the saved weights"
    )


def run(args: argparse.Namespace) -> int:
    """Load the teacher, take the layers, save the student."""
    output = new_folder(args.output)
    from alignlab.runs.folder import refuse_run

    refuse_run(args.teacher, "TEACHER")
    if is_adapter(args.teacher):
        raise ConfigError(f"TEACHER must be a model, and {args.teacher} is an adapter; merge it first: alignlab merge")

    import torch

    from alignlab.models.finite import check_finite
    from alignlab.models.hub.checkpoints import load_model, load_tokenizer, save_model
    from alignlab.models.hub.saving import published
    from alignlab.models.layer_pruning import chosen_layers, student_from

    tokenizer = load_tokenizer(args.teacher)
    teacher = load_model(args.teacher, dtype=getattr(torch, args.dtype))
    layers = chosen_layers(teacher, args.layers, args.num_layers)
    student = student_from(teacher, layers)
    check_finite(student.state_dict().items(), "the student's weights", fix=FIX)
    with published(output) as unfinished:
        save_model(student, unfinished)
        tokenizer.save_pretrained(unfinished)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    print(
        f"alignlab student: wrote {output}, layers {' '.join(map(str, layers))}: {sizes[0]:,} of {sizes[1]:,} "
        f"parameters ({sizes[0] / sizes[1]:.0%})",
        file=sys.stderr,
    )
    return 0
