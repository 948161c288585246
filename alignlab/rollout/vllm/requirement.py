"""vLLM itself: which versions were tested, and the environment that it reads before it is imported."""

from __future__ import annotations

import importlib.util
import os

from packaging.version import Version

from alignlab.errors import ConfigError

OLDEST, BEFORE = Version("0.32"), Version("0.33")


def require_vllm(engine: str) -> None:
    """See that a tested vLLM is installed, and prepare the environment for it.

    Args:
        engine: "vllm", which runs in this process, or "vllm_server".

    Raises:
        ConfigError: there is none, or one of another version.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine is {engine}, and vLLM is not installed; run: bash launch/setup_env.sh vllm, "
            "or use rollout.engine: embedded"
        )
    if engine == "vllm":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Nothing is reported to anybody, standard output belongs to a run's result, and every reload warns of nothing.
    defaults = {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import vllm

    check_version(vllm.__version__)


def check_version(installed: str) -> None:
    """Refuse a vLLM that was not tested: its internals, which weight updates touch, change with every release.

    Raises:
        ConfigError: with the versions that were.
    """
    if not OLDEST <= Version(Version(installed).base_version) < BEFORE:
        raise ConfigError(
            f"vllm is {installed}, and must be at least {OLDEST} and below {BEFORE}, the versions whose weight updates "
            f'were tested; run: pip install "vllm>={OLDEST},<{BEFORE}", or use rollout.engine: embedded'
        )
