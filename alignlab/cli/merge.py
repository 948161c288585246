"""Merge a LoRA adapter into its base model's weights, and save the result as the base's Hub family, with its tokenizer.

The adapter of a reward model gives a sequence-classification model. Weights are added in float32 and rounded once. If
an adapter on the embeddings or the head makes the two differ, a model that ties them is saved untied.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cli.made_models import add_dtype, save_whole
from alignlab.cli.places import new_folder
from alignlab.cli.policy import ADAPTER_FILE, is_adapter, put_adapter, tokenizer_source
from alignlab.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FIX = "they come from the adapter or its base: take an earlier checkpoint"
NAME = "merge"
SUMMARY = "merge a LoRA adapter into its model's weights"
EXAMPLE = "alignlab merge runs/grpo_smollm2_cpu/adapter merged/smollm2-sums --dtype bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter, written by a run or by PEFT")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write, which must not exist or be empty")
    parser.add_argument("--model", metavar="MODEL", help="base model; default: the one that the adapter names")
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Load the adapter and its base, merge them, save the result."""
    output = new_folder(args.output)
    from alignlab.runs.folder import refuse_run

    refuse_run(args.adapter, "ADAPTER")
    if not is_adapter(args.adapter):
        raise CheckpointError(f"ADAPTER must be a folder that PEFT wrote, and {args.adapter} has no {ADAPTER_FILE}")

    import torch

    from alignlab.models.hub.reward_checkpoints import is_reward_model

    merge = _merge_reward if is_reward_model(args.adapter) else _merge
    merge(args, output, getattr(torch, args.dtype))
    print(f"alignlab merge: wrote {output}", file=sys.stderr)
    return 0


def _merge(args: argparse.Namespace, output: Path, dtype: torch.dtype) -> None:
    import torch
    from peft import PeftModel

    from alignlab.models.hub.checkpoints import load_model, load_tokenizer
    from alignlab.models.merging import merge_adapter

    if args.model is None:
        model = load_model(args.adapter, dtype=torch.float32)
    else:
        model = put_adapter(load_model(args.model, dtype=torch.float32), args.adapter)
    assert isinstance(model, PeftModel)
    merged = merge_adapter(model)
    torch.nn.Module.to(merged, dtype)
    tokenizer = load_tokenizer(tokenizer_source(args.model or args.adapter, args.adapter))
    save_whole(merged, tokenizer, output, "the merged weights", fix=FIX)


def _merge_reward(args: argparse.Namespace, output: Path, dtype: torch.dtype) -> None:
    import torch

    from alignlab.models.finite import check_finite
    from alignlab.models.hub.checkpoints import load_model, load_tokenizer
    from alignlab.models.hub.reward_checkpoints import load_reward_model, padded_tokenizer, save_reward_model
    from alignlab.models.hub.saving import published
    from alignlab.models.merging import merge_adapter

    base: Any = None if args.model is None else load_model(args.model, dtype=torch.float32)
    reward = load_reward_model(args.adapter, dtype=torch.float32, base=base)
    adapted: Any = reward.model
    merged: Any = merge_adapter(adapted)
    reward.model = merged.to(dtype)
    tokenizer = load_tokenizer(tokenizer_source(args.model or args.adapter, args.adapter))
    check_finite(reward.state_dict().items(), "the merged weights", fix=FIX)
    with published(output) as unfinished:
        save_reward_model(reward, unfinished, padded_tokenizer(tokenizer))
