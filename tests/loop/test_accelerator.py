"""The accelerator is made from the machine and the config alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from alignlab.config.trainer import NumericsSettings
from alignlab.errors import ConfigError
from alignlab.loop import accelerator
from alignlab.loop.accelerator import make_accelerator
from tests.trainers.tiny import make_case


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"), ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:1"),
    ],
)
def test_a_setting_of_accelerate_launch_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"the environment has {name}={value}"):
        make_accelerator(60)


def test_what_accelerate_launch_sets_by_default_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("ACCELERATE_MIXED_PRECISION", "no"), ("ACCELERATE_DYNAMO_BACKEND", "NO"), ("ACCELERATE_USE_FSDP", "false")
    ):
        monkeypatch.setenv(name, value)
    made = make_accelerator(60)
    assert made.mixed_precision == "no" and made.device == torch.device("cpu")


def test_the_limit_of_a_collective_comes_after_the_limit_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = []
    monkeypatch.setattr(accelerator, "Accelerator", lambda **options: handlers.extend(options["kwargs_handlers"]) or
                        accelerate.Accelerator(cpu=True))
    make_accelerator(3600)
    limit, parallel = handlers
    assert limit.timeout.total_seconds() > 3600
    assert parallel.gradient_as_bucket_view and not parallel.broadcast_buffers


@pytest.mark.parametrize(
    "environment", [{"LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "2"}], ids=["torchrun", "rank alone"]
)
def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"3 ranks, and needs a GPU for each, of which it shows 2; start at most 2"):
        make_accelerator(60)


def test_a_number_of_ranks_that_vllm_has_set_is_none_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert accelerator._num_local_ranks() == 1


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7\.5, .* needs 8\.0"):
        accelerator._check_kernels((7, 5))


def test_a_machine_without_a_compiler_or_headers_is_told_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(accelerator.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs a C compiler"):
        accelerator._check_kernels((9, 0))
    monkeypatch.setattr(accelerator.shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setattr(accelerator.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs Python's headers, and there is no .*Python\.h"):
        accelerator._check_kernels((9, 0))
    (tmp_path / "Python.h").touch()
    accelerator._check_kernels((9, 0))


def test_ranks_draw_different_random_numbers_once_the_model_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    seeds = []
    for rank in (0, 2):
        monkeypatch.setattr(accelerate.Accelerator, "process_index", property(lambda self, rank=rank: rank))
        make_case("sft", tmp_path / f"run{rank}", make_model(), tokenizer)
        seeds.append(torch.initial_seed())
    assert seeds[1] - seeds[0] == 2


@pytest.mark.parametrize(("rank", "index"), [(None, 1), ("0", 0)])
def test_a_model_may_be_put_on_the_ranks_device_before_the_ranks_meet(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, index: int
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    for name, answer in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(accelerator, "_check_kernels", lambda capability: None)
    monkeypatch.setattr(accelerator, "apply_numerics", lambda numerics: None)
    assert accelerator.prepared_device(NumericsSettings()) == torch.device("cuda", index)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerator.prepared_device(NumericsSettings()) == torch.device("cpu")
