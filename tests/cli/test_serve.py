"""`alignlab serve` shares GPUs, their memory and cores out to servers, and says which GPUs are left for training."""

from __future__ import annotations

import pytest
import torch

from alignlab import cpu_threads
from alignlab.cli.serve import ServerPlan, plan_servers, training_advice, visible_gpus
from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import ConfigError
from alignlab.rollout.vllm.launch import server_environment

EIGHT = [str(number) for number in range(8)]
ONE_EACH = VLLMServerSettings()


@pytest.mark.parametrize(
    ("gpus", "num_servers", "tensor_parallel", "devices", "free", "memory_frac"),
    [
        (["4", "6", "7"], 2, 1, ["4", "6"], ["7"], 0.9),
        (EIGHT, 2, 2, ["0,1", "2,3"], ["4", "5", "6", "7"], 0.9),
        (EIGHT, 1, 4, ["0,1,2,3"], ["4", "5", "6", "7"], 0.9),
        (EIGHT, 3, 3, ["0,1,2", "3,4,5", "0,1,2"], ["6", "7"], 0.45),
        (["0"], 1, 1, ["0"], [], 0.45),
        (["0", "1"], 2, 1, ["0", "1"], [], 0.45),
        (["0", "1"], 3, 1, ["0", "1", "0"], [], 0.3),
        (["0"], 2, 1, ["0", "0"], [], 0.3),
        ([], 2, 1, [None, None], [], 0.9),
    ],
)
def test_servers_take_the_first_gpus_and_leave_memory_to_all_that_share_them(
    gpus: list[str], num_servers: int, tensor_parallel: int, devices: list[str | None], free: list[str],
    memory_frac: float,
) -> None:
    plan = plan_servers(gpus, num_servers, VLLMServerSettings(tensor_parallel=tensor_parallel))
    assert plan.devices == devices and plan.free_gpus == free
    assert plan.memory_frac == pytest.approx(memory_frac)


def test_a_given_fraction_of_memory_is_kept_and_too_few_gpus_are_refused() -> None:
    assert plan_servers(["0"], 2, VLLMServerSettings(memory_frac=0.7)).memory_frac == 0.7
    assert plan_servers([], 2, VLLMServerSettings(memory_frac=0.7)).memory_frac == 0.7
    with pytest.raises(ConfigError, match="tensor_parallel is 4, and this process sees 2 GPUs"):
        plan_servers(["0", "1"], 1, VLLMServerSettings(tensor_parallel=4))


@pytest.mark.parametrize(
    ("cores", "num_servers", "tensor_parallel", "expected"),
    [(2.0, 1, 1, 1), (64.0, 1, 1, 32), (64.0, 8, 1, 4), (64.0, 2, 4, 4), (3.5, 4, 1, 1)],
)
def test_half_of_the_cores_is_shared_out_to_all_processes_of_all_servers(
    cores: float, num_servers: int, tensor_parallel: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_threads, "available_cores", lambda: cores)
    settings = VLLMServerSettings(tensor_parallel=tensor_parallel)
    assert plan_servers([], num_servers, settings).num_threads == expected
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert server_environment(None, expected)["OMP_NUM_THREADS"] == str(expected)
    assert "OMP_NUM_THREADS" not in server_environment()
    monkeypatch.setenv("OMP_NUM_THREADS", "11")
    assert server_environment(None, expected)["OMP_NUM_THREADS"] == "11"


def test_a_server_sees_its_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert server_environment("2,3")["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert server_environment()["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


@pytest.mark.parametrize(
    ("gpus", "num_servers", "expected"),
    [
        (["0", "1"], 1, "train on the other GPU: CUDA_VISIBLE_DEVICES=1 alignlab train CONFIG"),
        (["2", "3", "5", "7"], 2, "train on the other GPUs: bash launch/torchrun.sh --gpus 5,7 2 CONFIG"),
    ],
)
def test_the_gpus_that_servers_leave_are_named(gpus: list[str], num_servers: int, expected: str) -> None:
    assert training_advice(plan_servers(gpus, num_servers, ONE_EACH)) == expected


def test_without_a_gpu_left_the_fraction_of_memory_is_named() -> None:
    advice = training_advice(ServerPlan(["0"], 0.9, [], 1))
    assert "a server takes 90% of its GPU's memory" in advice
    assert "trainer.rollout.memory_frac=0.45 leaves half to a training on it, 0.9 is for a training elsewhere" in advice


def test_gpus_in_view_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert visible_gpus() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert visible_gpus() == ["4", "6", "7"]
