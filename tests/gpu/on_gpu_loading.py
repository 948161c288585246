"""A checkpoint is read onto the GPU tensor by tensor: no layer of experts is put together on the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.models.hub import checkpoints
from alignlab.models.hub.checkpoints import load_model
from tests.gpu.pretended import PretendedGPU
from tests.models.test_checkpoints import hub_folder


@pytest.mark.parametrize("name", ["llama-multi-query-tied", "mixtral", "qwen3-moe"])
def test_weights_go_to_the_device_as_they_are_read(
    name: str, tmp_path: Path, gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_folder(name, tmp_path)
    expected: Any = load_model(str(tmp_path), dtype=torch.bfloat16)
    sizes: list[int] = []
    count = PretendedGPU._count_crossing

    def watch(mode: PretendedGPU, source: torch.Tensor, to_gpu: bool, non_blocking: bool) -> None:
        sizes.extend([source.numel()] if to_gpu else [])
        count(mode, source, to_gpu, non_blocking)

    with gpu():
        monkeypatch.setattr(PretendedGPU, "_count_crossing", watch)
        monkeypatch.setattr(checkpoints, "_from_hub", None)
        model: Any = load_model(str(tmp_path), dtype=torch.bfloat16, device="cuda:0")
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert {tensor.device for tensor in tensors.values()} == {torch.device("cuda", 0)}
        state = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
    for key, tensor in expected.state_dict().items():
        assert torch.equal(state[key], tensor), key
    stacked = max((p.numel() for p in expected.parameters() if p.dim() == 3), default=0)
    assert max(sizes) < stacked or not stacked
