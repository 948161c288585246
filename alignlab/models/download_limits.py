"""Loading that may wait for the Hub: said while it lasts, and ended by a deadline.

The Hub's client gives up where nothing comes for `HF_HUB_DOWNLOAD_TIMEOUT` seconds (10), at each read: a server that
sends a byte now and then outlives that for ever.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from huggingface_hub import constants

from alignlab.errors import ConfigError
from alignlab.models.interruption import Interruption

logger = logging.getLogger(__name__)
LIMIT_VARIABLE = "ALIGNLAB_DOWNLOAD_LIMIT_S"
DEFAULT_LIMIT_S = 24 * 3600.0
SAID_AFTER_S = 60.0
"""And after each double of it."""
_Result = TypeVar("_Result")
_Load = TypeVar("_Load", bound=Callable[..., Any])


def within_download_limit(name: str, load: Callable[[], _Result]) -> _Result:
    """Return what `load` returns, which may download a model or a dataset of the Hub.

    Args:
        name: of it. A local path is waited for as long as it takes.

    Raises:
        ConfigError: it has taken longer than `ALIGNLAB_DOWNLOAD_LIMIT_S` (a day), or that is no number.
    """
    if constants.HF_HUB_OFFLINE or os.path.exists(name):
        return load()
    limit_s = download_limit_s()
    interruption = Interruption()
    over = threading.Event()

    def watch() -> None:
        waited = 0.0
        while waited < limit_s:
            wait_s = min(max(waited, SAID_AFTER_S), limit_s - waited)
            if over.wait(wait_s):
                return
            waited += wait_s
            logger.warning(
                "loading %s has taken %.0f s so far; what is not in the cache comes from %s", name, waited,
                constants.ENDPOINT,
            )  # fmt: skip
        interruption.raise_now()

    thread = threading.Thread(target=watch, name="alignlab-download", daemon=True)
    thread.start()
    try:
        return interruption.run(load)
    except Interruption.Interrupted:
        raise ConfigError(
            f"{name} must come from {constants.ENDPOINT} within {limit_s:g} s ({LIMIT_VARIABLE}), and has not; "
            f"download it first (hf download {name}), or set the variable higher"
        ) from None
    finally:
        over.set()


def waits_for_hub(load: _Load) -> _Load:
    """Let a function whose first argument is the name of a model be `within_download_limit`."""

    @functools.wraps(load)
    def limited(name: str, *given: Any, **options: Any) -> Any:
        return within_download_limit(name, lambda: load(name, *given, **options))

    return cast("_Load", limited)


def download_limit_s() -> float:
    """Return how long a download may take in all.

    Raises:
        ConfigError: the variable is no positive number.
    """
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_S))
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = 0.0
    if not 0 < limit_s < float("inf"):
        raise ConfigError(f"{LIMIT_VARIABLE} is {text!r}, and must be a number of seconds above 0; unset it")
    return limit_s
