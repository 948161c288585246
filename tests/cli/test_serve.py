"""`alignlab serve` says which GPUs are left for the training, which would otherwise take the servers'."""

import pytest
import torch

from alignlab.cli.serve import devices_of, training_advice, visible_gpus


@pytest.mark.parametrize(
    ("gpus", "num_servers", "expected"),
    [
        (["0", "1"], 1, "train on the other GPUs: CUDA_VISIBLE_DEVICES=1 alignlab train CONFIG"),
        (
            ["2", "3", "5", "7"], 2,
            "train on the other GPUs: CUDA_VISIBLE_DEVICES=5,7 bash launch/torchrun.sh 2 CONFIG",
        ),
    ],
)
def test_the_gpus_that_servers_leave_are_named(gpus: list[str], num_servers: int, expected: str) -> None:
    assert training_advice(gpus, num_servers, 0.9) == expected


@pytest.mark.parametrize(("gpus", "num_servers"), [(["0"], 1), (["0", "1"], 2), (["0"], 2)])
def test_without_a_gpu_left_the_fraction_of_memory_is_named(gpus: list[str], num_servers: int) -> None:
    advice = training_advice(gpus, num_servers, 0.9)
    assert advice is not None and "takes 90% of its GPU's memory" in advice
    assert advice.endswith("trainer.rollout.memory_frac=0.45")


def test_there_is_no_advice_on_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert visible_gpus() == [] and devices_of(2) == [None, None]
    assert training_advice(visible_gpus(), 1, 0.9) is None


def test_servers_take_the_first_gpus_in_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert devices_of(2) == ["4", "6"] and devices_of(4) == [None] * 4
