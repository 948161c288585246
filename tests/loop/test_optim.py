import math
from typing import Any

import pytest
import torch
from torch import nn

from alignlab.config.trainers import SFTConfig
from alignlab.errors import ConfigError
from alignlab.loop.optim import (
    learning_rate_factor,
    load_schedule_state,
    make_optimizer,
    make_schedule,
    schedule_state,
)
from tests.settings import merged


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def learning_rates(config: SFTConfig, total_updates: int) -> list[float]:
    optimizer = make_optimizer(small_model(), config)
    schedule = make_schedule(optimizer, config, total_updates, total_updates // config.num_steps)
    rates = []
    for _ in range(total_updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_weight_decay_applies_to_matrices_and_not_to_vectors() -> None:
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = make_optimizer(model, SFTConfig(optim={"learning_rate": 0.1, "weight_decay": 0.5}))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        expected = 1.0 - 0.1 * 0.5 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))


def test_frozen_parameters_are_left_out() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, SFTConfig())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}


def test_settings_reach_the_optimizer() -> None:
    config = SFTConfig(optim={"learning_rate": 3e-4, "adam_beta1": 0.8, "adam_beta2": 0.95})
    group = make_optimizer(small_model(), config).param_groups[0]
    assert (group["lr"], group["betas"], group["fused"]) == (3e-4, (0.8, 0.95), True)


def test_nothing_to_train_is_refused() -> None:
    model = small_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="at least one parameter"):
        make_optimizer(model, SFTConfig())


def test_first_step_of_adamw_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    optimizer = make_optimizer(model, SFTConfig(optim={"learning_rate": 0.1, "weight_decay": 0.0}))
    model.weight.grad = torch.full((1, 1), 5.0)
    optimizer.step()
    # Bias-corrected, the first step is the sign of the gradient times the learning rate, downhill.
    assert model.weight.item() == pytest.approx(1.9, abs=1e-6)


def test_constant_schedule_with_warm_up() -> None:
    rates = learning_rates(SFTConfig(optim={"learning_rate": 1.0, "warmup_steps": 3}, num_steps=6), total_updates=6)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear_schedule_falls_to_zero_after_the_last_step() -> None:
    config = SFTConfig(optim={"learning_rate": 1.0, "schedule": "linear"}, num_steps=4)
    assert learning_rates(config, total_updates=4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert learning_rate_factor(4, schedule="linear", warmup=0, total=4) == 0.0
    assert learning_rate_factor(9, schedule="linear", warmup=0, total=4) == 0.0


def test_cosine_schedule() -> None:
    config = SFTConfig(optim={"learning_rate": 2.0, "schedule": "cosine"}, num_steps=4)
    expected = [1 + math.cos(math.pi * k / 4) for k in range(4)]
    assert learning_rates(config, total_updates=4) == pytest.approx(expected)


def test_warm_up_counts_steps_of_several_updates() -> None:
    rates = learning_rates(SFTConfig(optim={"learning_rate": 1.0, "warmup_steps": 1}, num_steps=4), total_updates=12)
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 9)


def test_loaded_schedule_continues_at_the_saved_update() -> None:
    config = SFTConfig(optim={"learning_rate": 1.0, "warmup_steps": 2, "schedule": "cosine"}, num_steps=8)
    expected = learning_rates(config, total_updates=8)
    optimizer = make_optimizer(small_model(), config)
    schedule = make_schedule(optimizer, config, 8, 8 // config.num_steps)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    state = schedule_state(schedule)

    optimizer = make_optimizer(small_model(), config)
    schedule = make_schedule(optimizer, config, 8, 8 // config.num_steps)
    load_schedule_state(schedule, state)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == expected[5:]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(
    "changes", [{"num_steps": 8}, {"optim": {"learning_rate": 5e-3}}, {"num_steps": 8, "optim": {"warmup_steps": 6}}],
    ids=str
)
def test_resumed_schedule_follows_the_new_settings_from_its_first_update(name: str, changes: dict[str, Any]) -> None:
    before = SFTConfig(optim={"learning_rate": 1e-2, "schedule": name}, num_steps=4)
    saved = make_schedule(make_optimizer(small_model(), before), before, 4, 1)
    for _ in range(3):
        saved.optimizer.step()
        saved.step()
    after = SFTConfig(**merged({"optim": {"learning_rate": 1e-2, "schedule": name}, "num_steps": 4}, changes))
    optimizer = make_optimizer(small_model(), after)
    resumed = make_schedule(optimizer, after, after.num_steps, 1)
    load_schedule_state(resumed, schedule_state(saved))
    rates = []
    for _ in range(3, after.num_steps):
        assert resumed.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        resumed.step()
    expected = [
        after.optim.learning_rate
        * learning_rate_factor(update, schedule=name, warmup=after.optim.warmup_steps, total=after.num_steps)
        for update in range(3, after.num_steps)
    ]
    assert rates == expected


@pytest.mark.parametrize(("num_steps", "is_warned"), [(4, False), (8, True)])
def test_resumption_at_another_learning_rate_is_warned_of(
    num_steps: int, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = SFTConfig(optim={"learning_rate": 1e-2, "schedule": "linear"}, num_steps=4)
    saved = make_schedule(make_optimizer(small_model(), config), config, 4, 1)
    saved.optimizer.step()
    saved.step()
    resumed = make_schedule(make_optimizer(small_model(), config), config, num_steps, 1)
    load_schedule_state(resumed, schedule_state(saved))
    assert ("goes on after update 1 at learning rate 0.00875" in caplog.text) == is_warned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_marks_the_weights_that_it_has_changed(dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    optimizer = make_optimizer(model, SFTConfig(optim={"learning_rate": 0.1}))
    weights = list(model.parameters())
    for weight in weights[:2]:
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
    before = [weight._version for weight in weights]
    optimizer.step()
    rose = [weight._version > version for weight, version in zip(weights, before, strict=True)]
    assert rose == [True] * 2 + [False] * 4
