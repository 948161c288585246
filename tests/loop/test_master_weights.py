"""Training of bfloat16 weights: float32 copies take the updates, gradients are summed in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from alignlab import SFTConfig, SFTTrainer
from alignlab.loop.master_weights import MASTER, MasterAdamW, state_bytes
from tests.trainers.tiny import examples


def gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("fused", [False, True])
def test_the_copy_is_what_float32_training_makes_and_the_weight_its_rounding(fused: bool) -> None:
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1, "fused": fused}
    ours, theirs = MasterAdamW([weight], **options), torch.optim.AdamW([exact], **options)
    for gradient in gradients(20):
        weight.grad, exact.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    assert torch.equal(ours.state[weight][MASTER], exact)
    assert torch.equal(weight, exact.bfloat16())
    assert {value.dtype for value in ours.state[weight].values()} == {torch.float32}


def test_updates_that_the_weight_rounds_away_add_up_in_the_copy() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1e-4)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2, dtype=torch.bfloat16))  # 1 - 1e-4 is nearer to 1 than to the next
    for _ in range(99):
        optimizer.step()
    assert torch.allclose(optimizer.state[weight][MASTER], torch.full((2, 2), 0.99), atol=2e-3)
    assert bool((weight < 0.993).all())


def test_gradients_of_many_packs_are_summed_in_float32() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    MasterAdamW([weight])
    for _ in range(1000):
        (weight * 2**-8).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert weight.grad.item() == 1000 * 2**-8  # in bfloat16 the sum stops at 1


def test_bytes_of_the_state() -> None:
    assert state_bytes(nn.Parameter(torch.zeros(10))) == 2 * 10 * 4
    assert state_bytes(nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))) == 3 * 10 * 4


def make(model: Any, tokenizer: Any, folder: Path, **options: Any) -> SFTTrainer:
    config = SFTConfig(output_dir=folder, num_sequences=2, trackers=(), optim={"learning_rate": 1e-5}, **options)
    return SFTTrainer(model, config, examples(8), tokenizer=tokenizer)


def test_a_run_in_bfloat16_learns_and_resumes_bit_for_bit(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    whole = make(make_model().bfloat16(), tokenizer, tmp_path / "whole", num_steps=6)
    start = {name: weight.detach().clone() for name, weight in whole.learner.trained.items()}
    result = whole.train()
    masters = [whole.learner.optimizer.state[p][MASTER] for p in whole.learner.trained.values()]
    moved = [not torch.equal(m, start[name].float()) for name, m in zip(start, masters, strict=True)]
    assert all(moved)
    make(make_model().bfloat16(), tokenizer, tmp_path / "parts", num_steps=3).train()
    resumed = make(make_model().bfloat16(), tokenizer, tmp_path / "parts", num_steps=6).train(resume=True)
    files = [load_file(r.model_path / "model.safetensors") for r in (result, resumed)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    optimizers = [load_file(next(path.rglob("step-00000006/optimizer.safetensors"))) for path in tmp_path.iterdir()]
    assert any(name.startswith(f"{MASTER}.") for name in optimizers[0])
    assert all(torch.equal(optimizers[0][name], optimizers[1][name]) for name in optimizers[0])
