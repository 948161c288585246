"""Check a config without training: load its tokenizer and data, try its rewards on one row, say what would run.

Its trainers are made on models without weights. Whatever a training would refuse at its start or at its end is refused
here, by the same code.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from alignlab.cli.check_data import data_line, held_out_line
from alignlab.cli.check_rewards import reward_lines
from alignlab.cli.train import add_config_arguments
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from alignlab.config.run import RunConfig
    from alignlab.data.examples import Example
    from alignlab.run_from_config import CheckedRun
    from alignlab.types import Prompt

NAME = "check"
SUMMARY = "check a config, its data and its rewards without training"
EXAMPLE = "alignlab check configs/grpo_smollm2_cpu.yaml trainer.recipe=dapo"

# An adapter's learning rate is about ten times that of full fine-tuning.
LOW_LORA_RATE, HIGH_FULL_RATE = 1e-5, 1e-4

SMALLER = {
    "weights": "take a smaller model, or model.dtype bfloat16; a reference may be on the host "
    "(trainer.memory.reference_on_host)",
    "gradients and optimizer": "train an adapter (model.lora)",
    "average of weights": "leave trainer.ema out",
    "activations": "set trainer.memory.gradient_checkpointing to true, or lower trainer.memory.tokens_per_microbatch",
    "rollouts": "lower trainer.num_prompts or sampling.max_new_tokens; with the embedded engine rollout.max_running, "
    "rollout.cache_tokens or rollout.swap_gib; or use rollout.engine vllm_server on other GPUs",
}
"""By part of the predicted memory: what makes it smaller."""

Line = tuple[str, str]
"""What a line is about, and its text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="device that memory is predicted for; default: this machine's"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N",
        help="number of ranks that memory is predicted for, where trainer.sharding shares it out (default 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Check the config, and print a line for each thing that was checked."""
    from alignlab.cli.prerequisites import check_prerequisites
    from alignlab.config.loader import load_config

    config = load_config(args.config, args.overrides)
    check_prerequisites(config, args.config)
    if args.ranks < 1:
        raise ConfigError(f"--ranks is {args.ranks}, and must be at least 1")
    for subject, text in check_lines(config, device=args.device, num_ranks=args.ranks):
        print(f"{subject:10} {text}", flush=True)
    print("ok: nothing was trained")
    return 0


def check_lines(config: RunConfig, *, device: str | None = None, num_ranks: int = 1) -> Iterator[Line]:
    """Yield a line for each thing that is checked.

    Args:
        config: of the run.
        device: "cpu" or "cuda", that memory is predicted for; default: this machine's.
        num_ranks: that memory is predicted for.

    Raises:
        AlignlabError: what the training would raise.
    """
    from alignlab.rollout.memory import predicted_for
    from alignlab.run_from_config import check_run

    yield "model", _model_line(config)
    yield "numerics", _numerics_line(config)
    yield from _trainer_lines(config)
    with predicted_for(device, num_ranks):
        checked = check_run(config)
    yield "tokenizer", _tokenizer_line(checked)
    yield "data", data_line(checked)
    yield "eval data", held_out_line(checked)
    yield from checked.preflight.beside.items()
    if checked.preflight.engine:
        yield "engine", f"{checked.preflight.engine} samples completions"
    for line in checked.preflight.weight_decay:
        yield "decay", line
    if checked.preflight.memory:
        yield "memory", _memory_line(config, checked.preflight.memory, device, num_ranks)
    for line in reward_lines(checked):
        yield "reward", line
    # A spread training has more ranks than one, and what each takes is not known here where their number is not given.
    is_known = num_ranks > 1 or not config.trainer.sharding.spreads_training
    here = checked.preflight.memory if is_known and device in (None, _device_here()) else {}
    notes = _server_notes(config), _rate_notes(config), _run_notes(checked), _memory_notes(here)
    for note in itertools.chain(*notes):
        yield "note", note


def _model_line(config: RunConfig) -> str:
    """Return a description of the weights that would be trained."""
    model = config.model
    source = f"a new one: {model.architecture}" if model.name is None else model.name
    if model.student is not None:
        layers = model.student.layers or f"{model.student.num_layers}, evenly spaced"
        source = f"a student of {source}, layers {layers}"
    weights = f"LoRA rank {model.lora.rank} alpha {model.lora.alpha:g}" if model.lora else "all weights"
    return f"{source}, {weights} trained, dtype {model.dtype}"


def _numerics_line(config: RunConfig) -> str:
    """Return precision and order of what is computed on this machine, or that a CPU leaves no choice."""
    import torch

    from alignlab.loop.numerics import no_effect

    numerics = config.trainer.numerics
    if not torch.cuda.is_available():
        given = [name for name in ("tf32", "deterministic") if getattr(numerics, name)]
        return no_effect(given) if given else "products in the weights' dtype, sums in one order, as on every CPU"
    products = "rounded to TF32" if numerics.tf32 else "in all bits of float32, without TF32"
    order = "the same in every run" if numerics.deterministic else "any, so that a resumed run is close, and not equal"
    return f"float32 products {products}; order of sums: {order}"


