"""Precision and determinism of a GPU are set as the config says, before CUDA starts; a CPU has no choice of either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.rlaif import RLAIFConfig
from alignlab.config.run import RunConfig
from alignlab.config.trainer import NumericsSettings
from alignlab.errors import ConfigError
from alignlab.loop.accelerator import make_accelerator
from alignlab.loop.numerics import VLLM_PRECISION, WORKSPACE, apply_numerics
from alignlab.run_from_config import warm_start_trainer

EXACT = NumericsSettings()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that says that it has a GPU, on which CUDA has not started."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in (WORKSPACE, VLLM_PRECISION):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.set_float32_matmul_precision("highest")


def test_tf32_is_on_where_the_config_says_so_and_off_again(gpu: None) -> None:
    for tf32, precision in ((True, "high"), (False, "highest")):
        apply_numerics(NumericsSettings(tf32=tf32))
        assert torch.get_float32_matmul_precision() == os.environ[VLLM_PRECISION] == precision
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
        assert not torch.are_deterministic_algorithms_enabled() and WORKSPACE not in os.environ


def test_deterministic_fixes_algorithms_and_workspaces(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_numerics(NumericsSettings(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")
    apply_numerics(NumericsSettings(deterministic=True))
    assert os.environ[WORKSPACE] == ":16:8"
    apply_numerics(EXACT)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_deterministic_is_refused_once_cuda_has_started_or_where_the_environment_says_otherwise(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0, .* must be :4096:8 or :16:8; unset it"):
        apply_numerics(NumericsSettings(deterministic=True))
    monkeypatch.delenv(WORKSPACE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"before CUDA starts.*start with CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        apply_numerics(NumericsSettings(deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    apply_numerics(EXACT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_on_a_cpu_the_settings_are_said_to_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    make_accelerator(60, EXACT)
    assert "numerics" not in caplog.text
    make_accelerator(60, NumericsSettings(tf32=True, deterministic=True))
    assert "trainer.numerics.tf32 and deterministic: no effect on this machine" in caplog.text
    assert torch.get_float32_matmul_precision() == "highest" and not torch.are_deterministic_algorithms_enabled()


def test_all_stages_of_rlaif_have_the_same_numerics() -> None:
    raw: dict[str, Any] = {"constitution": "c.yaml", "judge": {"backend": "model"}, "path": "reward_model"}
    deterministic = {"numerics": {"deterministic": True}}
    with pytest.raises(ConfigError, match=r"reward\.numerics is .*, and must be the last stage's"):
        RLAIFConfig(**raw, policy={"type": "grpo"} | deterministic)
    config = RLAIFConfig(**raw, policy={"type": "grpo"} | deterministic, reward=deterministic)
    assert config.numerics == NumericsSettings(deterministic=True)


def test_a_warm_start_computes_as_the_training_does(
    make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    raw: dict[str, Any] = {
        "model": {"name": "smollm2-135m-instruct"}, "rewards": [{"name": "reasoning_gym_answer"}],
        "data": {"task": "chain_sum", "size": 4},
        "trainer": {"type": "grpo", "output_dir": str(tmp_path), "numerics": {"tf32": True}},
    }
    with pytest.raises(ConfigError, match=r"warm_start\.trainer\.numerics is .*, and must be left out"):
        RunConfig.model_validate(raw | {"warm_start": {"trainer": {"numerics": {"deterministic": True}}}})
    config = RunConfig.model_validate(raw | {"warm_start": {"trainer": {"num_sequences": 2}}})
    assert config.warm_start is not None
    trainer = warm_start_trainer(config, config.warm_start, make_model(), tokenizer)
    assert trainer.config.numerics == NumericsSettings(tf32=True)
