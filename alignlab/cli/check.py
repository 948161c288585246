"""Check a config without training: load its tokenizer and data, try its rewards on one row, say what would run.

Models are made without their weights. Whatever a training would refuse at its start or at its end is refused here, by
the same code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from alignlab.cli.check_data import data_lines, held_out_lines
from alignlab.cli.check_models import (
    check_endings,
    check_engines,
    check_fit,
    check_warm_start,
    judge_lines,
    server_notes,
    teacher_lines,
)
from alignlab.cli.check_rewards import reward_lines
from alignlab.cli.checked_run import CheckedRun
from alignlab.cli.train import add_config_arguments

NAME = "check"
SUMMARY = "check a config, its data and its rewards without training"
EXAMPLE = "alignlab check configs/grpo_smollm2_cpu.yaml trainer.recipe=dapo"

# An adapter's learning rate is about ten times that of full fine-tuning.
LOW_LORA_RATE, HIGH_FULL_RATE = 1e-5, 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check the config, and print a line for each thing that was checked."""
    from alignlab.cli.prerequisites import check_prerequisites
    from alignlab.config.loader import load_config

    config = load_config(args.config, args.overrides)
    check_prerequisites(config, args.config)
    checked = CheckedRun(config)
    for subject, check in CHECKS:
        for line in check(checked):
            print(f"{subject:10} {line}", flush=True)
    print("ok: nothing was trained")
    return 0


def model_lines(run: CheckedRun) -> Iterator[str]:
    """Yield the weights that would be trained."""
    model = run.config.model
    source = f"a new one: {model.architecture}" if model.name is None else model.name
    if model.student is not None:
        layers = model.student.layers or f"{model.student.num_layers}, evenly spaced"
        source = f"a student of {source}, layers {layers}"
    weights = f"LoRA rank {model.lora.rank} alpha {model.lora.alpha:g}" if model.lora else "all weights"
    yield f"{source}, {weights} trained, dtype {model.dtype}"


def tokenizer_lines(run: CheckedRun) -> Iterator[str]:
    """Yield the size and the special features of the tokenizer."""
    tokenizer = run.tokenizer
    template = "with" if tokenizer.chat_template else "without"
    yield f"{len(tokenizer)} tokens, {template} a chat template, end token {tokenizer.eos_token!r}"


def trainer_lines(run: CheckedRun) -> Iterator[str]:
    """Yield the method and the size of each training."""
    for stage in run.stages:
        common = f"{stage.num_steps} steps, learning rate {stage.optim.learning_rate:g}"
        yield f"{stage.method}: {common}, into {run.config.trainer.output_dir}; {stage.step}"


def notes(run: CheckedRun) -> Iterator[str]:
    """Yield what is allowed and worth knowing before a run."""
    from alignlab.config.trainers import GRPOConfig
    from alignlab.types import message_text

    yield from rate_notes(run)
    for stage in run.stages:
        if isinstance(stage, GRPOConfig):
            yield from stage.warnings
    measured = run.held_out_rows.prompts if run.held_out_rows else ()
    texts, measured_texts = (
        {message_text(prompt.text) for prompt in prompts} for prompts in (run.training_rows.prompts, measured)
    )
    if texts & measured_texts:
        shared = len(texts & measured_texts)
        yield f"{shared} evaluation prompts are also trained on, so their accuracy shows memory, not skill"
    folder = run.config.trainer.output_dir
    if folder.exists() and any(folder.iterdir()):
        yield f"{folder} holds a run: use --resume, or another trainer.output_dir"


def rate_notes(run: CheckedRun) -> Iterator[str]:
    """Yield learning rates that are allowed and unusual."""
    model = run.config.model
    for rate in dict.fromkeys(stage.optim.learning_rate for stage in run.stages):
        if model.lora and rate < LOW_LORA_RATE:
            yield f"learning rate {rate:g} is low for LoRA, which takes about ten times that of full fine-tuning"
        if model.name and not model.lora and rate >= HIGH_FULL_RATE:
            yield f"learning rate {rate:g} is high for all weights of a trained model; 1e-6 to 1e-5 is usual"


CHECKS: tuple[tuple[str, Callable[[CheckedRun], Iterator[str]]], ...] = (
    ("engine", check_engines),
    ("model", model_lines),
    ("tokenizer", tokenizer_lines),
    ("data", data_lines),
    ("eval data", held_out_lines),
    ("reward", reward_lines),
    ("judge", judge_lines),
    ("trainer", trainer_lines),
    ("teacher", teacher_lines),
    ("fit", check_fit),
    ("warm start", check_warm_start),
    ("end", check_endings),
    ("note", server_notes),
    ("note", notes),
)
"""Each check yields lines for the user, or raises the error that the training would raise."""
