"""The policy and its sampling from the command line: MODEL, --adapter, --dtype and the sampling flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.errors import CheckpointError, ConfigError

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
    "typical_p": (float, "sample from the tokens of about the expected surprise, with this total probability"),
    "repetition_penalty": (float, "above 1: makes earlier tokens less probable"),
    "presence_penalty": (float, "taken off the logits of tokens that the completion has"),
    "frequency_penalty": (float, "taken off the logits of the completion's tokens, as often as they came"),
    "max_new_tokens": (int, "largest length of the completion"),
}
_TEXT_FLAGS = ("stop", "banned_words", "regex")


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
    """Add the flags of SamplingSettings."""
    for name, (kind, text) in SAMPLING_FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    parser.add_argument("--stop", metavar="TEXT", action="append", help="a string that ends a completion; repeatable")
    parser.add_argument(
        "--ban", metavar="WORD", action="append", dest="banned_words",
        help="a word that is not written, by the tokens that it has alone and after a space; repeatable",
    )
    parser.add_argument(
        "--logit-bias", metavar="ID=X", action="append",
        help="number that is added to the logit of a token id, such as 198=-3 or 28=2.5; repeatable",
    )
    parser.add_argument("--regex", metavar="PATTERN", help="pattern that the whole text must match, such as '[0-9]+'")
    parser.add_argument(
        "--json-schema", metavar="SCHEMA",
        help="JSON schema that the text must fit, as JSON or a file of it; the prompt should ask for JSON all the same",
    )


def sampling_settings(args: argparse.Namespace, **defaults: Any) -> SamplingSettings:
    """Return the sampling of the flags; `defaults` for flags that are left out."""
    from alignlab.config.rollout import SamplingSettings

    flags = {name: getattr(args, name) for name in (*SAMPLING_FLAGS, *_TEXT_FLAGS) if getattr(args, name) is not None}
    if args.logit_bias is not None:
        flags["logit_bias"] = dict(map(_bias, args.logit_bias))
    if args.json_schema is not None:
        flags["json_schema"] = _schema(args.json_schema)
    return SamplingSettings(**{**defaults, **flags})


def _bias(text: str) -> tuple[int, float]:
    """Return a token and what is added to its logit, from ID=X.

    Raises:
        ConfigError: the text is of another form.
    """
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ConfigError(f"--logit-bias is {text!r}, and must be ID=X, such as 198=-3; correct it") from None


def _schema(text: str) -> str:
    """Return a JSON schema, given as JSON or as the path of a file.

    Raises:
        ConfigError: there is no such file, or it is no text.
    """
    if text.lstrip().startswith("{"):
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--json-schema is {text!r}, and must be JSON that begins with {{, or a file of it: {error}; correct it"
        ) from None


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
