"""The engine that `rollout.engine: auto` takes, and what a run keeps of the choice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab import GRPOConfig, GRPOTrainer
from alignlab.config.rollout import AutoEngineSettings, RolloutSettings, VLLMSettings
from alignlab.errors import ConfigError
from alignlab.loop import online, online_inputs
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.hub.families import read_hub_config
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout import engine_choice
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.engine import make_engine
from alignlab.rollout.engine_choice import chosen_engine
from tests.models.test_parity import HUB
from tests.rollout.conftest import SIZES, VOCAB

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AUTO = AutoEngineSettings(max_running=9, block_size=32)


@pytest.fixture
def family() -> PreTrainedModel:
    return new_model(SIZES, vocab_size=VOCAB)


@pytest.fixture(autouse=True)
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A tested vLLM is installed; called with False, none is."""

    def install(is_installed: bool) -> None:
        monkeypatch.setattr(engine_choice, "find_spec", lambda name: object() if is_installed else None)

    monkeypatch.setattr(engine_choice, "require_vllm", lambda engine: None)
    install(True)
    return install


def test_a_gpu_with_vllm_and_a_model_of_a_family_takes_vllm_with_the_fields_that_were_given(
    family: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert chosen_engine(AUTO, family, CUDA) == VLLMSettings(max_running=9, block_size=32)
    assert "rollout.engine auto takes vllm: the policy is on a GPU" in caplog.text


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("cpu", "not on a GPU"), ("no vllm", "not installed"), ("ranks", "the training has 4"),
        ("untested", "vllm is 9.0"), ("no family", "no Hub family has this architecture"),
        ("other class", "whether vLLM knows LlamaForCausalLM is not known"),
    ],
)
def test_whatever_keeps_vllm_from_running_here_takes_the_embedded_engine_and_is_said(
    obstacle: str, reason: str, family: PreTrainedModel, dense: PreTrainedModel, llama: PreTrainedModel,
    with_vllm: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(engine: str) -> None:
        raise ConfigError("vllm is 9.0, and must be older")

    with_vllm(obstacle != "no vllm")
    if obstacle == "ranks":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    if obstacle == "untested":
        monkeypatch.setattr(engine_choice, "require_vllm", refuse)
    model = {"no family": dense, "other class": llama}.get(obstacle, family)
    with caplog.at_level(logging.WARNING):
        chosen = chosen_engine(AUTO, model, CPU if obstacle == "cpu" else CUDA)
    assert chosen == RolloutSettings(max_running=9, block_size=32)
    assert "rollout.engine auto takes embedded: " in caplog.text and reason in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [("deepseek-v3", "latent, gated and recurrent layers were not"), ("gpt-oss", "expert_bias is true, and vLLM")],
)
def test_a_family_that_vllm_was_not_seen_to_run_takes_the_embedded_engine(
    name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_hub_config(HUB[name]())
    assert config is not None
    with caplog.at_level(logging.WARNING):
        chosen = chosen_engine(AUTO, PolicyForCausalLM(config), CUDA)
    assert chosen.engine == "embedded" and reason in caplog.text


def test_a_model_that_the_embedded_engine_cannot_page_goes_to_vllm(llama: PreTrainedModel) -> None:
    llama.set_attn_implementation("eager")
    assert isinstance(chosen_engine(AUTO, llama, CUDA), VLLMSettings)


def test_a_named_engine_is_left_alone(family: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    settings = RolloutSettings()
    assert chosen_engine(settings, family, CUDA) is settings
    assert not caplog.records


def test_auto_makes_an_engine(family: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert isinstance(make_engine(family, tokenizer, AUTO), EmbeddedEngine)


@pytest.mark.parametrize(
    ("name", "value", "engines"),
    [("merge_lora", True, "embedded"), ("sleep", False, "vllm"), ("cache_gib", 2, "vllm"), ("sync", "merged", "vllm")],
)
def test_a_field_of_one_engine_is_refused_by_name(name: str, value: Any, engines: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.{name} is .*engine: auto.*remove it, or use engine: {engines}$"):
        GRPOConfig(rollout={"engine": "auto", name: value})


def test_every_field_of_auto_is_one_of_both_engines() -> None:
    for name in AutoEngineSettings.model_fields:
        assert name in RolloutSettings.model_fields and name in VLLMSettings.model_fields


def test_a_run_keeps_the_engine_that_was_chosen_and_another_outcome_is_a_change_of_engine(
    family: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def trainer(num_steps: int) -> GRPOTrainer:
        config = GRPOConfig(
            output_dir=tmp_path / "run", num_steps=num_steps, num_prompts=2, group_size=2, trackers=(),
            rollout={"engine": "auto"}, sampling={"max_new_tokens": 3}, checkpoints={"every_steps": 1},
        )
        rows = [{"prompt": f"ab{n}"} for n in range(4)]
        return GRPOTrainer(family, lambda completions, **_: [float(len(c)) for c in completions], config, rows,
                           tokenizer=tokenizer)  # fmt: skip

    first = trainer(1)
    assert isinstance(first.config.rollout, RolloutSettings)
    assert first.contents().engine == "embedded"
    first.train()
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert '"engine": "embedded"' in json.dumps(saved) and '"engine": "auto"' not in json.dumps(saved)

    def embedded(model: Any, tokenizer: Any, settings: Any) -> EmbeddedEngine:
        return EmbeddedEngine(model, tokenizer, RolloutSettings())

    monkeypatch.setattr(online_inputs, "chosen_engine", lambda *_: VLLMSettings())  # as on a GPU
    monkeypatch.setattr(online, "make_engine", embedded)
    with caplog.at_level(logging.WARNING):
        trainer(2).train(resume=True)
    assert "rollout.engine was 'embedded' and is 'vllm'" in caplog.text
