"""Every trainer trains, is stopped and resumes on a pretended GPU, with results equal to the CPU's.

A case is a trainer, an adapter or all weights, a dense model or a mixture, and a precision. Every two of these meet, in
four cases of each trainer: two in float32, one in bfloat16 and one in float16. `--full` runs all twelve.

In float32 a run has torch's own numerics. In 16 bits it is deterministic: an operation for which CUDA has no
deterministic form raises, and one that adds floats in an open order is listed.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.loop import ending_check
from alignlab.loop.learner import Learner
from alignlab.loop.numerics import VLLM_PRECISION, WORKSPACE
from alignlab.models.hub.checkpoints import new_model
from alignlab.rollout.embedded.engine import EmbeddedEngine
from tests.gpu.pretended import PretendedGPU
from tests.gpu.steps import Steps
from tests.trainers.conftest import DENSE, SPARSE
from tests.trainers.test_conformance import metrics_of
from tests.trainers.tiny import CASES, make_case, save_teacher

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEED_LORA = {"ppo_critic_head"}
SMALL: dict[str, Any] = {"num_prompts": 2, "group_size": 2, "sampling": {"max_new_tokens": 3}}
"""Sizes of a step of online trainers."""
MAX_UPDATE_WAITS = 3
"""Counts of the step and of each pack; metrics; the norm of the gradient, on which the step itself depends."""


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

    @property
    def is_deterministic(self) -> bool:
        """Whether its run has one order of sums."""
        return self.dtype != torch.float32


FULL = [
    Kind(name, lora, mixture, dtype)
    for name, lora, mixture, dtype in itertools.product(CASES, (True, False), (True, False), DTYPES)
    if lora or name not in NEED_LORA
]


def sampled() -> Iterator[Kind]:
    """Yield four cases of each trainer. Of the four that it has in float32, two have nothing in common."""
    for number, name in enumerate(CASES):
        combinations = [(True, True), (False, False)] if number % 2 else [(True, False), (False, True)]
        if name in NEED_LORA:
            combinations = [(True, True), (True, False)]
        first, second = combinations if number % 4 < 2 else reversed(combinations)
        for combination, dtype in zip(
            (first, second, first, second), (torch.float32, torch.float32, *DTYPES[1:]), strict=True
        ):
            yield Kind(name, *combination, dtype)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give the test the cases that are asked for."""
    if "kind" in metafunc.fixturenames:
        kinds = FULL if metafunc.config.getoption("full") else list(sampled())
        metafunc.parametrize("kind", kinds, ids=name_of)


def name_of(kind: Kind) -> str:
    return f"{kind.name}-{'lora' if kind.lora else 'all'}-{'mixture' if kind.mixture else 'dense'}-{kind.dtype}"


def test_every_two_factors_of_a_case_meet() -> None:
    chosen = list(sampled())
    assert len(set(chosen)) == 4 * len(CASES)
    for name in CASES:
        own = [kind for kind in chosen if kind.name == name]
        assert {kind.dtype for kind in own} == set(DTYPES) and {kind.mixture for kind in own} == {True, False}
        assert {kind.lora for kind in own} == ({True} if name in NEED_LORA else {True, False})
    for first, second in (("lora", "mixture"), ("lora", "dtype"), ("mixture", "dtype")):
        pairs = {(getattr(kind, first), getattr(kind, second)) for kind in chosen}
        assert len(pairs) == 2 * (2 if second == "mixture" else len(DTYPES))


@pytest.fixture(scope="session")
def teacher(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_teacher(tmp_path_factory.mktemp("teacher"), tokenizer))


