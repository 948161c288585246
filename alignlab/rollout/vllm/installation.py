"""The vLLM that is installed: tested versions, and the environment that vLLM reads when it is imported."""

from __future__ import annotations

import importlib.util
import os

from packaging.version import Version

from alignlab.errors import ConfigError

OLDEST, BEFORE = Version("0.32"), Version("0.33")


def require_vllm(engine: str) -> None:
    """Raise unless a tested vLLM is installed; set the environment variables that vLLM reads.

    Args:
        engine: "vllm", which runs in this process, or "vllm_server".

    Raises:
        ConfigError: vLLM is missing, or of an untested version.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine is {engine}, and vLLM is not installed; run: bash launch/setup_env.sh vllm, "
            "or use rollout.engine: embedded"
        )
    if engine == "vllm":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # No usage statistics; standard output is for a run's result; every reload would warn without need.
    defaults = {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import vllm

    check_version(vllm.__version__)


def check_version(installed: str) -> None:
    """Raise for an untested version of vLLM: weight updates touch internals, which change with every release.

    Raises:
        ConfigError: with the tested versions.
    """
    if not OLDEST <= Version(Version(installed).base_version) < BEFORE:
        raise ConfigError(
            f"vllm is {installed}, and must be at least {OLDEST} and below {BEFORE}, the versions whose weight updates "
            f'were tested; run: pip install "vllm>={OLDEST},<{BEFORE}", or use rollout.engine: embedded'
        )
