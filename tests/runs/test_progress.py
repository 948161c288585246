import io
from collections import deque

import pytest
from rich.console import Console

from alignlab.runs import progress as module
from alignlab.runs.progress import TrainingProgress, clock, sparkline

METRICS = {"reward": 0.5, "accuracy": 0.25, "kl": 0.0123, "completion_tokens": 12.0, "tokens_per_s": 1234.0}


def text_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=40), stream


def terminal_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=120, force_terminal=True), stream


def test_without_a_terminal_one_line_a_step_is_printed() -> None:
    console, stream = text_console()
    with TrainingProgress(20, title="GRPO", console=console) as progress:
        with progress.phase("generate"):
            pass
        progress.step(1, METRICS)
        progress.note("saved")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("GRPO step 1/20  reward 0.500  accuracy 0.250  KL 0.0123  length 12.0  tokens/s 1,234  gen")
    assert "generate 0.0s" in first and first.endswith("left 0:00")
    assert second == "saved"


def test_the_live_display_shows_steps_metrics_and_phase() -> None:
    console, stream = terminal_console()
    with TrainingProgress(20, title="GRPO", done_steps=5, console=console) as progress:
        progress.step(6, METRICS)
        with progress.phase("update"):
            console.print(progress._render())
    shown = stream.getvalue()
    for text in ("GRPO step 6/20", "accuracy", "0.250", "KL", "tokens/s", "1,234", "update"):
        assert text in shown


@pytest.mark.parametrize("make_console", [text_console, terminal_console])
def test_nothing_goes_to_standard_output(make_console: object, capfd: pytest.CaptureFixture[str]) -> None:
    console, _ = make_console()  # type: ignore[operator]
    with TrainingProgress(2, console=console) as progress:
        progress.step(1, METRICS)
        print('{"task": "sums"}')
    assert capfd.readouterr().out == '{"task": "sums"}\n'


def test_the_default_console_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(2) as progress:
        progress.step(1, METRICS)
    out, err = capsys.readouterr()
    assert out == "" and "step 1/2" in err


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(2, enabled=False) as progress:
        with progress.phase("generate"):
            progress.step(1, METRICS)
        progress.note("text")
    assert capsys.readouterr() == ("", "")


def test_time_left_and_phase_durations_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with TrainingProgress(10, done_steps=4, enabled=False) as progress:
        assert progress.seconds_left is None
        for step in (5, 6):
            for name, seconds in (("generate", 2.0), ("update", 1.0), ("generate", 3.0)):
                with progress.phase(name):
                    now[0] += seconds
            progress.step(step, {})
        assert progress.seconds_left == pytest.approx(6.0 * 4)
        assert progress.phase_seconds == {"generate": 5.0, "update": 1.0}


def test_markup_in_a_note_is_printed_as_text() -> None:
    console, stream = text_console()
    with TrainingProgress(1, console=console) as progress:
        progress.note("[bold]1[/bold]")
    assert stream.getvalue() == "[bold]1[/bold]\n"


def test_clock_and_sparkline() -> None:
    assert [clock(s) for s in (None, 5, 65.4, 3661)] == ["?", "0:05", "1:05", "1:01:01"]
    assert sparkline(deque([0.0, 7.0, float("nan"), 3.0])) == "▁█▄"
    assert sparkline(deque([1.0, 1.0])) == "▁▁" and sparkline(deque([1.0])) == ""
