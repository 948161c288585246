import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking

from alignlab.errors import CheckpointError, ConfigError, DiskError
from alignlab.runs import metrics
from alignlab.runs.metrics import MetricsLogger, check_trackers
from alignlab.runs.metrics_file import read_metrics


def steps_in(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


def test_a_logged_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"reward": 0.25, "num_groups": 8})
        (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["step"], line["reward"], line["num_groups"]) == (1, 0.25, 8)
    assert line["time"] > 1.7e9 and "nonfinite" not in line


def test_numbers_that_are_not_finite_leave_valid_json(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, ("tensorboard",)) as logger:
        logger.log(1, {"kl": float("nan"), "loss": float("-inf"), "reward": 1.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["kl"] is None and line["loss"] is None and line["reward"] == 1.0
    assert line["nonfinite"] == {"kl": "nan", "loss": "-inf"}


def test_resuming_drops_later_steps_and_a_cut_line(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        for step in range(1, 6):
            logger.log(step, {"reward": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "rew')
    with MetricsLogger(tmp_path, resume_step=3) as logger:
        assert steps_in(tmp_path) == [1, 2, 3]
        logger.log(4, {"reward": 40.0})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert read_metrics(path)[-1]["reward"] == 40.0


def test_readers_skip_an_incomplete_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(path) == [{"step": 1}]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLogger(tmp_path) as logger:
            logger.log(1, {})
    assert steps_in(tmp_path) == [1]


def test_tensorboard_gets_the_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    with MetricsLogger(folder, ("tensorboard",)) as logger:
        logger.log(1, {"reward": 0.25})
        logger.log(2, {"reward": 0.5, "kl": float("nan")})
        logger.log(3, {"reward": 0.75})
    with MetricsLogger(folder, ("tensorboard",), resume_step=2) as logger:
        logger.log(3, {"reward": 1.0})
    events = EventAccumulator(str(folder / "trackers" / "run"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.5), (3, 1.0)]
    assert "kl" not in events.Tags()["scalars"]


def test_unknown_tracker_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'tensorbord'.*tensorboard"):
        check_trackers(("tensorbord",))


def test_a_tracker_without_its_package_is_refused_before_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match=r"'comet_ml'.*not installed; pip install comet-ml"):
        MetricsLogger(tmp_path, ("comet_ml",))
    assert list(tmp_path.iterdir()) == []


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    accelerator = SimpleNamespace(is_main_process=False)
    with MetricsLogger(tmp_path, ("tensorboard",), accelerator=accelerator) as logger:
        logger.log(1, {"reward": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_reserved_names_are_not_taken(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger, pytest.raises(AssertionError):
        logger.log(1, {"time": 1.0})


class Failing:
    """A tracker that cannot be started, or not be closed."""

    name, requires_logging_directory = "failing", False

    def __init__(self, run: str, *, at: str) -> None:
        self.at = at

    def start(self) -> None:
        if self.at == "start":
            raise RuntimeError("log in first")

    def log(self, values: dict[str, float], step: int) -> None:
        if self.at == "log":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")  # without a path, as from tensorboard's thread

    def finish(self) -> None:
        raise RuntimeError("the network is gone")


def test_a_tracker_that_cannot_be_started_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_make_tracker", lambda name, *words: Failing(name, at="start"))
    with pytest.raises(ConfigError, match="'tensorboard', which cannot be started: RuntimeError: log in first"):
        MetricsLogger(tmp_path, ("tensorboard",))


def test_a_tracker_that_cannot_be_closed_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "_make_tracker", lambda name, *words: Failing(name, at="finish"))
    with MetricsLogger(tmp_path, ("tensorboard",)) as logger:
        logger.log(1, {"loss": 0.5})
    assert steps_in(tmp_path) == [1] and "could not be closed (RuntimeError: the network is gone)" in caplog.text


def test_a_tracker_s_full_disk_is_named_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_make_tracker", lambda name, *words: Failing(name, at="log"))
    told = rf"what the tracker failing shows cannot be written to {tmp_path / 'trackers'}: Disk quota exceeded"
    with MetricsLogger(tmp_path, ("tensorboard",)) as logger, pytest.raises(DiskError, match=told):
        logger.log(1, {"loss": 0.5})


def logged(folder: Path, steps: int = 3) -> dict[str, Any]:
    """Lines of some steps, and what a checkpoint keeps of them."""
    with MetricsLogger(folder) as logger:
        for step in range(1, steps + 1):
            logger.log(step, {"reward": float(step)})
        state = logger.state()
    assert state is not None
    return state


def test_a_checkpoint_records_the_length_and_digest_of_its_metrics(tmp_path: Path) -> None:
    state = logged(tmp_path)
    with MetricsLogger(tmp_path, resume_step=3, saved=state) as logger:
        assert logger.state() == state
        logger.log(4, {"reward": 4.0})
        assert logger.state() != state
    with MetricsLogger(tmp_path, resume_step=3, saved=state):
        assert steps_in(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("position", range(0, 150, 7))
def test_every_flipped_bit_is_detected_on_resume(tmp_path: Path, position: int) -> None:
    state = logged(tmp_path)
    path = tmp_path / "metrics.jsonl"
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"of .*metrics\.jsonl must be as they were .* rename it to go on"):
        MetricsLogger(tmp_path, resume_step=3, saved=state)
    assert path.read_bytes() == content, "it is left as it is"
    path.rename(tmp_path / "metrics.damaged")
    MetricsLogger(tmp_path, resume_step=3, saved=state).close()
    assert steps_in(tmp_path) == []


def test_a_final_evaluation_is_kept_if_the_file_is_unchanged(tmp_path: Path) -> None:
    saved = logged(tmp_path)
    with MetricsLogger(tmp_path, resume_step=3, saved=saved) as logger:
        logger.log(3, {"eval/greedy": 0.5})
        ended = logger.state()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for content, kept in ((whole, 4), (whole.replace(b"0.5", b"0.6"), 3), (whole[:-4], 3)):
        path.write_bytes(content)
        MetricsLogger(tmp_path, resume_step=3, last_step=5, saved=saved, ended=ended).close()
        assert len(read_metrics(path)) == kept
    path.write_bytes(whole)
    MetricsLogger(tmp_path, resume_step=3, last_step=3, saved=saved, ended=ended).close()
    assert len(read_metrics(path)) == 3, "it comes again"


@pytest.mark.parametrize("line", ['{"step": 2, "rew', "[]", '{"reward": 1}', "[" * 100_000])
def test_a_line_without_metrics_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    logged(tmp_path, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    for read in (lambda: read_metrics(path), lambda: MetricsLogger(tmp_path, resume_step=3)):
        with pytest.raises(CheckpointError, match=r"line 2 of .*metrics\.jsonl must be the metrics of a step"):
            read()
