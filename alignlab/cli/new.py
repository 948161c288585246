"""Make a model with random weights from a preset, a named architecture, and save it with a tokenizer.

--list shows the presets: their parameters, those that multiply a token, the arithmetic of a token's forward pass, what
the cache keeps of a token and of a sequence, and hidden size over layers. Fields of the model are given as key=value,
for the list too. A model may also be made when it is trained: model.architecture={preset: kda, hidden_size: 128}.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from alignlab.cli.places import new_folder
from alignlab.errors import ConfigError

NAME = "new"
SUMMARY = "make a model with random weights from a named architecture, or list those"
EXAMPLE = "alignlab new qwen3_next models/tiny --tokenizer smollm2-135m-instruct hidden_size=128 num_hidden_layers=8"
LISTED_VOCAB = 32_768


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("preset", metavar="PRESET", nargs="?", help="name of an architecture, see --list")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="folder to write, which must not exist or be empty")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="fields that replace those of the preset")
    parser.add_argument("--list", action="store_true", help="show all presets, with the fields given as key=value")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="whose vocabulary the model has: a Hub id, a folder, a packaged model"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the weights; default: 0")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the saved weights; default: float32"
    )


def run(args: argparse.Namespace) -> int:
    """Show the presets, or make a model and save it."""
    from alignlab.config.loader import apply_override

    words = [word for word in (args.preset, args.output, *args.overrides) if word is not None]
    names = [word for word in words if "=" not in word]
    changes: dict[str, Any] = {}
    for word in words:
        if "=" in word:
            apply_override(changes, word)
    if "preset" in changes:
        raise ConfigError(f"preset={changes['preset']} is given, and the preset is named by PRESET; leave it out")
    if args.list:
        if names:
            raise ConfigError(f"{names[0]} is given with --list, which shows all presets; leave one of the two out")
        _refuse_with_list(args)
        _show(changes)
        return 0
    if len(names) != 2 or args.tokenizer is None:
        raise ConfigError(
            f"alignlab {NAME} needs PRESET, OUTPUT and --tokenizer, or --list; for example {EXAMPLE}"
        )
    _make(names[0], names[1], changes, args)
    return 0


def _refuse_with_list(args: argparse.Namespace) -> None:
    """Raise if an option of a model is given, where none is made."""
    for name in ("tokenizer", "seed", "dtype"):
        value = getattr(args, name)
        if value is not None:
            raise ConfigError(
                f"--{name} is {value}, and --list makes no model that has one; leave it out (vocab_size=N shows "
                "presets of another vocabulary)"
            )


def _show(changes: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from alignlab.models.architectures import architecture_fields
    from alignlab.models.config_rules import require_size
    from alignlab.models.model_sizes import COLUMNS, model_sizes, row
    from alignlab.models.presets import PRESETS, preset_config, preset_names

    vocab_size = changes.pop("vocab_size", LISTED_VOCAB)
    require_size("vocab_size", vocab_size, LISTED_VOCAB)
    changes = architecture_fields(changes)
    table = Table(title=f"presets, vocabulary {vocab_size:,}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", no_wrap=True)
    left_out = []
    for name in preset_names():
        try:
            sizes = model_sizes(preset_config(name, vocab_size=vocab_size, **changes))
        except ConfigError as error:
            left_out.append(f"{name}: {error}")
            continue
        table.add_row(*row(name, PRESETS[name].paper, sizes))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for name in preset_names():
        print(f"{name:16} {PRESETS[name].summary}")
    for line in left_out:
        print(f"not with these fields: {line}", file=sys.stderr)


def _make(preset: str, output: str, changes: dict[str, Any], args: argparse.Namespace) -> None:
    folder = new_folder(output)

    import torch

    from alignlab.data.vocabulary import num_token_ids
    from alignlab.models.hub.checkpoints import load_tokenizer, new_model, save_model
    from alignlab.models.hub.saving import published

    tokenizer = load_tokenizer(args.tokenizer)
    torch.manual_seed(args.seed or 0)
    dtype = getattr(torch, args.dtype or "float32")
    model = new_model(
        {"preset": preset, **changes}, vocab_size=num_token_ids(tokenizer), dtype=dtype,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )
    with published(folder) as unfinished:
        save_model(model, unfinished)
        tokenizer.save_pretrained(unfinished)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"alignlab {NAME}: wrote {folder}, {preset} with {size:,} random parameters", file=sys.stderr)