def _trainer_lines(config: RunConfig) -> Iterator[Line]:
    """Yield the method and the size of each training."""
    from alignlab.config.trainers import stages_of

    for stage in stages_of(config.trainer):
        common = f"{stage.num_steps} steps, learning rate {stage.optim.learning_rate:g}"
        yield "trainer", f"{stage.method}: {common}, into {config.trainer.output_dir}; {stage.step}"


def _tokenizer_line(checked: CheckedRun) -> str:
    """Return the size and the special features of the tokenizer."""
    tokenizer = checked.tokenizer
    template = "with" if tokenizer.chat_template else "without"
    return f"{len(tokenizer)} tokens, {template} a chat template, end token {tokenizer.eos_token!r}"


def _device_here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory_line(config: RunConfig, memory: Mapping[str, int], device: str | None, num_ranks: int) -> str:
    """Return the predicted memory of a rank's device, in all and by part."""
    device = device or _device_here()
    kind = "a GPU" if device == "cuda" else "a CPU (--device cuda predicts for a GPU)"
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in memory.items())
    total = f"{sum(memory.values()) / 2**30:.2f} GiB"
    strategy = config.trainer.sharding.strategy
    if not config.trainer.sharding.spreads_training:
        return f"about {total} on each rank's device, {kind}: {parts}"
    of = f"each of {num_ranks} ranks under {strategy}" if num_ranks > 1 else f"one rank alone (--ranks N: {strategy})"
    return f"about {total} on {kind}, on {of}: {parts}"


def _memory_notes(memory: Mapping[str, int]) -> Iterator[str]:
    """Yield the largest part of the predicted memory, with what makes it smaller, where it exceeds this machine's."""
    import psutil
    import torch

    is_gpu = torch.cuda.is_available()
    there = torch.cuda.get_device_properties(0).total_memory if is_gpu else psutil.virtual_memory().total
    if sum(memory.values()) > there:
        part = max(memory, key=lambda name: memory[name])
        where = "the GPU" if is_gpu else "this machine"
        yield f"{where} has {there / 2**30:.1f} GiB, less than the training takes; {part}: {SMALLER[part]}"


def _prompt_ids(item: Prompt | Example) -> tuple[int, ...]:
    """Return the token ids of a prompt, or of an example before the first token that is trained on."""
    from alignlab.data.examples import Example

    return item.token_ids[: item.completion_mask.index(True)] if isinstance(item, Example) else item.token_ids


def _server_notes(config: RunConfig) -> Iterator[str]:
    """Yield the vLLM servers that do not answer now."""
    import anyio

    from alignlab.config.rollout import VLLMServerSettings
    from alignlab.config.trainers import OnlineConfig, stages_of
    from alignlab.rollout.vllm.client import is_healthy

    rollouts = [stage.rollout for stage in stages_of(config.trainer) if isinstance(stage, OnlineConfig)]
    servers = [rollout.servers for rollout in rollouts if isinstance(rollout, VLLMServerSettings)]
    for address in (address for addresses in servers for address in addresses):
        if not anyio.run(is_healthy, address):
            yield f"the vLLM server {address} does not answer; start it: bash launch/serve_vllm.sh CONFIG"


def _rate_notes(config: RunConfig) -> Iterator[str]:
    """Yield learning rates that are allowed and unusual, and what recipes of GRPO warn of."""
    from alignlab.config.trainers import GRPOConfig, stages_of

    model, stages = config.model, stages_of(config.trainer)
    for rate in dict.fromkeys(stage.optim.learning_rate for stage in stages):
        if model.lora and rate < LOW_LORA_RATE:
            yield f"learning rate {rate:g} is low for LoRA, which takes about ten times that of full fine-tuning"
        if model.name and not model.lora and rate >= HIGH_FULL_RATE:
            yield f"learning rate {rate:g} is high for all weights of a trained model; 1e-6 to 1e-5 is usual"
    for stage in stages:
        if isinstance(stage, GRPOConfig):
            yield from stage.warnings


def _run_notes(checked: CheckedRun) -> Iterator[str]:
    """Yield what is allowed and worth knowing of the data and of the run's folder."""
    from alignlab.types import Prompt

    measured = {item.token_ids for item in checked.preflight.held_out if isinstance(item, Prompt)}
    shared = measured & set(map(_prompt_ids, checked.preflight.train)) if measured else ()
    if shared:
        yield f"{len(shared)} evaluation prompts are also trained on, so their accuracy shows memory, not skill"
    folder = checked.config.trainer.output_dir
    if folder.exists() and any(folder.iterdir()):
        yield f"{folder} holds a run: use --resume, or another trainer.output_dir"
