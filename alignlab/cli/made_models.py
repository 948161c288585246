"""What the commands share that make a model from another one: reading the one, writing the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.cli.policy import is_adapter
from alignlab.errors import ConfigError, DataError

if TYPE_CHECKING:
    import argparse

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignlab.models.pruning.calibration import CalibrationText


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add the argument `--dtype`."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the saved weights"
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `calibration_text`."""
    parser.add_argument(
        "--data", metavar="FILE", help="rows as SFT reads them (prompt and completion, or messages) to measure on"
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=8192, metavar="N", help="tokens of them; default: 8192"
    )


def load_whole(path: str, name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name: of the argument, for messages.
        dtype: "float32" or "bfloat16".

    Raises:
        ConfigError: it is a run, or an adapter.
    """
    from alignlab.runs.folder import refuse_run

    refuse_run(path, name)
    if is_adapter(path):
        raise ConfigError(f"{name} must be a model, and {path} is an adapter; merge it first: alignlab merge")

    import torch

    from alignlab.models.decoder import causal_lm
    from alignlab.models.hub.checkpoints import load_model, load_tokenizer

    return causal_lm(load_model(path, dtype=getattr(torch, dtype))), load_tokenizer(path)


def save_whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, description: str, *, fix: str
) -> None:
    """Check a model's weights, and publish it with its tokenizer.

    Args:
        description: of its weights, for messages.
        fix: the advice where a weight is not finite.
    """
    from alignlab.models.finite import check_finite
    from alignlab.models.hub.checkpoints import save_model
    from alignlab.models.hub.saving import published

    check_finite(model.state_dict().items(), description, fix=fix)
    with published(output) as unfinished:
        save_model(model, unfinished)
        tokenizer.save_pretrained(unfinished)


def num_parameters(model: PreTrainedModel) -> int:
    """Return the number of a model's weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def calibration_text(path: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> CalibrationText:
    """Return the first examples of a file of rows for SFT, `num_tokens` at most; the last one may be cut.

    Raises:
        ConfigError: `num_tokens` is below 64, or see `load_examples`.
        DataError: a row cannot be used, or the file has less than an eighth of `num_tokens`.
    """
    import torch

    from alignlab.config.data import DataSettings
    from alignlab.data.examples import load_examples
    from alignlab.models.pruning.calibration import CalibrationText
    from alignlab.types import Segments

    if num_tokens < 64:
        raise ConfigError(f"--calibration-tokens is {num_tokens}, and must be at least 64; raise it")
    sequences: list[tuple[int, ...]] = []
    left = num_tokens
    for example in load_examples(DataSettings(path=path), tokenizer):
        if left == 0:
            break
        sequences.append(example.token_ids[:left])
        left -= len(sequences[-1])
    found = num_tokens - left
    if found * 8 < num_tokens:
        raise DataError(
            f"{path} must have {num_tokens // 8:,} tokens, an eighth of --calibration-tokens, and has {found:,}; give "
            "more rows, or lower --calibration-tokens"
        )
    count = len(sequences)
    segments = Segments(tuple(map(len, sequences)), (-1,) * count, tuple(range(count)), tuple(range(count)))
    return CalibrationText(torch.tensor([token for ids in sequences for token in ids]), segments)
