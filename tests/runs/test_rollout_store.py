import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from alignlab.errors import DataError
from alignlab.runs.rollout_store import RolloutStore, clear_ranks_without_process, read_rollouts
from alignlab.types import Completion, Rollout

MakeRollout = Callable[..., Rollout]


def test_every_field_of_a_rollout_comes_back(tmp_path: Path, make_rollout: MakeRollout) -> None:
    rollout = make_rollout(index=7)
    RolloutStore(tmp_path).append(5, [rollout], advantages=[[0.5, -0.5]])
    first, second = read_rollouts(tmp_path).to_pylist()
    assert json.loads(first.pop("row")) == {"answer": "4"}
    assert first == {
        "step": 5,
        "prompt_index": 7,
        "sample_index": 0,
        "prompt": "2 + 2 =",
        "completion": "4",
        "prompt_ids": [1, 2, 3],
        "token_ids": [10, 11],
        "logprobs": [-0.5, -1.0],
        "raw_logprobs": [-0.25, -0.5],
        "reward": 1.0,
        "advantage": 0.5,
        "finish_reason": "stop",
        "policy_version": 3,
        "writers": None,
        "reward/exact": 1.0,
        "reward/length": 1.0,
    }
    assert (second["sample_index"], second["completion"], second["advantage"]) == (1, "five", -0.5)
    assert second["reward/exact"] is None and second["finish_reason"] == "length"


def test_any_reader_queries_the_folder(tmp_path: Path, make_rollout: MakeRollout) -> None:
    store = RolloutStore(tmp_path)
    for step in (1, 2):
        store.append(step, [make_rollout(index=i) for i in range(3)])
    dataset = ds.dataset(tmp_path, format="parquet")
    assert dataset.to_table(filter=ds.field("step") == 2).num_rows == 6
    frame = pd.read_parquet(tmp_path)
    assert frame.groupby("step")["reward/length"].mean().to_dict() == {1: 2.5, 2: 2.5}
    assert frame["advantage"].isna().all()


def test_nan_rewards_and_unscored_rollouts(tmp_path: Path, make_rollout: MakeRollout) -> None:
    scored = replace(make_rollout(), rewards=(1.0, float("nan")))
    bare = replace(make_rollout(), rewards=(), reward_parts={})
    RolloutStore(tmp_path).append(1, [scored, bare])
    rows = read_rollouts(tmp_path).to_pylist()
    assert rows[0]["reward"] == 1.0 and rows[1]["reward"] is None
    assert rows[2]["reward"] is None and rows[2]["reward/exact"] is None


def test_resuming_removes_later_steps_of_this_rank(tmp_path: Path, make_rollout: MakeRollout) -> None:
    stores = [RolloutStore(tmp_path, rank=rank) for rank in (0, 1)]
    for step in (1, 2, 3):
        for store in stores:
            store.append(step, [make_rollout()])
    store = RolloutStore(tmp_path, resume_step=2)
    RolloutStore(tmp_path, resume_step=2, rank=1)
    assert read_rollouts(tmp_path)["step"].to_pylist() == [1] * 4 + [2] * 4
    store.append(3, [make_rollout()])
    assert read_rollouts(tmp_path)["step"].to_pylist() == [1] * 4 + [2] * 4 + [3] * 2


def test_a_run_on_fewer_ranks_removes_later_steps_of_those_that_are_gone(
    tmp_path: Path, make_rollout: MakeRollout
) -> None:
    stores = [RolloutStore(tmp_path, rank=rank) for rank in (0, 1, 2)]
    for step in (1, 2):
        for store in stores:
            store.append(step, [make_rollout()])
    store = RolloutStore(tmp_path, resume_step=1)
    clear_ranks_without_process(1, tmp_path, 1, None)
    store.append(2, [make_rollout()])
    assert read_rollouts(tmp_path)["step"].to_pylist() == [1] * 6 + [2] * 2


def test_a_new_run_removes_leftover_rollouts(tmp_path: Path, make_rollout: MakeRollout) -> None:
    RolloutStore(tmp_path).append(1, [make_rollout()])
    RolloutStore(tmp_path)
    assert read_rollouts(tmp_path).num_rows == 0


