"""Weights that come from the host: checkpoints, tensor by tensor, and a reference that rests there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.models.hub import checkpoints
from alignlab.models.hub.checkpoints import load_model
from tests.gpu.on_gpu_trainers import Kind, make, teacher
from tests.gpu.pretended import PretendedGPU
from tests.models.test_checkpoints import hub_folder

__all__ = ["make", "teacher"]


@pytest.mark.parametrize("name", ["llama-multi-query-tied", "mixtral", "qwen3-moe"])
def test_weights_go_to_the_device_as_they_are_read(
    name: str, tmp_path: Path, gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_folder(name, tmp_path)
    expected: Any = load_model(str(tmp_path), dtype=torch.bfloat16)
    sizes: list[int] = []
    count = PretendedGPU._count_crossing

    def watch(mode: PretendedGPU, source: torch.Tensor, to_gpu: bool, *others: Any) -> None:
        sizes.extend([source.numel()] if to_gpu else [])
        count(mode, source, to_gpu, *others)

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


def test_a_reference_on_the_host_scores_as_one_on_the_device(
    make: Callable[..., Any], gpu: Callable[..., Any]
) -> None:
    kind = Kind("grpo", False, False, torch.bfloat16)
    results = []
    for on_host in (False, True):
        with gpu() as mode:
            trainer = make(kind, f"{on_host}", kl={"coef": 0.5}, memory={"reference_on_host": on_host})
            reference = trainer.algorithm.reference.policy
            places = set()
            mode.watch = lambda func, tensors, place, of=reference, seen=places: seen.update(
                weight.device.type for weight in of.parameters()
            )
            metrics = [trainer.train_step(step) for step in (1, 2)]
            assert {weight.device.type for weight in reference.parameters()} == {"cpu" if on_host else "cuda"}
            assert places == ({"cpu", "cuda"} if on_host else {"cuda"})
            weights = {name: weight.detach().cpu() for name, weight in trainer.learner.trained.items()}
            results.append((weights, {k: v for k, v in metrics[1].items() if not k.endswith(("_s", "_per_s"))}))
    assert results[0][1] == results[1][1] and metrics[1]["kl"] > 0
    assert all(torch.equal(weight, results[1][0][name]) for name, weight in results[0][0].items())
