"""Messages for a missing or untested vLLM; these tests need no vLLM."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from alignlab.errors import ConfigError
from alignlab.rollout.vllm.installation import check_version, require_vllm


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
