"""Rewards in processes of their own."""

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from alignlab.config.rewards import RewardLimits, RewardSettings
from alignlab.errors import ConfigError, RewardError
from alignlab.scoring.columns import check_columns
from alignlab.scoring.isolated import reward as isolated_reward
from alignlab.scoring.loading import LoadedReward, load_reward
from alignlab.scoring.runner import RewardRunner
from alignlab.scoring.source_digest import source_digest
from alignlab.types import Prompt
from tests.scoring.test_runner import PAIR, rollout

HERE = "tests.scoring.isolated_rewards"
ROOT = Path(__file__).parents[2]
Make = Callable[..., RewardRunner]


def isolated(function: str, *, memory_limit_gib: float | None = None, **options: Any) -> LoadedReward:
    return load_reward(
        RewardSettings(
            name=f"{HERE}.{function}", options=options, run_in="process", memory_limit_gib=memory_limit_gib
        )
    )


@pytest.fixture
def make() -> Iterator[Make]:
    runners: list[RewardRunner] = []

    def build(*rewards: LoadedReward, max_failures: int = 10, time_limit_s: float = 60.0) -> RewardRunner:
        runners.append(RewardRunner(rewards, RewardLimits(max_failures=max_failures, time_limit_s=time_limit_s)))
        return runners[-1]

    yield build
    for runner in runners:
        runner.close()
        for reward in runner.rewards:
            while (process := reward.function.borrow_process()).is_running:  # type: ignore[attr-defined]
                process.end()


def parts(runner: RewardRunner, name: str, rollouts: Any = PAIR) -> list[float | None]:
    return [value for scored in runner.score(rollouts) for value in scored.reward_parts[name]]


def test_isolated_functions_coroutines_and_classes_give_the_values_of_a_thread(make: Make) -> None:
    runner = make(isolated("lengths"), isolated("async_lengths", scale=2.0), isolated("Counting", first=4))
    for call in (5.0, 6.0):
        scored = runner.score([*PAIR, rollout([{"role": "user", "content": "q"}], ["a"])])
        assert [dict(each.reward_parts) for each in scored] == [
            {"lengths": (1.0, 2.0), "async_lengths": (2.0, 4.0), "Counting": (call, call)},
            {"lengths": (3.0, 4.0), "async_lengths": (6.0, 8.0), "Counting": (call, call)},
            {"lengths": (1.0,), "async_lengths": (None,), "Counting": (call,)},
        ]
    assert runner.num_failures == 0


