"""The data part of `alignlab check`: rows as the training reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignlab.run_from_config import CheckedRun

NOT_MEASURED = {
    "accuracy": "accuracy will not be measured",
    "preferences": "how often the chosen completion leads will not be measured",
    "likelihood": "the likelihood of held-out completions will not be measured",
    "labels": "the agreement with labels will not be measured",
}


def data_line(checked: CheckedRun) -> str:
    """Return a description of the training data."""
    return _described(checked.preflight.train)


def held_out_line(checked: CheckedRun) -> str:
    """Return a description of the held-out data, or what is not measured without any."""
    if checked.config.measured_data is None:
        return f"none: {NOT_MEASURED[checked.config.trainer.measures]}"
    return _described(checked.preflight.held_out)


def _described(items: Sequence[Any]) -> str:
    from alignlab.data.dataset import Dataset
    from alignlab.data.examples import Example
    from alignlab.data.preferences import Preference
    from alignlab.data.prompts import column_names
    from alignlab.data.unpaired import UnpairedPreference

    match items[0]:
        case Example():
            text = _completions(items)
        case Preference():
            text = f"{len(items)} pairs of {_lengths([len(p.prompt) + p.num_tokens for p in items])} with their prompt"
        case UnpairedPreference():
            text = _labelled(items)
        case _:
            text = f"{len(items)} prompts of {_lengths([len(prompt.token_ids) for prompt in items])}"
            text += f"; columns: {', '.join(column_names(items)) or 'none'}"
    skipped = items.skipped if isinstance(items, Dataset) else {}
    return text + "".join(f", {count} skipped ({reason})" for reason, count in skipped.items())


def _completions(examples: Sequence[Any]) -> str:
    taught = sum(sum(example.completion_mask) for example in examples) / len(examples)
    lengths = _lengths([len(example.token_ids) for example in examples])
    return f"{len(examples)} examples of {lengths}, of which {taught:.0f} taught"


def _labelled(examples: Sequence[Any]) -> str:
    lengths = _lengths([len(example.prompt) + len(example.completion) for example in examples])
    num_good = sum(example.desirable for example in examples)
    num_bad = len(examples) - num_good
    return f"{num_good} desirable and {num_bad} undesirable completions of {lengths} with their prompt"


def _lengths(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)} tokens (mean {sum(counts) / len(counts):.0f})"
