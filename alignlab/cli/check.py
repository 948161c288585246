"""Check a config without training: load its tokenizer and data, try its rewards on one sample, say what would run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from alignlab.cli.train import add_config_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.config.run import RunConfig
    from alignlab.config.trainers import TrainerConfig
    from alignlab.data.prompts import PromptDataset
    from alignlab.types import Prompt, Rollout

NAME = "check"
SUMMARY = "check a config, its data and its rewards without training"
EXAMPLE = "alignlab check configs/grpo_smollm2_cpu.yaml trainer.recipe=dapo"

# An adapter's learning rate is about ten times that of full fine-tuning.
LOW_LORA_RATE, HIGH_FULL_RATE = 1e-5, 1e-4
WRONG_ANSWER = "I do not know."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Load everything but the model, and tell."""
    from alignlab.config.loader import load_config

    config = load_config(args.config, args.overrides)

    from alignlab.data.prompts import load_prompts
    from alignlab.trainers.run import evaluation_data, make_tokenizer

    check_engine(config.trainer)
    tell("model", model_line(config))
    tokenizer = make_tokenizer(config)
    template = "with" if tokenizer.chat_template else "without"
    tell("tokenizer", f"{len(tokenizer)} tokens, {template} a chat template, end token {tokenizer.eos_token!r}")
    prompts = load_prompts(config.data, tokenizer)
    tell("data", data_line(prompts))
    held_out = evaluation_data(config)
    eval_prompts = load_prompts(held_out, tokenizer) if held_out else None
    tell("eval data", data_line(eval_prompts) if eval_prompts else "none: accuracy will not be measured")
    for line in try_rewards(config, prompts[0], tokenizer):
        tell("reward", line)
    tell("trainer", trainer_line(config.trainer))
    for line in notes(config, prompts, eval_prompts):
        tell("note", line)
    print("ok: nothing was trained")
    return 0


def check_engine(trainer: TrainerConfig) -> None:
    """See that the rollout engine is installed.

    Raises:
        ConfigError: it is vLLM, and missing or of a version that was not tested.
    """
    from alignlab.config.trainers import GRPOConfig
    from alignlab.rollout.vllm.requirement import require_vllm

    if isinstance(trainer, GRPOConfig) and trainer.rollout.engine == "vllm":
        require_vllm()


def tell(what: str, text: str) -> None:
    """One line of the result."""
    print(f"{what:10} {text}", flush=True)


def model_line(config: RunConfig) -> str:
    """Which weights would be trained."""
    model = config.model
    what = f"a new one: {model.architecture}" if model.name is None else model.name
    lora = f"LoRA rank {model.lora.rank} alpha {model.lora.alpha:g}" if model.lora else "all weights"
    return f"{what}, {lora} trained, dtype {model.dtype}"


def data_line(prompts: PromptDataset) -> str:
    """How many prompts, how long, with which columns."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    skipped = "".join(f", {count} skipped ({reason})" for reason, count in prompts.skipped.items())
    return (
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens (mean {sum(lengths) / len(lengths):.0f})"
        f"{skipped}; columns: {', '.join(prompts.columns) or 'none'}"
    )


def try_rewards(config: RunConfig, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Each reward's value of the first row's own answer and of a wrong one.

    Raises:
        RewardError: a function fails.
    """
    from alignlab.config.rewards import RewardLimits, RewardSettings
    from alignlab.config.trainers import GRPOConfig
    from alignlab.training.reward_functions import load_reward
    from alignlab.training.reward_runner import RewardRunner

    limits = config.trainer.reward_limits if isinstance(config.trainer, GRPOConfig) else RewardLimits()
    scorer = (RewardSettings(name=config.evaluation.scorer),) if config.evaluation.scorer else ()
    runner = RewardRunner(
        [load_reward(each) for each in (*config.rewards, *scorer)], limits.model_copy(update={"max_failures": 0})
    )
    texts = [str(prompt.columns["answer"])] if "answer" in prompt.columns else []
    try:
        [scored] = runner.score([sample_rollout(prompt, [*texts, WRONG_ANSWER], tokenizer)])
    finally:
        runner.close()
    for name, values in scored.reward_parts.items():
        told = [f"{value} for {c.text!r}" for value, c in zip(values, scored.completions, strict=True)]
        yield f"{name}: {', '.join(told)}"


def sample_rollout(prompt: Prompt, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """A rollout that says `texts`, as an engine would return it."""
    from alignlab.types import Completion, Rollout

    completions = []
    for text in texts:
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        zeros = (0.0,) * len(ids)
        completions.append(Completion(ids, text, zeros, zeros, "stop", (0,) * len(ids)))
    return Rollout(prompt, tuple(completions))


def trainer_line(trainer: TrainerConfig) -> str:
    """What would be run."""
    from alignlab.config.trainers import GRPOConfig, SFTConfig

    common = f"{trainer.num_steps} steps, learning rate {trainer.learning_rate:g}, into {trainer.output_dir}"
    if isinstance(trainer, SFTConfig):
        return f"sft: {common}; {trainer.num_sequences} examples a step"
    assert isinstance(trainer, GRPOConfig)
    return (
        f"{trainer.recipe} = {trainer.advantage} + {trainer.surrogate} + {trainer.reduction}: {common}; "
        f"{trainer.num_prompts} prompts x {trainer.group_size} completions of at most "
        f"{trainer.sampling.max_new_tokens} tokens and {trainer.num_epochs * trainer.num_minibatches} updates a step"
    )


def rate_notes(config: RunConfig) -> Iterator[str]:
    """A learning rate that is allowed and unusual."""
    rate = config.trainer.learning_rate
    if config.model.lora and rate < LOW_LORA_RATE:
        yield f"learning rate {rate:g} is low for LoRA, which takes about ten times that of full fine-tuning"
    if config.model.name and not config.model.lora and rate >= HIGH_FULL_RATE:
        yield f"learning rate {rate:g} is high for all weights of a trained model; 1e-6 to 1e-5 is usual"


def notes(config: RunConfig, prompts: PromptDataset, eval_prompts: PromptDataset | None) -> Iterator[str]:
    """What is allowed and worth knowing before a run."""
    from alignlab.types import message_text

    yield from rate_notes(config)
    shared = {message_text(p.text) for p in prompts} & {message_text(p.text) for p in eval_prompts or ()}
    if shared:
        yield f"{len(shared)} evaluation prompts are also trained on, so their accuracy shows memory, not skill"
    if config.trainer.output_dir.exists() and any(config.trainer.output_dir.iterdir()):
        yield f"{config.trainer.output_dir} holds a run: use --resume, or another trainer.output_dir"