def test_every_way_to_crash_is_one_counted_failure_and_the_next_call_works(
    make: Make, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    ways = {
        "exit": ("exited", "has exited with status 0; the last that it printed: printed by the reward"),
        "fork": ("exited", "has exited with status 4"),
        "segfault": ("exited", "was ended by SIGSEGV"),
        "abort": ("exited", "was ended by SIGABRT"),
        "close": ("exited", "its process has exited with status 1"),
        "garbage": ("exited", "wrote what is no reply"),
        "many": ("exited", "wrote what is no reply .*is longer than"),
        "memory": ("out of memory", "MemoryError"),
        "raise": ("raised", "KeyError: 'the sky'"),
        "sys.exit": ("raised", "SystemExit: 3"),
        "unread": ("not a number", "returned '2'"),
    }
    reward = isolated("misbehaving", how="-", memory_limit_gib=2.0)
    runner = make(reward, max_failures=len(ways))
    options: Any = reward.options
    for number, (way, (kind, text)) in enumerate(ways.items(), start=1):
        options["how"] = way
        assert parts(runner, "misbehaving") == ([1.0] if way == "unread" else [None]) + [None] * 3, way
        assert runner.num_failures == number and runner.failures["misbehaving", kind] >= 1, (way, runner.failures)
        assert re.search(text, runner.last_failures["misbehaving"]), runner.last_failures
        options["how"] = "-"
        assert parts(runner, "misbehaving") == [1.0] * 4, way
    assert capfd.readouterr() == ("", "")
    options["how"] = "exit"
    with pytest.raises(RewardError, match=rf"may fail {len(ways)} times .*misbehaving exited x"):
        runner.score(PAIR)


@pytest.mark.parametrize("how", ["hang", "stop"])
def test_a_call_over_its_time_limit_ends_the_process_and_its_children(
    how: str, make: Make, tmp_path: Path
) -> None:
    runner = make(isolated("process_of", folder=str(tmp_path)))
    assert parts(runner, "process_of") == [0.0] * 4
    reward, child = json.loads((tmp_path / "pids.json").read_text())
    place: Any = runner._places["process_of"]
    place._process.end()
    assert ends_within_a_minute(reward) and ends_within_a_minute(child)
    late = make(isolated("misbehaving", how=how), time_limit_s=0.3)
    assert parts(late, "misbehaving") == [None] * 4
    assert late.failures == {("misbehaving", "timeout"): 1}
    assert not late._places["misbehaving"]._process.is_running  # type: ignore[attr-defined]


def test_daemons_of_a_reward_are_ended_with_its_process(make: Make, tmp_path: Path) -> None:
    runner = make(isolated("starts_daemons", folder=str(tmp_path)))
    assert parts(runner, "starts_daemons") == [None] * 4
    assert "has exited with status 5" in runner.last_failures["starts_daemons"]
    for daemon in json.loads((tmp_path / "pids.json").read_text()):
        assert ends_within_a_minute(daemon)


def test_what_a_reward_prints_is_counted_and_not_shown(
    make: Make, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    runner = make(isolated("loud"), isolated("lengths"))
    for _ in range(2):
        assert parts(runner, "loud") == [0.0] * 4
    place: Any = runner._places["loud"]
    place._process.end()  # all that it has printed is read then
    assert runner.metrics() == {"printed_bytes/loud": 2.0 * (64 * 65537 + 8)}
    assert capfd.readouterr() == ("", "")
    runner.metrics()
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("reward 'loud' prints, and its output is not shown; the last of it: xxx")
    assert message.endswith("the end") and len(message) < 1000


@pytest.mark.parametrize(("function", "options"), [("lengths", {}), ("Counting", {"first": 4})])
def test_a_function_has_the_same_source_in_a_process_as_in_a_thread(function: str, options: dict[str, Any]) -> None:
    """So that a run may go on with it in the other place."""
    alone = isolated(function, **options)
    here = load_reward(RewardSettings(name=f"{HERE}.{function}", options=options))
    assert source_digest(alone.function) == source_digest(here.function) is not None


def test_an_isolated_reward_is_not_imported_into_the_training_process(tmp_path: Path, make: Make) -> None:
    code = "import os\nPID = os.getpid()\ndef r(completions): return [PID] * len(completions)\n"
    (tmp_path / "alone.py").write_text(code)
    loaded = load_reward(RewardSettings(name=f"{tmp_path}/alone.py:r", run_in="process"))
    assert parts(make(loaded), "r")[0] != os.getpid()
    assert not [name for name in sys.modules if name.startswith("alone_")]


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("exact_mach", {}, "did you mean 'exact_match'"),
        ("length", {"max_token": 3}, "did you mean 'max_tokens'"),
        (f"{HERE}.Counting", {}, "needs the option 'first'"),
        (f"{HERE}.STARTED", {}, "must be a function, and is str"),
        (f"{HERE}.InCaller", {}, "runs in the training's process; remove run_in: process"),
        ("reward_model", {"model": "/nowhere"}, "'/nowhere' is a reward model, which shares the policy's memory"),
        (f"{HERE}.lengths", {"scale": date(2026, 1, 2)}, "must be JSON .* and hold date"),
        ("EXITS", {}, "must start in a process of its own: its process has exited with status 0"),
    ],
)
def test_a_reward_that_cannot_start_is_refused_by_name(
    name: str, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    (tmp_path / "exits.py").write_text("import os\nos._exit(0)\n")
    name = f"{tmp_path}/exits.py:reward" if name == "EXITS" else name
    with pytest.raises(ConfigError, match=named):
        load_reward(RewardSettings(name=name, options=options, run_in="process"))


def test_a_shipped_reward_that_could_never_work_is_refused_before_the_run() -> None:
    reward = load_reward(RewardSettings(name="exact_match", run_in="process"))
    with pytest.raises(ConfigError, match="requires answer"):
        check_columns([reward], [Prompt((1,), "q", 0, {"task": "t"})], data="the training data")


def test_columns_that_are_no_json_are_refused_before_the_run_and_counted_in_it(make: Make) -> None:
    reward = isolated("lengths")
    prompts = [Prompt((1,), "q", 0, {"when": None}), Prompt((1,), "q", 1, {"when": [date(2026, 1, 2)]})]
    with pytest.raises(ConfigError, match=r"given JSON, and the column 'when' of row 1 holds date; write"):
        check_columns([reward], prompts, data="the training data")
    check_columns([isolated("async_lengths")], [Prompt((1,), "q", 0, {"answer": "x", **prompts[1].columns})], data="it")
    runner = make(reward)
    assert parts(runner, "lengths", [rollout("q", ["a"], keys={1: 2})]) == [None]
    assert runner.failures == {("lengths", "not JSON"): 1}
    assert "keys holds a key of type int" in runner.last_failures["lengths"]


def test_a_memory_limit_needs_a_process() -> None:
    with pytest.raises(ConfigError, match=r"memory_limit_gib is 1\.0, and must stay null where the reward runs"):
        RewardSettings(name="length", memory_limit_gib=1)


def test_a_process_that_is_too_slow_to_start_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(isolated_reward, "START_LIMIT_S", 0.2)
    (tmp_path / "slow.py").write_text("import threading\nthreading.Event().wait()\n")
    with pytest.raises(ConfigError, match=r"was not ready within 0\.2 s"):
        load_reward(RewardSettings(name=f"{tmp_path}/slow.py:reward", run_in="process"))


def test_the_reward_process_ends_when_the_training_process_dies(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from alignlab.config.rewards import RewardSettings\n"
        "from alignlab.scoring.isolated.reward import IsolatedReward\n"
        f"reward = IsolatedReward(RewardSettings(name='{HERE}.process_of', run_in='process'))\n"
        f"reward(completions=['a'], folder={str(tmp_path)!r})\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    pids = json.loads((tmp_path / "pids.json").read_text())
    assert pids and all(ends_within_a_minute(pid) for pid in pids)


def ends_within_a_minute(pid: int) -> bool:
    """Wait for the end of a process, which need not be a child of this one; return whether it came."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([handle], [], [], 60)
    os.close(handle)
    return bool(ended)
