"""The GPU job itself, tried on the CPU: its checks pass there, and a part that fails is a line of its own."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.graph_stand_in import Rerun
from tests.gpu_job.__main__ import PARTS, _lines_in, _run, main
from tests.gpu_job.lines import checked, relative_error


def test_the_job_runs_a_part_on_a_cpu_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machine", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "no GPU" in table and "failed" not in table and table.count(" skipped ") == 1


def test_parts_pass_on_a_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rerun, "made", [])
    for part in ("experts", "head", "waits", "decoding"):
        assert main([part, "--alone", "--device", "cpu"]) == 0
    lines = _lines_in(capsys.readouterr().out)
    assert [line.name for line in lines if line.verdict not in ("ok", "skipped")] == []
    assert [sum(line.verdict == verdict for line in lines) for verdict in ("ok", "skipped")] == [8, 4]


def test_a_part_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["attentions"])
    message = capsys.readouterr().err
    assert all(part in message for part in PARTS)


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
