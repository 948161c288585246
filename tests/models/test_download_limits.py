"""Downloads that send a byte now and then, and never end."""

import logging
import threading

import pytest
from huggingface_hub import constants

from alignlab.config.data import DataSettings
from alignlab.data.sources import load_rows
from alignlab.errors import ConfigError
from alignlab.models.hub import download_limits
from alignlab.models.hub.checkpoints import load_tokenizer
from alignlab.models.hub.download_limits import LIMIT_VARIABLE, within_download_limit


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv(LIMIT_VARIABLE, "0.2")


def trickle(*given: object, **options: object) -> None:
    """A stand-in for a download that never ends."""
    byte = threading.Event()
    while not byte.wait(0.001):
        pass


@pytest.mark.parametrize("use", ["a tokenizer", "a dataset"])
def test_an_endless_download_is_stopped_with_the_name_in_the_error(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignlab.models.hub.checkpoints.AutoTokenizer.from_pretrained", trickle)
    monkeypatch.setattr("datasets.load_dataset_builder", trickle)
    with pytest.raises(ConfigError, match=r"owner/name must come from https://\S+ within 0.2 s \(ALIGNLAB_DOWNLOAD_L"):
        load_tokenizer("owner/name") if use == "a tokenizer" else load_rows(DataSettings(path="owner/name"))
    assert within_download_limit("owner/name", lambda: 7) == 7, "nothing is left to be raised"


def test_a_long_download_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(download_limits, "FIRST_MESSAGE_S", 0.02)
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError):
        within_download_limit("owner/name", trickle)
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("loading owner/name has taken 0 s so far; what is not in the cache comes from https://")
    assert 3 <= len(said) <= 6, "after 0.02, 0.04, 0.08, 0.16 s"


def test_local_paths_have_no_download_limit(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "no number")
    assert within_download_limit(str(tmp_path), lambda: 7) == 7
    with pytest.raises(ConfigError, match="ALIGNLAB_DOWNLOAD_LIMIT_S is 'no number', and must be a number of seconds"):
        within_download_limit("owner/name", lambda: 7)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert within_download_limit("owner/name", lambda: 7) == 7
