"""Arguments of trainers: unknown, missing, or of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignlab import (
    DPOConfig,
    DPOTrainer,
    GKDTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOTrainer,
    PPOConfig,
    PPOTrainer,
    RLAIFTrainer,
    SFTConfig,
    SFTTrainer,
)
from alignlab.config.trl_names import PEER_ARGUMENTS
from alignlab.errors import ConfigError
from alignlab.loop.arguments import _argument_names, check_callbacks, check_config
from alignlab.loop.inputs import resolve_base


class SubclassedTrainer(GRPOTrainer):
    """A user's subclass, which takes the config class of its base."""


@pytest.mark.parametrize(
    ("trainer", "config"),
    [
        (SFTTrainer, SFTConfig(num_steps=1)), (GRPOTrainer, GRPOConfig(num_steps=1)),
        (SubclassedTrainer, GRPOConfig(num_steps=1)),
    ],
)
def test_trainer_accepts_its_config_class(trainer: type, config: Any) -> None:
    check_config(trainer, config)


@pytest.mark.parametrize(
    ("trainer", "config", "expected"),
    [
        (GRPOTrainer, PPOConfig(num_steps=1), "config must be GRPOConfig for GRPOTrainer, and is PPOConfig"),
        (SubclassedTrainer, PPOConfig(num_steps=1), "config must be GRPOConfig for SubclassedTrainer"),
        (KTOTrainer, DPOConfig(num_steps=1), "config must be KTOConfig"),
        (DPOTrainer, {"num_steps": 1}, "config must be DPOConfig for DPOTrainer, and is dict"),
        (SFTTrainer, None, "config must be SFTConfig"),
    ],
)
def test_other_config_class_is_refused_before_anything_is_loaded(trainer: Any, config: Any, expected: str) -> None:
    rewards = ("exact_match",) if issubclass(trainer, GRPOTrainer) else ()
    with pytest.raises(ConfigError, match=expected):
        trainer("no-such-model", *rewards, config, [{"prompt": "q", "completion": "a"}])


@pytest.mark.parametrize("model", [None, 5])
def test_model_of_another_type_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="model must be a name, a path or a model of transformers or PEFT, and is"):
        SFTTrainer(model, SFTConfig(num_steps=1), [{"prompt": "q", "completion": "a"}])


def test_callbacks_of_three_parameters_are_accepted() -> None:
    check_callbacks([lambda trainer, step, metrics: None, lambda *values: None, print])


@pytest.mark.parametrize("callbacks", [[lambda: 1], [lambda trainer: 1], [5]])
def test_callback_of_other_parameters_is_refused(callbacks: Any) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\[0\] is .* must be a function of \(trainer, step, metrics\)"):
        check_callbacks(callbacks)


def test_callbacks_that_are_no_list_are_refused() -> None:
    with pytest.raises(ConfigError, match="callbacks must be a list, and is int"):
        check_callbacks(5)


ROWS = [{"prompt": "q", "completion": "a"}]


@pytest.mark.parametrize(
    "trainer", [GRPOTrainer, SubclassedTrainer, PPOTrainer, SFTTrainer, DPOTrainer, GKDTrainer, RLAIFTrainer]
)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("args", "is here config"), ("processing_class", "is here tokenizer"),
        ("ref_model", "not needed: the reference"),
        ("data_collator", "not needed"), ("formatting_func", "not needed: rows have"), ("optimizers", "config.optim"),
        ("compute_metrics", "callbacks"), ("quantization_config", "not offered"),
    ],
)  # fmt: skip
def test_argument_of_trl_is_refused_with_our_name_for_it(trainer: Any, theirs: str, ours: str) -> None:
    message = f"{trainer.__name__} has no argument '{theirs}'; what TRL calls {theirs} .*{ours}"
    with pytest.raises(ConfigError, match=message):
        trainer(model="no-such-model", train_dataset=ROWS, **{theirs: None})


def test_misspelt_argument_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="has no argument 'tokeniser'; did you mean 'tokenizer'"):
        SFTTrainer("no-such-model", SFTConfig(num_steps=1), ROWS, tokeniser=None)
    with pytest.raises(ConfigError, match="has no argument 'num_steps'; it has model, reward_funcs, config"):
        GKDTrainer("no-such-model", (), None, ROWS, num_steps=1)


@pytest.mark.parametrize("arguments", [(), ("m", SFTConfig(num_steps=1)), ("m", None, ROWS, None, None)])
def test_missing_or_surplus_arguments_are_refused_with_the_list_of_arguments(arguments: Any) -> None:
    with pytest.raises(ConfigError, match=r"SFTTrainer: .*of these model, config, train_dataset must be given"):
        SFTTrainer(*arguments)


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer])
@pytest.mark.parametrize("arguments", [(), ("m", DPOConfig(num_steps=1)), ("m", "m", DPOConfig(num_steps=1), ROWS)])
def test_arguments_that_a_trainer_passes_on_to_its_base_are_counted(trainer: Any, arguments: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{trainer.__name__}: .*of these model, config, train_dataset must be"):
        trainer(*arguments)


def test_path_objects_name_a_model_and_a_tokenizer(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model, loaded = resolve_base(tmp_path / "model", tmp_path / "tokenizer", None)
    assert model.num_parameters() == make_model().num_parameters() and loaded.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_of_another_type_is_refused(make_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer must be a name, a path or a tokenizer .*, and is dict"):
        SFTTrainer(make_model(), SFTConfig(num_steps=1), ROWS, tokenizer={})


def test_every_argument_named_in_place_of_trl_s_exists() -> None:
    arguments = set(_argument_names(GKDTrainer)) | set(_argument_names(RLAIFTrainer))
    for ours in PEER_ARGUMENTS.values():
        first = ours.replace("=", " ").replace(",", " ").replace(".", " ").split()[0]
        assert first in arguments | {"not"}, ours
