"""What `alignlab check` says of a config's data: rows are read as the training reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.config.data import DataSettings
    from alignlab.config.run import RunConfig
    from alignlab.data.prompts import PromptDataset
    from alignlab.data.sequences import HasSequences
    from alignlab.types import Prompt

Described = tuple[str, Sequence["HasSequences"]]
Describe = Callable[["DataSettings", "PreTrainedTokenizerBase", Any], Described]

NOT_MEASURED = {
    "accuracy": "accuracy will not be measured",
    "preferences": "how often the chosen completion leads will not be measured",
    "likelihood": "how likely held-out completions are will not be measured",
    "labels": "how often labels are agreed with will not be measured",
}


class Data(NamedTuple):
    """What is said of a source, the prompts that the policy answers, the examples that are learnt from, and whether
    those that do not fit are skipped."""

    lines: Sequence[str] = ()
    prompts: Sequence[Prompt] = ()
    examples: Sequence[HasSequences] = ()
    skips: bool = False


def training_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """What is learnt from; of trainers that measure accuracy, the prompts too.

    Raises:
        ConfigError, DataError: the training would refuse it.
    """
    from alignlab.data.prompts import load_prompts

    describe = fixed_data().get(config.trainer.type)
    if describe is not None:
        line, examples = describe(config.data, tokenizer, config.trainer)
        prompts = load_prompts(config.data, tokenizer) if config.trainer.measures == "accuracy" else ()
        return Data([line], prompts, examples, config.data.on_bad_row == "skip")
    prompts = load_prompts(config.data, tokenizer)
    return Data([prompts_line(prompts)], prompts)


def held_out_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """What is measured on.

    Raises:
        ConfigError, DataError: the training would refuse it.
    """
    from alignlab.data.prompts import load_prompts
    from alignlab.trainers.run import measured_data

    measures, settings = config.trainer.measures, measured_data(config)
    if settings is None:
        return Data([f"none: {NOT_MEASURED[measures]}"])
    if measures != "accuracy":
        line, examples = fixed_data()[config.trainer.type](settings, tokenizer, config.trainer)
        return Data([line], (), examples, settings.on_bad_row == "skip")
    prompts = load_prompts(settings, tokenizer)
    return Data([prompts_line(prompts)], prompts)


def fixed_data() -> Mapping[str, Describe]:
    """By `trainer.type`, what reads the examples of trainers that learn from a fixed set, and says how many."""
    return {
        "sft": completions, "distill": completions, "dpo": pairs, "reward": pairs, "kto": labelled,
    }


def completions(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, trainer: Any) -> Described:
    """Completions to learn from."""
    from alignlab.data.examples import load_examples

    examples = load_examples(settings, tokenizer)
    taught = sum(sum(example.completion_mask) for example in examples) / len(examples)
    told = f"{len(examples)} examples of {lengths([len(example.token_ids) for example in examples])}"
    return f"{told}, of which {taught:.0f} taught{skips(examples.skipped)}", examples


def pairs(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, trainer: Any) -> Described:
    """Pairs of completions."""
    from alignlab.data.preferences import load_preferences

    columns = {name: getattr(trainer, name, None) for name in ("margin_column", "probability_column")}
    found = load_preferences(settings, tokenizer, **columns)
    each = [len(pair.prompt) + pair.num_tokens for pair in found]
    return f"{len(found)} pairs of {lengths(each)} with their prompt{skips(found.skipped)}", found


def labelled(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, trainer: Any) -> Described:
    """Completions that are labelled good or bad."""
    from alignlab.data.unpaired import load_unpaired

    found = load_unpaired(settings, tokenizer)
    each = [len(one.prompt) + len(one.completion) for one in found]
    good = sum(one.desirable for one in found)
    told = f"{good} desirable and {len(found) - good} undesirable completions of {lengths(each)} with their prompt"
    return told + skips(found.skipped), found


def prompts_line(prompts: PromptDataset) -> str:
    """How many prompts, with which columns."""
    told = f"{len(prompts)} prompts of {lengths([len(prompt.token_ids) for prompt in prompts])}"
    return f"{told}{skips(prompts.skipped)}; columns: {', '.join(prompts.columns) or 'none'}"


def lengths(each: Sequence[int]) -> str:
    """How long they are."""
    return f"{min(each)} to {max(each)} tokens (mean {sum(each) / len(each):.0f})"


def skips(skipped: Counter[str]) -> str:
    """What was left out."""
    return "".join(f", {count} skipped ({reason})" for reason, count in skipped.items())
