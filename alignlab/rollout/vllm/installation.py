"""The vLLM that is installed: tested versions, and the environment that vLLM reads when it is imported."""

from __future__ import annotations

import importlib.util
import os

import torch
from packaging.version import Version

from alignlab.errors import ConfigError

OLDEST, BEFORE = Version("0.32"), Version("0.33")
MODEL_RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
"""Environment variable that chooses between vLLM's two model runners: 0 for V1, 1 for V2."""


def require_vllm(engine: str) -> None:
    """Raise unless a tested vLLM is installed; set the environment variables that vLLM reads.

    Args:
        engine: "vllm", which runs in this process, or "vllm_server".

    Raises:
        ConfigError: vLLM is missing, or of an untested version; or `model_runner` refuses the environment.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine is {engine}, and vLLM is not installed; run: bash launch/setup_env.sh vllm, "
            "or use rollout.engine: embedded"
        )
    if engine == "vllm":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault(MODEL_RUNNER_VARIABLE, pinned_model_runner())
    model_runner(os.environ[MODEL_RUNNER_VARIABLE])
    # No usage statistics; standard output is for a run's result; every reload would warn without need.
    defaults = {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import vllm

    check_version(vllm.__version__)


def pinned_model_runner() -> str:
    """Return the value of `MODEL_RUNNER_VARIABLE` for this machine, which vLLM would else choose by itself.

    V1 on a CPU, where V2 lacks Triton. V2 on a GPU: it alone returns the experts that it chose, it draws the random
    numbers of all requests at once, and vLLM mends V1 no more. The tests, which run on a CPU, drive V1.
    """
    return "1" if torch.cuda.is_available() else "0"


def model_runner(value: str) -> int:
    """Return the number of the model runner, 1 or 2, that a value of `MODEL_RUNNER_VARIABLE` chooses.

    Raises:
        ConfigError: the value is neither 0 nor 1, or chooses V2 on a machine without a GPU.
    """
    if value not in ("0", "1"):
        raise ConfigError(
            f"{MODEL_RUNNER_VARIABLE} is {value!r:.40}, and must be 0 (vLLM's model runner V1) or 1 (V2); unset it for "
            f"{pinned_model_runner()}"
        )
    if value == "1" and not torch.cuda.is_available():
        raise ConfigError(
            f"{MODEL_RUNNER_VARIABLE} is 1, and must be 0 on a machine without a GPU, where vLLM's model runner V2 "
            "lacks Triton; unset it"
        )
    return 1 + int(value)


def check_returns_experts() -> None:
    """Raise if vLLM's model runner on a GPU cannot return the experts that it chooses.

    Raises:
        ConfigError: the environment chooses V1.
    """
    if os.environ.get(MODEL_RUNNER_VARIABLE) == "0":
        raise ConfigError(
            f"{MODEL_RUNNER_VARIABLE} is 0, and must be 1 for a mixture of experts on a GPU: vLLM's model runner V1 "
            "does not return the experts that it chose; unset it"
        )


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
