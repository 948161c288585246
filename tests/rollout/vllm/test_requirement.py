"""What is said where vLLM is missing or of another version; these need no vLLM."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from alignlab.errors import ConfigError
from alignlab.rollout.vllm.requirement import check_version, require_vllm


def test_a_missing_vllm_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def hide(name: str, *rest: Any) -> Any:
        return None if name == "vllm" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hide)
    with pytest.raises(ConfigError, match=r"not installed; run: bash launch/setup_env\.sh vllm, or use .* embedded"):
        require_vllm("vllm")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.3", "0.32.0+cpu", "0.32.1.dev3+g1234"])
def test_tested_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.33.0rc1", "1.0"])
def test_other_versions_are_refused_by_name(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"vllm is {version}, and must be at least 0\.32 and below 0\.33"):
        check_version(version)
