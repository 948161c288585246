"""A checkpoint's config with any value in any field loads, or is refused by name: no library's own error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.model import LoraSettings
from alignlab.errors import AlignlabError
from alignlab.models.adapters import add_lora
from alignlab.models.hub.adapter_files import with_saved_adapter
from alignlab.models.hub.checkpoints import empty_model, load_model, new_model, save_model

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VALUES: tuple[Any, ...] = (None, "x", [], {}, -1, 10**30, float("nan"), True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    save_model(new_model(SHAPE, vocab_size=16), folder)
    return folder


def damaged(file: Path, values: Sequence[Any] = VALUES) -> Iterator[str]:
    """The name of a field whose value is another one now, for each field and value; the file is whole afterwards."""
    content = file.read_text()
    config = json.loads(content)
    for field in config:
        for value in values:
            file.write_text(json.dumps(config | {field: value}))
            yield f"{field}: {value}"
    for text in ("", "<html>", "[]", "null", "[" * 100_000):
        file.write_text(text)
        yield text[:10]
    file.write_text(content)


def test_no_config_of_a_model_raises_a_library_s_error(base: Path) -> None:
    refused = 0
    for damage in damaged(base / "config.json"):
        try:
            empty_model(str(base))
        except AlignlabError:
            refused += 1
        except Exception as error:
            raise AssertionError(damage) from error
    assert refused > 50
    empty_model(str(base))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about settings that do nothing
def test_no_config_of_an_adapter_raises_a_library_s_error(base: Path, tmp_path: Path) -> None:
    save_model(add_lora(load_model(str(base), dtype=torch.float32), LoraSettings(rank=2)), tmp_path)
    refused = 0
    for damage in damaged(tmp_path / "adapter_config.json", ({}, float("nan"))):
        try:
            with_saved_adapter(load_model(str(base), dtype=torch.float32), str(tmp_path))
        except AlignlabError:
            refused += 1
        except Exception as error:
            raise AssertionError(damage) from error
    assert refused > 20
