"""Every place that writes says what could not be written, where, and what to do, whichever library writes there."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import alignlab.cli
from alignlab.data.examples import Example
from alignlab.data.preferences import Preference
from alignlab.errors import DiskError
from alignlab.files.atomic_files import write_atomically
from alignlab.models.hub.checkpoints import new_model, save_model
from alignlab.models.hub.export import write_base
from alignlab.models.hub.saving import published
from alignlab.network.credentials import token_file
from alignlab.rollout.vllm.serialization import weights_file
from alignlab.runs.checkpoint import load_latest, save_checkpoint
from alignlab.runs.journal import Journal
from alignlab.runs.metrics_file import MetricsFile
from alignlab.runs.reference_cache import ReferenceCache
from alignlab.runs.rollout_store import RolloutStore
from alignlab.runs.teacher_cache import TeacherCache
from alignlab.scoring.judges.answer_cache import AnswerStore
from alignlab.types import Completion, Prompt, Rollout

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ROLLOUT = Rollout(Prompt((1,), "p" * 999, index=0), (Completion.of((1,), "x"),))


@contextlib.contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """No file may be larger: every library meets it where it would meet a full disk."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return new_model(SHAPE, vocab_size=16)


def publish_model(folder: Path, model: Any) -> None:
    with published(folder / "model") as unfinished:
        save_model(model, unfinished)


def send_weights(folder: Path, model: Any) -> None:
    zeros = torch.zeros(1000)
    with weights_file([("x", zeros)], {"x": zeros.to("meta")}, None):
        pass


def write_metrics(folder: Path, model: Any) -> None:
    with contextlib.closing(MetricsFile(folder / "x")) as file:
        file.append("y" * 200)


def keep_reference(folder: Path, model: Any) -> None:
    ReferenceCache(model).get_or_make([Preference((1, 2), (3, 4), (5, 6))], lambda examples: [(0.0,) * 4])


def keep_teacher(folder: Path, model: Any) -> None:
    TeacherCache(model, k=4, temperature=1.0, width=4).get_or_make([Example((1, 2, 3), (False, True, True))], ask)


def ask(examples: Any) -> Any:
    raise AssertionError("the teacher is asked before there is room for its answers")


def checkpoint(folder: Path, model: Any) -> Path:
    return save_checkpoint(folder, 2, tensors={"model": {"x": torch.zeros(1000)}}, state={}, keep=1)


WRITERS: dict[str, tuple[int, str, Callable[[Path, Any], Any]]] = {
    "a file": (10, "the file", lambda folder, model: write_atomically(folder / "x", "x" * 100)),
    "a checkpoint": (1000, "the checkpoint", checkpoint),
    "a model": (2000, "the model", publish_model),
    "a model for vLLM": (2000, "the model for vLLM", lambda folder, model: write_base(model, folder)),
    "weights for servers": (1000, "the weights for vLLM's servers", send_weights),
    "rollouts": (100, "the rollouts", lambda folder, model: RolloutStore(folder).append(1, [ROLLOUT])),
    "a journal": (100, "the journal", lambda folder, model: Journal(folder / "x").append([{"x": "y" * 200}])),
    "metrics": (100, "the metrics", write_metrics),
    "answers": (6000, "the judges' answers", lambda folder, model: AnswerStore(folder / "x").put({"k": [0.5] * 9999})),
    "a reference": (100, "the reference's log-probs", keep_reference),
    "a teacher": (150, "the teacher's answers", keep_teacher),
    "a lock": (10, "a lock", keep_reference),
    "a token": (10, "the servers' token", lambda folder, model: token_file(folder / "x")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_is_a_disk_error(
    name: str, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed goes to memory: the limit is for the files of the whole process."""
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    limit, what, write = WRITERS[name]
    with small_files(limit), pytest.raises(DiskError, match=f"^{what} cannot be written to /.*; ") as raised:
        write(tmp_path, model)
    assert raised.value.errno is not None and "\n" not in str(raised.value)


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors={"model": {"x": torch.ones(2)}}, state={}, keep=1)
    with small_files(1000), pytest.raises(DiskError, match=r"step-00000002: .*File too large.*ulimit -f"):
        checkpoint(tmp_path, None)
    before = load_latest(tmp_path)
    assert before is not None and before.step == 1
    checkpoint(tmp_path, None)
    after = load_latest(tmp_path)
    assert after is not None and after.step == 2


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), 2, "train: /x/y: Permission denied; correct its owner"),
        (DiskError("x cannot be written: full; free some space"), 2, "alignlab train: x cannot be written: full; free"),
        (Exception("I/O error: No space left on device (os error 28)"), 2, "(os error 28); free some space there"),
        (MemoryError(), 2, "alignlab train: the memory is used up"),
    ],
)  # fmt: skip
def test_the_command_line_reports_a_disk_error_in_one_line(
    error: Exception, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("alignlab.config.loader.load_config", fail)
    assert alignlab.cli.main(["train", "x.yaml"]) == status
    told = capsys.readouterr().err
    assert text in told and told.count("\n") == 1
    with pytest.raises(type(error)):
        alignlab.cli.main(["train", "x.yaml", "--debug"])


def test_the_command_line_shows_the_traceback_of_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("alignlab.config.loader.load_config", fail)
    with pytest.raises(KeyError):
        alignlab.cli.main(["train", "x.yaml"])


def test_a_failed_sync_of_metrics_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(DiskError, match=r"metrics\.jsonl"):
        metrics.state()
    metrics.close()