@pytest.fixture
def make(tokenizer: Any, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def make(kind: Kind, folder: str, **options: Any) -> Any:
        if kind.dtype != torch.float32:  # once for each trainer is enough
            monkeypatch.setattr(ending_check, "check_saving", lambda *arguments: None)
        torch.manual_seed(0)
        model = new_model(
            SPARSE if kind.mixture else DENSE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to(kind.dtype)
        monkeypatch.setitem(CASES, kind.name, replace(CASES[kind.name], lora=kind.lora))
        (tmp_path / folder).mkdir(exist_ok=True)
        if not (tmp_path / folder / "teacher").exists():
            (tmp_path / folder / "teacher").symlink_to(teacher)
        options |= kind.settings
        return make_case(kind.name, tmp_path / folder / "run", model, tokenizer, num_steps=2, **options)

    return make


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings that a deterministic run makes for its process."""
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    monkeypatch.setenv(VLLM_PRECISION, "highest")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def stop_after_one_step(trainer: Any, step: int, metrics: Any) -> None:
    if step == 1:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("deterministic")
def test_a_run_stopped_and_resumed_on_a_gpu_equals_the_run_on_a_cpu(
    kind: Kind, make: Callable[..., Any], gpu: Callable[..., Any], cpu: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {name: SMALL[name] for name in CASES[kind.name].settings if name in SMALL}
    options["numerics"] = {"deterministic": kind.is_deterministic}
    with cpu():
        trained = make(kind, "cpu", **options)
        expected = trained.train()
    with gpu() as mode:
        waits = count_waits_of_updates(mode, monkeypatch)
        stopped = make(kind, "gpu", callbacks=(stop_after_one_step,), **options)
        assert stopped.accelerator.device == torch.device("cuda", 0)
        assert torch.are_deterministic_algorithms_enabled() == kind.is_deterministic
        assert stopped.train().interrupted
        resumed = make(kind, "gpu", **options)
        result = resumed.train(resume=True)
        state = next(iter(resumed.learner.optimizer.state.values()))
        assert {value.device.type for value in state.values()} == {"cuda"}
        assert not kind.is_deterministic or mode.unordered == set()
        for role, learner in resumed.learners.items():
            assert {weight.device.type for weight in learner.trained.values()} == {"cuda"}
            assert different(learner.trained, trained.learners[role].trained) == []
    assert different(saved_weights(result.model_path), saved_weights(expected.model_path)) == []
    assert metrics_of(result.folder) == metrics_of(expected.folder)
    assert waits and max(num for num, _ in waits) <= MAX_UPDATE_WAITS, max(waits)[1]


def train_on_both(
    make: Callable[[str], Any], gpu: Callable[..., Any], cpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    *, max_step_waits: int = 1,
) -> list[tuple[int, str]]:
    """Train on the CPU and on the GPU, and assert that weights and metrics are equal, and what rollouts wait for.

    Args:
        make: returns a new trainer, whose run is in the folder of this name.
        max_step_waits: of a decoding step.

    Returns:
        The waits of each update on the GPU, and the lines that wait.
    """
    with cpu():
        trainer = make("cpu")
        expected = trainer.train()
    with gpu() as mode:
        waits = count_waits_of_updates(mode, monkeypatch)
        on_gpu = make("gpu")
        assert on_gpu.accelerator.device == torch.device("cuda", 0)
        steps = count_waits_of_rollouts(mode, monkeypatch)
        result = on_gpu.train()
        for of_rollout in steps:
            of_rollout.check(max_step_waits)
        assert different(on_gpu.learner.trained, trainer.learner.trained) == []
    assert different(saved_weights(result.model_path), saved_weights(expected.model_path)) == []
    assert metrics_of(result.folder) == metrics_of(expected.folder)
    return waits


def different(weights: dict[str, Any], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the weights, on either device, that are not equal to the bit, and of those that lack."""
    shared = weights.keys() & expected.keys()
    is_equal = {name: torch.equal(weights[name].detach().cpu(), expected[name].detach()) for name in shared}
    return [name for name in sorted(weights.keys() | expected.keys()) if not is_equal.get(name, False)]


def count_waits_of_updates(mode: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Return a list to which each update on the device adds its waits, and the lines that wait."""
    update, add_gradients = Learner.update, Learner._add_gradients
    waits: list[tuple[int, str]] = []

    def counted_update(self: Learner, *args: Any, **options: Any) -> dict[str, float]:
        mode.reset()
        metrics = update(self, *args, **options)
        waits.append((mode.num_waits, mode.report()))
        return metrics

    def counted_try(self: Learner, packs: Any, *args: Any) -> dict[str, torch.Tensor]:
        if mode.num_waits > 1:  # beside the counts, an update in float16 that is tried again
            mode.reset()
        return add_gradients(self, packs, *args)

    monkeypatch.setattr(Learner, "update", counted_update)
    monkeypatch.setattr(Learner, "_add_gradients", counted_try)
    return waits


def count_waits_of_rollouts(mode: PretendedGPU, monkeypatch: pytest.MonkeyPatch) -> list[Steps]:
    """Return a list to which each generation on the device adds the waits of its steps."""
    generate, generations = EmbeddedEngine.generate, list[Steps]()

    def counted(self: EmbeddedEngine, *args: Any, **options: Any) -> Any:
        generations.append(Steps(mode))
        return generate(self, *args, on_step=generations[-1])

    monkeypatch.setattr(EmbeddedEngine, "generate", counted)
    return generations


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in the files of a saved model."""
    return {name: weight for path in sorted(folder.glob("*.safetensors")) for name, weight in load_file(path).items()}
