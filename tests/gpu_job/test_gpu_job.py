"""The GPU job itself, tried on the CPU: its checks pass there, and a part that fails is a line of its own."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_job.__main__ import _run, main
from tests.gpu_job.lines import checked, relative_error


def test_the_job_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machine", "experts", "head", "waits", "decoding", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "no GPU" in table and "failed" not in table
    assert (table.count(" ok "), table.count(" skipped ")) == (8, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_part_that_ends_with_an_error_is_a_failed_line(capsys: pytest.CaptureFixture[str]) -> None:
    [line] = _run("limits", "cuda")
    assert line.name == "limits" and line.verdict == "failed" and "CUDA" in line.detail
    assert main(["machine"]) == 2
    assert "no GPU is visible" in capsys.readouterr().err


def test_an_error_above_its_limit_or_without_a_number_fails() -> None:
    exact = torch.ones(4)
    assert relative_error(exact * 1.01, exact) == pytest.approx(0.01)
    assert checked("a", 0.01, 0.02).verdict == "ok"
    assert checked("a", 0.03, 0.02).verdict == "failed"
    assert checked("a", float("nan"), 0.02).verdict == "failed"
