"""The dtype that a command loads a model in, and the flags of its sampling."""

import argparse
from pathlib import Path

import pytest
import torch

from alignlab.cli.policy import add_sampling_arguments, resolved_dtype, sampling_settings
from alignlab.config.rollout import SamplingSettings
from alignlab.errors import ConfigError
from alignlab.types import SamplingParams


@pytest.mark.parametrize(
    ("dtype", "adapted", "has_gpu", "expected"),
    [
        ("auto", False, False, "float32"),
        ("auto", True, False, "bfloat16"),
        ("auto", False, True, "bfloat16"),
        ("float32", True, True, "float32"),
    ],
)
def test_auto_is_bfloat16_under_an_adapter_and_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: str, adapted: bool, has_gpu: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert resolved_dtype(dtype, adapted=adapted) == expected


def parsed(*words: str) -> SamplingSettings:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    return sampling_settings(parser.parse_args(words), top_k=7)


def test_decoding_flags_become_parameters(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    settings = parsed(
        "--ban", "red", "--ban", "blue", "--logit-bias", "28=2.5", "--logit-bias", "198=-3", "--typical-p", "0.9",
        "--presence-penalty", "0.5", "--json-schema", str(schema),
    )
    params = settings.params(n=2, seed=1)
    assert params.banned_words == ("red", "blue")
    assert params.logit_bias == ((28, 2.5), (198, -3.0))
    assert (params.typical_p, params.presence_penalty, params.top_k, params.n) == (0.9, 0.5, 7, 2)
    assert params.json_schema == '{"type": "object"}'
    assert parsed("--json-schema", '{"type": "array"}').json_schema == '{"type": "array"}'
    assert parsed("--regex", "[0-9]+").regex == "[0-9]+"
    assert parsed().params(n=1, seed=None) == SamplingParams(top_k=7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--logit-bias", "red"], "--logit-bias is 'red', and must be ID=X"),
        (["--json-schema", "missing.json"], "--json-schema is 'missing.json', and must be JSON that begins with"),
    ],
)
def test_decoding_flags_that_cannot_be_read_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*words)
