import functools
from pathlib import Path
from typing import Any

import pytest
from alignlab_rewards.exact_match import exact_match

from alignlab.config.rewards import RewardSettings
from alignlab.errors import ConfigError
from alignlab.training.reward_functions import installed_rewards, load_reward

SHIPPED = {"math_answer", "reasoning_gym_answer", "exact_match", "regex_format", "length", "repetition", "combine"}


def own_reward(*, completions: list[str], scale: float = 1.0, **columns: Any) -> list[float]:
    return [scale] * len(completions)


async def own_async_reward(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def test_shipped_plug_ins_are_installed_and_load() -> None:
    assert set(installed_rewards()) >= SHIPPED
    assert all(callable(load_reward(RewardSettings(name=name)).function) for name in SHIPPED)


def test_an_installed_plug_in() -> None:
    settings = RewardSettings(name="exact_match", weight=2.0, options={"ignore_case": True})
    loaded = load_reward(settings)
    assert (loaded.name, loaded.function, loaded.weight) == ("exact_match", exact_match, 2.0)
    assert loaded.options == {"ignore_case": True}


@pytest.mark.parametrize("name", [f"{__name__}.own_reward", f"{__name__}:own_reward"])
def test_a_dotted_path(name: str) -> None:
    loaded = load_reward(RewardSettings(name=name, options={"scale": 3.0}))
    assert (loaded.name, loaded.function) == ("own_reward", own_reward)


def test_a_function_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("RUNS = []\nRUNS.append(1)\ndef r(completions, **columns):\n    return RUNS\n")
    monkeypatch.chdir(tmp_path)
    by_relative = load_reward(RewardSettings(name="mine.py:r"))
    by_absolute = load_reward(RewardSettings(name=f"{tmp_path}/mine.py:r"))
    assert by_relative.name == "r"
    assert by_relative.function is by_absolute.function, "the file runs once"
    assert by_relative.function([]) == [1]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (own_reward, "own_reward"),
        (own_async_reward, "own_async_reward"),
        (functools.partial(own_reward, scale=2.0), "own_reward"),
    ],
)
def test_a_live_callable(function: Any, name: str) -> None:
    loaded = load_reward(function)
    assert (loaded.name, loaded.function, loaded.weight, dict(loaded.options)) == (name, function, 1.0, {})


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("exact_mach", r"did you mean 'exact_match'.*Installed: .*math_answer"),
        ("no_package_of_this_name.reward", "must be importable.*no_package_of_this_name"),
        (f"{__name__}.no_such", "must be importable.*no_such"),
        (f"{__name__}.SHIPPED", "must be a function, and is set"),
        ("nowhere.py:reward", r"the file of a reward must exist, and nowhere.py does not"),
    ],
)
def test_an_unknown_name_says_what_there_is(name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_reward(RewardSettings(name=name))


def test_a_file_that_fails_or_lacks_the_function(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_reward(RewardSettings(name=f"{path}:reward"))
    path.write_text("def other(completions): ...\n")
    with pytest.raises(ConfigError, match=r"must hold the reward 'reward'.*it has: other"):
        load_reward(RewardSettings(name=f"{path}:reward"))


@pytest.mark.parametrize(
    ("name", "option", "named"),
    [
        ("length", "max_token", "did you mean 'max_tokens'.*min_tokens"),
        (f"{__name__}.own_async_reward", "scale", "Its options, and the columns it reads: none"),
        ("length", "completion_ids", "no option 'completion_ids'"),
    ],
)
def test_an_unknown_option_names_the_known(name: str, option: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_reward(RewardSettings(name=name, options={option: 1}))


def test_what_is_no_reward_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a callable"):
        load_reward("length")  # type: ignore[arg-type]
