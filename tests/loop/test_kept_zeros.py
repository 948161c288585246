"""Zeros of a pruned model through a training: kept where asked, and by every trainer's optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.trainers import PPOConfig, SFTConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import ConfigError
from alignlab.loop.optim import make_optimizer
from alignlab.models.critic import make_critic
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.pruning.masks import choice
from alignlab.models.pruning.sparsity import prune_by_magnitude
from alignlab.types import Segments
from tests.trainers.conftest import DENSE
from tests.trainers.tiny import make_case


def pruned(vocab_size: int, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = new_model(DENSE, vocab_size=vocab_size, pad_token_id=0, eos_token_id=1)
    prune_by_magnitude(model, choice(dropped=0.5, pattern=None, by_row=False))
    return model.to(dtype)


def zeros_of(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach() == 0 for name, weight in model.named_parameters() if "_proj" in name}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("case", "dtype"), [("sft", torch.float32), ("grpo", torch.float32), ("sft", torch.bfloat16)])
def test_zeros_stay_where_asked_and_everything_else_learns(
    case: str, dtype: torch.dtype, kept: bool, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    model = pruned(len(tokenizer), dtype)
    before, zeros = {name: p.detach().clone() for name, p in model.named_parameters()}, zeros_of(model)
    make_case(
        case, tmp_path / "run", model, tokenizer, optim={"keep_zeros": kept, "weight_decay": 0.1, "learning_rate": 0.1}
    ).train()
    for name, parameter in model.named_parameters():
        moved = parameter.detach() != before[name]
        assert moved.any(), name
        if name in zeros:
            assert bool(moved[zeros[name]].any()) is not kept, name


def test_a_critic_beside_a_pruned_policy_learns_values() -> None:
    """Its value head starts at 0, where no zero of a critic may be kept."""
    config = PPOConfig(optim={"keep_zeros": True}, critic={"form": "model"})
    critic = make_critic(pruned(262), config.critic)
    optimizer = make_optimizer(critic, config.model_copy(update={"optim": config.critic_optim}))
    tokens = torch.arange(2, 8)
    segments = Segments((6,), (-1,), (0,), (0,))
    critic(tokens, segments, tokens > 4).values.sum().backward()
    optimizer.step()
    assert (critic.weight != 0).all()


@pytest.mark.parametrize(("router", "name"), [("noisy_topk", "noise_weight"), ("reinforce", "baseline_weight")])
def test_router_matrices_that_start_at_zero_train_freely(router: str, name: str) -> None:
    model = new_model({"preset": router}, vocab_size=300)
    with torch.no_grad():
        for weight in (p for n, p in model.named_parameters() if n.endswith("_proj.weight")):
            weight[:, ::2] = 0
    make_optimizer(model, SFTConfig(optim={"keep_zeros": True}))
    weights = dict(model.named_parameters())
    starting = [weight for n, weight in weights.items() if n.endswith(name)]
    assert starting and not any(weight.any() for weight in starting)
    sum(weight.sum() for weight in weights.values()).backward()
    assert all((weight.grad == 1).all() for weight in starting)
    pruned_weight = weights["model.layers.0.self_attn.q_proj.weight"].grad
    assert (pruned_weight[:, ::2] == 0).all() and (pruned_weight[:, 1::2] == 1).all()


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.keep_zeros is .*are kept where weights are whole.*use strategy: ddp"):
        SFTConfig(optim={"keep_zeros": True}, sharding={"strategy": "zero1"})
    whole = new_model(DENSE, vocab_size=300)
    with pytest.raises(ConfigError, match="no weight of the model is zero; make one by `alignlab prune`"):
        make_optimizer(whole, SFTConfig(optim={"keep_zeros": True}))
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    with pytest.raises(ConfigError, match="must be false for an adapter"):
        make_case("kto", tmp_path / "run", pruned(len(tokenizer)), tokenizer, optim={"keep_zeros": True})
