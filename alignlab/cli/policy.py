"""The policy and its sampling from the command line: MODEL, --adapter, --dtype and the sampling flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignlab.config.rollout import SamplingSettings

ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
DTYPES = ("auto", "float32", "bfloat16")
# Command-line flags of the fields of SamplingSettings; their defaults are the class's.
SAMPLING_FLAGS = {
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "sample from the k most probable tokens; 0: from all"),
    "top_p": (float, "sample from the smallest set of tokens with this total probability"),
    "min_p": (float, "drop tokens below this fraction of the highest probability"),
    "repetition_penalty": (float, "above 1: makes earlier tokens less probable"),
    "max_new_tokens": (int, "largest length of the completion"),
}


def is_adapter(folder: str) -> bool:
    """Return whether a folder holds an adapter that PEFT wrote."""
    return (Path(folder) / ADAPTER_FILE).is_file()


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --adapter and --dtype."""
    parser.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter to put on the model")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 under an adapter or on a GPU, else float32"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of SamplingSettings, and --stop."""
    for name, (kind, text) in SAMPLING_FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    parser.add_argument("--stop", metavar="TEXT", action="append", help="a string that ends a completion; repeatable")


def sampling_settings(args: argparse.Namespace, **defaults: Any) -> SamplingSettings:
    """Return the sampling of the flags; `defaults` for flags that are left out."""
    from alignlab.config.rollout import SamplingSettings

    flags = {name: getattr(args, name) for name in (*SAMPLING_FLAGS, "stop") if getattr(args, name) is not None}
    return SamplingSettings(**{**defaults, **flags})


def tokenizer_source(model: str, adapter: str | None) -> str:
    """Return the folder of the tokenizer that an adapter was trained with: its own, or else that of its base."""
    return adapter if adapter is not None and (Path(adapter) / TOKENIZER_FILE).is_file() else model


def put_adapter(model: PreTrainedModel | PeftModel, adapter: str) -> PeftModel:
    """Return the model with the adapter of a folder on it.

    Raises:
        CheckpointError: the adapter is damaged, or of another model; or the model is an adapter itself.
    """
    from peft import PeftModel

    from alignlab.models.hub.adapter_files import with_saved_adapter

    if isinstance(model, PeftModel):
        raise CheckpointError(
            f"the model that the adapter {adapter} is to be put on is an adapter itself; give the base of both, or "
            "merge the first one (alignlab merge)"
        )
    return with_saved_adapter(model, adapter)


def resolved_dtype(dtype: str, *, adapted: bool) -> str:
    """Return the dtype that "auto" stands for: bfloat16 under an adapter, whose base is in it while it trains, and on
    a GPU, where float32 takes twice the memory and no tensor cores; else float32."""
    import torch

    if dtype != "auto":
        return dtype
    return "bfloat16" if adapted or torch.cuda.is_available() else "float32"


def load_policy(
    model: str, adapter: str | None, dtype: str = "auto"
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model, with an adapter if one is given, in evaluation mode, on a GPU if there is one; and its tokenizer.

    Raises:
        CheckpointError: one of them cannot be loaded, or `model` is the folder of a run.
    """
    import torch

    from alignlab.models.hub.checkpoints import load_model, load_tokenizer
    from alignlab.runs.folder import refuse_run

    if adapter is not None and not is_adapter(adapter):
        raise CheckpointError(f"--adapter must be a folder that PEFT wrote, and {adapter} has no {ADAPTER_FILE}")
    refuse_run(model, "MODEL")
    adapted = adapter is not None or is_adapter(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = resolved_dtype(dtype, adapted=adapted)
    policy = load_model(model, dtype=getattr(torch, chosen), device=device)
    if adapter is not None:
        policy = put_adapter(policy, adapter)
    return policy.eval(), load_tokenizer(tokenizer_source(model, adapter))
