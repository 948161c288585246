"""A deadline, and progress messages, for loading that may wait for the Hub.

The Hub's client has a limit for each read alone (`HF_HUB_DOWNLOAD_TIMEOUT`, 10 s): a server that sends a byte now and
then would keep it waiting for ever.
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
from alignlab.models.hub.interruption import Interruption

logger = logging.getLogger(__name__)
LIMIT_VARIABLE = "ALIGNLAB_DOWNLOAD_LIMIT_S"
DEFAULT_LIMIT_S = 24 * 3600.0
FIRST_MESSAGE_S = 60.0
"""Seconds until the first message; the next ones come after twice the time each."""
_Result = TypeVar("_Result")
_Load = TypeVar("_Load", bound=Callable[..., Any])


def within_download_limit(name: str, load: Callable[[], _Result]) -> _Result:
    """Return what `load` returns, which may download a model or a dataset of the Hub.

    Args:
        name: of the model or dataset. Loading a local path has no limit.

    Raises:
        ConfigError: loading has taken longer than `ALIGNLAB_DOWNLOAD_LIMIT_S` (default: a day), or that is no number.
    """
    if constants.HF_HUB_OFFLINE or os.path.exists(name):
        return load()
    limit_s = download_limit_s()
    interruption = Interruption()
    over = threading.Event()

    def watch() -> None:
        """Write messages, and stop the loading at the deadline."""
        waited = 0.0
        while waited < limit_s:
            wait_s = min(max(waited, FIRST_MESSAGE_S), limit_s - waited)
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
    """Run a function, whose first argument is a model's name, `within_download_limit`."""

    @functools.wraps(load)
    def limited(name: str, *args: Any, **options: Any) -> Any:
        return within_download_limit(name, lambda: load(name, *args, **options))

    return cast("_Load", limited)


def download_limit_s() -> float:
    """Return how many seconds a download may take.

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
