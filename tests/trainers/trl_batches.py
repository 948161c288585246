"""One model and one batch for TRL's trainers and ours, with loss and gradient of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from alignlab.loop.offline import OfflineTrainer
from tests.trainers.steps import packs_of, update_on

Step = tuple[float, dict[str, Tensor]]  # loss, and gradient by name of weight
SETTINGS: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}


def save_llama(folder: Path, tokenizer: Any) -> str:
    """A tiny Llama, which TRL knows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def move(model: torch.nn.Module, by: float = 1.0) -> None:
    """The policy leaves the reference, in the same way in both."""
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            wave = torch.sin(torch.arange(weight.numel()).float()).view_as(weight)
            weight.add_(by * (wave * 0.02 + 0.001 * len(name)))


@contextmanager
def as_trl_warns() -> Iterator[None]:
    """Its own warnings are no errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def step_of_ours(trainer: OfflineTrainer, rows: Sequence[int]) -> Step:
    """Return loss and gradient of an update of ours, without the optimizer step."""
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> dict[str, float]:
        named = trainer.learner.trained.items()
        gradients.update({n.removeprefix("model."): p.grad.clone() for n, p in named if p.grad is not None})
        return {}

    trainer.learner._step = keep  # type: ignore[method-assign]
    metrics = update_on(trainer, packs_of(trainer, rows))
    return metrics["loss"], gradients


def step_of_trl(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Return loss and gradient of a TRL trainer's loss."""
    value = loss()
    value.backward()
    return float(value.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Step, theirs: Step) -> None:
    """Loss to 1e-5; each element of the gradient to 1e-5 of itself or of the largest."""
    (value, gradient), (other, other_gradient) = ours, theirs
    assert value == pytest.approx(other, rel=1e-5)
    assert gradient.keys() == other_gradient.keys()
    largest = max(float(g.abs().max()) for g in gradient.values())
    assert largest > 1e-4, "or nothing is shown"
    for name, one in gradient.items():
        torch.testing.assert_close(one, other_gradient[name], rtol=1e-5, atol=1e-5 * largest, msg=name)
