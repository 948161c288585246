"""The kinds of weights, those that decay, and a resumption with other ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alignlab.config.trainer import OptimSettings
from alignlab.config.trainers import SFTConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import ConfigError
from alignlab.loop.optim import make_optimizer
from alignlab.loop.weight_decay import describe_weight_decay, weight_kinds
from alignlab.models.hub.checkpoints import new_model
from tests.trainers.conftest import DENSE, SPARSE
from tests.trainers.steps import weights_of
from tests.trainers.tiny import make_case

ALL = ["matrices", "embeddings", "norms", "biases", "vectors"]


class PerHeadNorm(nn.Module):
    """Norm weights of all heads in one matrix, as Cohere's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))


class Experts(nn.Module):
    """Biases of all experts in one matrix, as GPT-OSS's, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj_bias = nn.Parameter(torch.ones(4, 5))
        self.down_proj = nn.Parameter(torch.ones(4, 5, 5))
        self.gate = nn.Parameter(torch.ones(4))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.norm, self.head_norm, self.experts = nn.LayerNorm(3), PerHeadNorm(), Experts()
        self.proj, self.lm_head = nn.Linear(3, 3), nn.Linear(3, 7, bias=False)
        self.lm_head.weight = self.embed.weight


EXPECTED = {
    "embed.weight": "embeddings", "norm.weight": "norms", "norm.bias": "biases", "head_norm.weight": "norms",
    "experts.down_proj_bias": "biases", "experts.down_proj": "matrices", "experts.gate": "vectors",
    "proj.weight": "matrices", "proj.bias": "biases",
}


def test_kinds_go_by_layer_and_name_and_not_by_dimensions_alone() -> None:
    model = Small()
    kinds = weight_kinds(model)
    assert {name: kinds[parameter] for name, parameter in model.named_parameters()} == EXPECTED


def test_a_tied_head_is_an_embedding_wherever_it_comes_first() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head, self.embed = nn.Linear(3, 7, bias=False), nn.Embedding(7, 3)
            self.embed.weight = self.lm_head.weight

    model = HeadFirst()
    assert weight_kinds(model) == {model.lm_head.weight: "embeddings"}


def test_frozen_weights_have_no_kind() -> None:
    model = Small().requires_grad_(False)
    model.proj.weight.requires_grad_(True)
    assert weight_kinds(model) == {model.proj.weight: "matrices"}


@pytest.mark.parametrize("on", [["matrices", "embeddings"], ["matrices"], ["norms", "vectors"], ["biases"], ALL])
def test_the_kinds_of_the_settings_decay_and_no_others(on: list[str]) -> None:
    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    settings = {"learning_rate": 0.1, "weight_decay": 0.5, "weight_decay_on": on}
    optimizer = make_optimizer(model, SFTConfig(optim=settings))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = 1.0 - 0.1 * 0.5 if EXPECTED[name] in on else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), msg=name)


@pytest.mark.parametrize("architecture", [DENSE, SPARSE | {"attention_bias": True}], ids=["dense", "mixture"])
def test_models_of_ours_have_their_weights_in_the_right_kinds(architecture: Any) -> None:
    model = new_model(architecture, vocab_size=50, pad_token_id=0, eos_token_id=1)
    kinds = weight_kinds(model)
    for name, parameter in model.named_parameters():
        by_name = "embeddings" if "embed_tokens" in name else "biases" if name.endswith("bias") else None
        by_name = by_name or ("norms" if "norm" in name else "matrices")
        assert kinds[parameter] == by_name, name


def test_the_description_counts_tensors_and_weights() -> None:
    model = Small()
    assert describe_weight_decay(model, OptimSettings()) == "no weight decays"
    assert describe_weight_decay(model, OptimSettings(weight_decay=0.1)) == (
        "0.1 of matrices (2 tensors, 109 weights), embeddings (1 tensors, 21 weights); none of norms (2 tensors, "
        "9 weights), biases (3 tensors, 26 weights), other vectors (1 tensors, 4 weights)"
    )
    every = describe_weight_decay(model, OptimSettings(weight_decay=0.1, weight_decay_on=ALL))
    assert every.endswith("; none of the others") and "other vectors (1" in every


def test_settings() -> None:
    with pytest.raises(ConfigError, match=r"weight_decay_on is .*must stay .* with weight_decay 0"):
        OptimSettings(weight_decay_on=["matrices"])
    with pytest.raises(ConfigError, match=r"weight_decay_on is \[\].*name at least one kind"):
        OptimSettings(weight_decay=0.1, weight_decay_on=[])
    with pytest.raises(ConfigError, match=r"each once; use \['norms'\]"):
        OptimSettings(weight_decay=0.1, weight_decay_on=["norms", "norms"])
    with pytest.raises(ConfigError, match="weight_decay_on"):
        OptimSettings(weight_decay=0.1, weight_decay_on=["heads"])


def stop_after_two_steps(trainer: Any, step: int, metrics: Any) -> None:
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("on", [["matrices"], ALL], ids=["fewer", "more"])
def test_a_run_that_is_resumed_with_other_kinds_goes_on_with_its_moments_and_says_so(
    on: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The parameters are in other groups of the optimizer than when it was saved."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)

    def make(folder: str, **options: Any) -> Any:
        torch.manual_seed(0)
        model = new_model(DENSE, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
        return make_case("sft", tmp_path / folder, model, tokenizer, **options)

    make("run", callbacks=(stop_after_two_steps,), optim={"weight_decay": 0.5}).train()
    resumed = make("run", optim={"weight_decay": 0.5, "weight_decay_on": on})
    resumed.train(resume=True)
    assert f"optim.weight_decay_on was ['matrices', 'embeddings'] and is {on}" in caplog.text
    expected = expected_after(make, on)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, expected[name]), name


def expected_after(make: Callable[..., Any], on: list[str]) -> dict[str, torch.Tensor]:
    """Return the weights after three steps, of which the last has other decays."""

    def change(trainer: Any, step: int, metrics: Any) -> None:
        if step == 2:
            kinds = weight_kinds(trainer.learner.module)
            groups = trainer.learner.optimizer.param_groups
            options = {name: value for name, value in groups[0].items() if name not in ("params", "weight_decay")}
            groups[:] = [
                {"params": [p for p in kinds if (kinds[p] in on) is decays], "weight_decay": 0.5 * decays, **options}
                for decays in (True, False)
            ]

    trainer = make("whole", callbacks=(change,), optim={"weight_decay": 0.5})
    trainer.train()
    return weights_of(trainer)