def test_a_crash_while_writing_leaves_no_half_file(
    tmp_path: Path, make_rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RolloutStore(tmp_path)
    store.append(1, [make_rollout()])

    def crash(source: object, target: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        store.append(2, [make_rollout()])
    monkeypatch.undo()
    assert read_rollouts(tmp_path)["step"].to_pylist() == [1, 1]
    assert ds.dataset(tmp_path, format="parquet").to_table().num_rows == 2, "hidden files are not read"


def test_writers_are_stored_for_completions_that_the_policy_did_not_write_alone(
    tmp_path: Path, make_rollout: MakeRollout
) -> None:
    rollout = make_rollout()
    completions = [
        Completion.of([10, 11, 12, 13], writers=["policy", "tool", "user", "policy"]),
        Completion.of([10, 11], writers=["policy", "policy"]),
    ]
    RolloutStore(tmp_path).append(1, [replace(rollout, completions=tuple(completions))])
    assert read_rollouts(tmp_path)["writers"].to_pylist() == [["policy", "tool", "user", "policy"], None]


def test_files_of_a_version_without_writers_are_read(tmp_path: Path, make_rollout: MakeRollout) -> None:
    path = RolloutStore(tmp_path).append(1, [make_rollout()])
    rows = read_rollouts(tmp_path)
    pq.write_table(pq.read_table(path).drop_columns("writers"), path)
    (tmp_path / "_SHA256SUMS-rank0").unlink()
    assert read_rollouts(tmp_path).to_pylist() == rows.to_pylist()


def test_steps_with_other_rewards_are_read_together(tmp_path: Path, make_rollout: MakeRollout) -> None:
    store = RolloutStore(tmp_path)
    store.append(1, [replace(make_rollout(), reward_parts={})])
    store.append(2, [make_rollout()])
    assert read_rollouts(tmp_path)["reward/length"].to_pylist() == [None, None, 1.0, 4.0]


def test_every_flipped_bit_is_detected(tmp_path: Path, make_rollout: MakeRollout) -> None:
    store = RolloutStore(tmp_path)
    for step in (1, 2):
        store.append(step, [make_rollout()])
    rows = read_rollouts(tmp_path)
    draw = random.Random(0)
    for path in (*tmp_path.glob("*.parquet"), tmp_path / "_SHA256SUMS-rank0"):
        content = path.read_bytes()
        for position in [0, len(content) // 2, len(content) - 1, *draw.sample(range(len(content)), 20)]:
            flipped = bytearray(content)
            flipped[position] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(DataError, match=r"rank0\.parquet is damaged.*remove it to read the other steps"):
                read_rollouts(tmp_path)
        path.write_bytes(content)
    assert read_rollouts(tmp_path).equals(rows)


def test_digests_are_those_that_other_tools_check(tmp_path: Path, make_rollout: MakeRollout) -> None:
    store = RolloutStore(tmp_path)
    for step in (1, 2, 3):
        store.append(step, [make_rollout()])
    store = RolloutStore(tmp_path, resume_step=1)
    store.append(2, [make_rollout(index=4)])
    sums = (tmp_path / "_SHA256SUMS-rank0").read_text().splitlines()
    files = sorted(tmp_path.glob("*.parquet"))
    assert sums == [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    assert [file.name for file in files] == ["step-00000001-rank0.parquet", "step-00000002-rank0.parquet"]


def test_a_missing_file_is_logged_and_one_of_an_earlier_version_is_read(
    tmp_path: Path, make_rollout: MakeRollout, caplog: pytest.LogCaptureFixture
) -> None:
    store = RolloutStore(tmp_path)
    paths = [store.append(step, [make_rollout()]) for step in (1, 2)]
    paths[0].unlink()
    assert read_rollouts(tmp_path)["step"].to_pylist() == [2, 2]
    said = f"1 rollout files in {tmp_path} are missing, first step-00000001-rank0.parquet"
    assert said in caplog.text
    caplog.clear()
    RolloutStore(tmp_path, resume_step=2)
    assert said in caplog.text and len((tmp_path / "_SHA256SUMS-rank0").read_text().splitlines()) == 2
    (tmp_path / "_SHA256SUMS-rank0").unlink()
    assert read_rollouts(tmp_path).num_rows == 2 and "of an earlier version, which kept no digests" in caplog.text
    RolloutStore(tmp_path, resume_step=2)
    assert read_rollouts(tmp_path).num_rows == 2 and "get their digests now, as they are" in caplog.text


def test_rollouts_name_their_run_and_those_of_another_are_refused(tmp_path: Path, make_rollout: MakeRollout) -> None:
    path = RolloutStore(tmp_path, run_id="a" * 32).append(1, [make_rollout()])
    assert pq.read_schema(path).metadata[b"alignlab.run"] == b"a" * 32
    RolloutStore(tmp_path, run_id="a" * 32, resume_step=1)
    with pytest.raises(DataError, match=r"must hold rollouts of the run b+, and is of the run a+;"):
        RolloutStore(tmp_path, run_id="b" * 32, resume_step=1)
    assert path.exists()
    RolloutStore(tmp_path, run_id="b" * 32)
    assert not path.exists(), "a run that begins anew writes them again"
