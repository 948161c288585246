"""Messages for a missing or untested vLLM, and the choice of its model runner."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from alignlab.errors import ConfigError
from alignlab.rollout.vllm import launch
from alignlab.rollout.vllm.installation import MODEL_RUNNER_VARIABLE, check_version, model_runner, require_vllm


def test_a_missing_vllm_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def hide(name: str, *arguments: Any) -> Any:
        return None if name == "vllm" else find(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", hide)
    with pytest.raises(ConfigError, match=r"not installed; run: bash launch/setup_env\.sh vllm, or use .* embedded"):
        require_vllm("vllm")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.3", "0.32.0+cpu", "0.32.1.dev3+g1234"])
def test_tested_versions_are_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.33.0rc1", "1.0"])
def test_untested_versions_are_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"vllm is {version}, and must be at least 0\.32 and below 0\.33"):
        check_version(version)


@pytest.mark.parametrize(("has_gpu", "value", "number"), [(False, "0", 1), (True, "0", 1), (True, "1", 2)])
def test_the_variable_chooses_the_model_runner(
    has_gpu: bool, value: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert model_runner(value) == number


@pytest.mark.parametrize(
    ("value", "message"), [("1", "must be 0 on a machine without a GPU"), ("yes", r"is 'yes', and must be 0 .* or 1")]
)
def test_a_model_runner_that_there_is_not_is_refused(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"{MODEL_RUNNER_VARIABLE} .*{message}"):
        model_runner(value)


@pytest.mark.vllm
@pytest.mark.parametrize(("has_gpu", "pinned", "other"), [(False, "0", None), (True, "1", "0")])
def test_the_model_runner_is_pinned_unless_the_environment_chooses(
    has_gpu: bool, pinned: str, other: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv(MODEL_RUNNER_VARIABLE, "to be restored")
    monkeypatch.delenv(MODEL_RUNNER_VARIABLE)
    assert launch.server_environment()[MODEL_RUNNER_VARIABLE] == pinned
    require_vllm("vllm_server")
    assert os.environ[MODEL_RUNNER_VARIABLE] == pinned
    if other is not None:
        monkeypatch.setenv(MODEL_RUNNER_VARIABLE, other)
        require_vllm("vllm_server")
        assert os.environ[MODEL_RUNNER_VARIABLE] == launch.server_environment()[MODEL_RUNNER_VARIABLE] == other
    else:
        monkeypatch.setenv(MODEL_RUNNER_VARIABLE, "1")
        with pytest.raises(ConfigError, match="without a GPU"):
            require_vllm("vllm_server")
