"""Whole steps on a real model: the engine against the trainer, GRPO with each engine, resumption, memory, speed."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from alignlab import GRPOConfig, GRPOTrainer, LoraSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings, VLLMSettings
from alignlab.config.trainer import CheckpointSettings
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, SamplingParams
from tests.gpu_job.lines import Line, checked, seconds_of
from tests.gpu_job.zoo import GAPS, largest_gap

MODEL = "smollm2-135m-instruct"
NUM_STEPS = 3
SIZES = {"cuda": (8, 8, 32), "cpu": (2, 2, 8)}
"""Prompts of a step, completions of a prompt and tokens of a completion. On a CPU the job itself is tried, no speed."""


def engine(device: torch.device) -> Iterator[Line]:
    """Yield the gap between the embedded engine's log-probs and the trainer's, and the engine's speed."""
    tokenizer = load_tokenizer(MODEL)
    num_prompts, group_size, num_tokens = SIZES[device.type]
    texts = [f"Count to {number}:" for number in range(2 * num_prompts)]
    prompts = [Prompt(tuple(tokenizer(text)["input_ids"]), text, index=index) for index, text in enumerate(texts)]
    for dtype, limit in GAPS.items():
        model = load_model(MODEL, dtype=dtype, device=device)
        sampler = EmbeddedEngine(model, tokenizer, RolloutSettings())
        sampling = SamplingParams(max_new_tokens=num_tokens, n=group_size // 2, seed=1)
        rollouts = sampler.generate(prompts, sampling)
        num_sampled = sum(len(completion.token_ids) for rollout in rollouts for completion in rollout.completions)
        gap = largest_gap(Policy(model), rollouts, device)
        yield checked(f"engine against trainer, {str(dtype)[6:]}", gap, limit)
        seconds = seconds_of(lambda: sampler.generate(prompts, sampling), device, rounds=1)  # noqa: B023
        name = f"embedded engine, {num_prompts * group_size} rows, {str(dtype)[6:]}"
        yield Line(name, "figure", f"{num_sampled / seconds:.0f} tokens/s")


def grpo(device: torch.device) -> Iterator[Line]:
    """Yield three steps of GRPO with the embedded engine: memory, speed; and whether a resumed run makes the same."""
    with tempfile.TemporaryDirectory() as temporary:
        whole, parts = Path(temporary, "whole"), Path(temporary, "parts")
        yield from _steps("GRPO, embedded engine", _trainer(whole, device, NUM_STEPS), device)
        _trainer(parts, device, NUM_STEPS - 1).train()
        _trainer(parts, device, NUM_STEPS).train(resume=True)
        weights, resumed = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (whole, parts))
        gap = _largest_gap(weights, resumed)
        # Kernels of a GPU may add in any order, so that two equal runs differ by roundings that Adam enlarges.
        yield checked("resumed and uninterrupted weights", gap, 0.0 if device.type == "cpu" else 1e-3)


def determinism(device: torch.device) -> Iterator[Line]:
    """Yield whether a deterministic run, one more and a resumed one have the same weights to the bit."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, name) for name in ("one", "another", "parts")]
        for folder in folders[:2]:
            _trainer(folder, device, 2, deterministic=True).train()
        _trainer(folders[2], device, 1, deterministic=True).train()
        _trainer(folders[2], device, 2, deterministic=True).train(resume=True)
        one, *others = (load_file(folder / "adapter/adapter_model.safetensors") for folder in folders)
        for name, weights in zip(("again", "resumed"), others, strict=True):
            yield checked(f"a deterministic run, {name}", _largest_gap(one, weights), 0.0)


def _largest_gap(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


def vllm(device: torch.device) -> Iterator[Line]:
    """Yield three steps of GRPO with vLLM in this process, with an adapter and with merged weights."""
    for sync in ("adapter", "merged"):
        name = f"GRPO, vLLM in process, {sync}"
        if importlib.util.find_spec("vllm") is None:
            yield Line(name, "skipped", "vLLM is not installed: pip install 'alignlab[vllm]'")
            continue
        settings = VLLMSettings(sync=sync, context_tokens=256)
        with tempfile.TemporaryDirectory() as temporary:
            yield from _steps(name, _trainer(Path(temporary, "run"), device, NUM_STEPS, rollout=settings), device)


def _trainer(
    folder: Path, device: torch.device, num_steps: int, *, rollout: Any = None, deterministic: bool = False
) -> GRPOTrainer:
    num_prompts, group_size, num_tokens = SIZES[device.type]
    config = GRPOConfig(
        output_dir=folder, num_steps=num_steps, num_prompts=num_prompts, group_size=group_size, trackers=(),
        rollout=rollout or RolloutSettings(), numerics={"deterministic": deterministic},
        sampling=SamplingSettings(max_new_tokens=num_tokens), checkpoints=CheckpointSettings(every_steps=1),
    )
    rows = [{"prompt": f"Write the number {n} in words."} for n in range(16)]
    return GRPOTrainer(MODEL, _distinct_characters, config, rows, peft_config=LoraSettings(rank=8, alpha=16))


def _distinct_characters(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text)) / 10 for text in completions]


def _steps(name: str, trainer: GRPOTrainer, device: torch.device) -> Iterator[Line]:
    """Train, and yield whether the steps were finite, their seconds and the peak of the memory."""
    seconds: list[float] = []
    trainer.callbacks = (lambda trainer, step, metrics: seconds.append(metrics["generate_s"] + metrics["train_s"]),)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result = trainer.train()
    gap = result.metrics.get("rollout_gap_max", result.metrics.get("rollout_gap", 0.0))
    is_done = result.num_steps == NUM_STEPS and result.verdict.learnt
    yield Line(name, "ok" if is_done else "failed", f"{result.num_steps} steps, gap {gap:.2g} nats")
    yield Line(f"{name}: last step", "figure", f"{seconds[-1]:.2f} s")
    if device.type == "cuda":
        yield Line(f"{name}: peak", "figure", f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
