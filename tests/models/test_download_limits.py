"""Downloads that trickle."""

import logging
import threading

import pytest
from huggingface_hub import constants

from alignlab.config.data import DataSettings
from alignlab.data.sources import load_rows
from alignlab.errors import ConfigError
from alignlab.models import download_limits
from alignlab.models.checkpoints import load_tokenizer
from alignlab.models.download_limits import LIMIT_VARIABLE, within_download_limit


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv(LIMIT_VARIABLE, "0.2")


def trickle(*given: object, **options: object) -> None:
    """Reads a byte at a time, and never all of them."""
    byte = threading.Event()
    while not byte.wait(0.001):
        pass


@pytest.mark.parametrize("use", ["a tokenizer", "a dataset"])
def test_a_download_that_never_ends_is_stopped_by_name(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignlab.models.checkpoints.AutoTokenizer.from_pretrained", trickle)
    monkeypatch.setattr("datasets.load_dataset", trickle)
    with pytest.raises(ConfigError, match=r"owner/name must come from https://\S+ within 0.2 s \(ALIGNLAB_DOWNLOAD_L"):
        load_tokenizer("owner/name") if use == "a tokenizer" else load_rows(DataSettings(path="owner/name"))
    assert within_download_limit("owner/name", lambda: 7) == 7, "nothing is left to be raised"


def test_what_is_waited_for_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(download_limits, "SAID_AFTER_S", 0.02)
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError):
        within_download_limit("owner/name", trickle)
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("loading owner/name has taken 0 s so far; what is not in the cache comes from https://")
    assert 3 <= len(said) <= 6, "after 0.02, 0.04, 0.08, 0.16 s"


def test_what_is_here_is_not_waited_for(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "no number")
    assert within_download_limit(str(tmp_path), lambda: 7) == 7
    with pytest.raises(ConfigError, match="ALIGNLAB_DOWNLOAD_LIMIT_S is 'no number', and must be a number of seconds"):
        within_download_limit("owner/name", lambda: 7)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert within_download_limit("owner/name", lambda: 7) == 7
