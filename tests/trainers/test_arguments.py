from typing import Any

import pytest

from alignlab import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOTrainer, PPOConfig, SFTConfig, SFTTrainer
from alignlab.errors import ConfigError
from alignlab.trainers.arguments import check_callbacks, check_config


class OwnTrainer(GRPOTrainer):
    """A user's, with its base's config."""


@pytest.mark.parametrize(
    ("trainer", "config"),
    [(SFTTrainer, SFTConfig(num_steps=1)), *((kind, GRPOConfig(num_steps=1)) for kind in (GRPOTrainer, OwnTrainer))],
)
def test_a_trainer_takes_its_own_config(trainer: type, config: Any) -> None:
    check_config(trainer, config)


@pytest.mark.parametrize(
    ("trainer", "config", "expected"),
    [
        (GRPOTrainer, PPOConfig(num_steps=1), "config must be GRPOConfig for GRPOTrainer, and is PPOConfig"),
        (OwnTrainer, PPOConfig(num_steps=1), "config must be GRPOConfig for OwnTrainer"),
        (KTOTrainer, DPOConfig(num_steps=1), "config must be KTOConfig"),
        (DPOTrainer, {"num_steps": 1}, "config must be DPOConfig for DPOTrainer, and is dict"),
        (SFTTrainer, None, "config must be SFTConfig"),
    ],
)
def test_another_config_is_refused_before_anything_is_loaded(trainer: Any, config: Any, expected: str) -> None:
    rewards = ("exact_match",) if issubclass(trainer, GRPOTrainer) else ()
    with pytest.raises(ConfigError, match=expected):
        trainer("no-such-model", *rewards, config, [{"prompt": "q", "completion": "a"}])


@pytest.mark.parametrize("model", [None, 5])
def test_a_model_of_another_kind_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="model must be a name, a path or a model of transformers or PEFT, and is"):
        SFTTrainer(model, SFTConfig(num_steps=1), [{"prompt": "q", "completion": "a"}])


def test_callbacks_of_three_parameters_are_taken() -> None:
    check_callbacks([lambda trainer, step, metrics: None, lambda *values: None, print])


@pytest.mark.parametrize("callbacks", [[lambda: 1], [lambda trainer: 1], [5]])
def test_a_callback_of_other_parameters_is_refused(callbacks: Any) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\[0\] is .* must be a function of \(trainer, step, metrics\)"):
        check_callbacks(callbacks)


def test_callbacks_that_are_no_list_are_refused() -> None:
    with pytest.raises(ConfigError, match="callbacks must be a list, and is int"):
        check_callbacks(5)
