"""The data part of `alignlab check`: number and lengths of the rows, which are read as the training reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from alignlab.cli.checked_run import CheckedRun, RowsOfSource

NOT_MEASURED = {
    "accuracy": "accuracy will not be measured",
    "preferences": "how often the chosen completion leads will not be measured",
    "likelihood": "the likelihood of held-out completions will not be measured",
    "labels": "the agreement with labels will not be measured",
}


def data_lines(run: CheckedRun) -> Iterator[str]:
    """Yield a description of the training data.

    Raises:
        ConfigError, DataError: the training would refuse the data.
    """
    yield _described(run.training_rows, run.config.trainer.type)


def held_out_lines(run: CheckedRun) -> Iterator[str]:
    """Yield a description of the held-out data, or what is not measured without any.

    Raises:
        ConfigError, DataError: the training would refuse the data.
    """
    if run.held_out_rows is None:
        yield f"none: {NOT_MEASURED[run.config.trainer.measures]}"
    else:
        yield _described(run.held_out_rows, run.config.trainer.type)


def _described(rows: RowsOfSource, trainer_type: str) -> str:
    from alignlab.data.prompts import column_names

    examples: Any = rows.examples
    if examples:
        return _EXAMPLES[trainer_type](examples) + _skipped(examples.skipped)
    prompts: Any = rows.prompts
    text = f"{len(prompts)} prompts of {_lengths([len(prompt.token_ids) for prompt in prompts])}"
    return f"{text}{_skipped(prompts.skipped)}; columns: {', '.join(column_names(prompts)) or 'none'}"


def _completions(examples: Sequence[Any]) -> str:
    taught = sum(sum(example.completion_mask) for example in examples) / len(examples)
    lengths = _lengths([len(example.token_ids) for example in examples])
    return f"{len(examples)} examples of {lengths}, of which {taught:.0f} taught"


def _pairs(pairs: Sequence[Any]) -> str:
    lengths = _lengths([len(pair.prompt) + pair.num_tokens for pair in pairs])
    return f"{len(pairs)} pairs of {lengths} with their prompt"


def _labelled(examples: Sequence[Any]) -> str:
    lengths = _lengths([len(example.prompt) + len(example.completion) for example in examples])
    num_good = sum(example.desirable for example in examples)
    num_bad = len(examples) - num_good
    return f"{num_good} desirable and {num_bad} undesirable completions of {lengths} with their prompt"


_EXAMPLES = {"sft": _completions, "distill": _completions, "dpo": _pairs, "reward": _pairs, "kto": _labelled}


def _lengths(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)} tokens (mean {sum(counts) / len(counts):.0f})"


def _skipped(skipped: Counter[str]) -> str:
    return "".join(f", {count} skipped ({reason})" for reason, count in skipped.items())
