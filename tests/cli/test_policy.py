"""The dtype that a command loads a model in."""

import pytest
import torch

from alignlab.cli.policy import resolved_dtype


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
