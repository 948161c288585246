"""Every trainer trains, saves and resumes on a pretended GPU, with results equal to the CPU's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.evaluation import report
from alignlab.models.hub.checkpoints import new_model
from tests.trainers.conftest import DENSE, SPARSE
from tests.trainers.test_conformance import metrics_of
from tests.trainers.tiny import CASES, make_case


@dataclass(frozen=True)
class Kind:
    """What a trainer of the case `name` trains."""

    name: str
    lora: bool
    mixture: bool
    dtype: torch.dtype = torch.float32

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that differ by device, or by what is trained, where they are not given."""
        settings: dict[str, Any] = {"teacher": {"dtype": "float32"}} if CASES[self.name].has_teacher else {}
        return settings | ({"critic": {"form": "model"}} if self.name == "ppo" and not self.lora else {})


# Each trainer trains an adapter and all weights, a dense model and a mixture.
NEED_LORA = {"ppo_critic_head"}
KINDS = [
    Kind(name, lora, mixture=lora != CASES[name].lora)
    for name in CASES for lora in (True, False) if lora or name not in NEED_LORA
]
KINDS += [Kind("grpo", True, True, torch.bfloat16), Kind("dpo", True, False, torch.bfloat16)]


def name_of(kind: Kind) -> str:
    return f"{kind.name}-{'lora' if kind.lora else 'all'}-{'mixture' if kind.mixture else 'dense'}-{kind.dtype}"


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "plot_curves", lambda *_, **__: False)  # slower than the training

    def make(kind: Kind, folder: str, **options: Any) -> Any:
        torch.manual_seed(0)
        model = new_model(
            SPARSE if kind.mixture else DENSE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to(kind.dtype)
        monkeypatch.setitem(CASES, kind.name, replace(CASES[kind.name], lora=kind.lora))
        options |= kind.settings
        return make_case(kind.name, tmp_path / folder / "run", model, tokenizer, num_steps=2, **options)

    return make


def stop_after_one_step(trainer: Any, step: int, metrics: Any) -> None:
    if step == 1:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_run_stopped_and_resumed_on_a_gpu_equals_the_run_on_a_cpu(
    kind: Kind, make: Callable[..., Any], gpu: Callable[..., Any], cpu: Callable[..., Any]
) -> None:
    with cpu():
        expected = make(kind, "cpu").train()
    with gpu():
        stopped = make(kind, "gpu", callbacks=(stop_after_one_step,))
        assert stopped.accelerator.device == torch.device("cuda", 0)
        assert stopped.train().interrupted
        resumed = make(kind, "gpu")
        result = resumed.train(resume=True)
        assert {weight.device.type for weight in resumed.learner.trained.values()} == {"cuda"}
        state = next(iter(resumed.learner.optimizer.state.values()))
        assert {value.device.type for value in state.values()} == {"cuda"}
    weights, expected_weights = (saved_weights(r.model_path) for r in (result, expected))
    assert weights.keys() == expected_weights.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected_weights[name])] == []
    assert metrics_of(result.folder) == metrics_of(expected.folder)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in the files of a saved model."""
    return {name: weight for path in sorted(folder.glob("*.safetensors")) for name, weight in load_file(path).items()}
