import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from alignlab_rewards.exact_match import exact_match

from alignlab.config.rewards import RewardSettings
from alignlab.errors import ConfigError
from alignlab.loop.inputs import resolve_rewards
from alignlab.models.hub.checkpoints import new_model
from alignlab.scoring.loading import load_reward
from alignlab.scoring.plugins import installed_rewards
from alignlab.scoring.reward_model import ModelReward

SHIPPED = {"math_answer", "reasoning_gym_answer", "exact_match", "regex_format", "length", "repetition", "combine"}


def own_reward(*, completions: list[str], scale: float = 1.0, **columns: Any) -> list[float]:
    return [scale] * len(completions)


async def own_async_reward(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def test_shipped_plug_ins_are_installed_and_load() -> None:
    assert set(installed_rewards()) >= SHIPPED
    assert all(callable(load_reward(RewardSettings(name=name)).function) for name in SHIPPED)


def test_an_installed_plug_in_is_loaded_by_name() -> None:
    settings = RewardSettings(name="exact_match", weight=2.0, options={"ignore_case": True})
    loaded = load_reward(settings)
    assert (loaded.name, loaded.function, loaded.weight) == ("exact_match", exact_match, 2.0)
    assert loaded.options == {"ignore_case": True}


@pytest.mark.parametrize("name", [f"{__name__}.own_reward", f"{__name__}:own_reward"])
def test_a_function_is_loaded_by_dotted_path(name: str) -> None:
    loaded = load_reward(RewardSettings(name=name, options={"scale": 3.0}))
    assert (loaded.name, loaded.function) == ("own_reward", own_reward)


def test_a_function_is_loaded_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_callable_is_a_reward_named_after_itself(function: Any, name: str) -> None:
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
def test_an_unknown_name_is_refused_with_the_nearest_names(name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_reward(RewardSettings(name=name))


def test_a_file_that_raises_or_lacks_the_function_is_refused(tmp_path: Path) -> None:
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
def test_an_unknown_option_is_refused_with_the_known_options(name: str, option: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_reward(RewardSettings(name=name, options={option: 1}))


class Judge:
    def __init__(self, strict: bool = False) -> None:
        if strict not in (True, False):
            raise ValueError("strict is a switch")

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)


class Deaf:
    pass


def by_place(prompts: Any, completions: Any, /, **columns: Any) -> list[float]:
    return []


@pytest.mark.parametrize(
    ("reward", "named"),
    [
        (Judge, r"holds the class Judge, .* give an object, Judge\(\.\.\.\)"),
        (lambda: [1.0], "takes no argument by name, so that it would see no completion"),
        (lambda *values: [1.0], "takes no argument by name"),
        (by_place, "'by_place' takes prompts by position alone, and rewards are called with names"),
        (RewardSettings(name=f"{__name__}.by_place"), "takes prompts by position alone"),
        (RewardSettings(name=f"{__name__}.Judge", options={"strict": "x"}), "could not be made .*strict is a switch"),
        (RewardSettings(name=f"{__name__}.Deaf"), "a class whose objects cannot be called; give it a method __call__"),
    ],
)
def test_a_reward_without_keyword_arguments_is_refused(reward: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_reward(reward)


def test_callable_objects_and_classes_looked_up_by_name_are_rewards() -> None:
    for reward in (Judge(), RewardSettings(name=f"{__name__}.Judge", options={"strict": True})):
        assert load_reward(reward).function(completions=["a"]) == [1.0]


def test_objects_that_are_no_rewards_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be a callable"):
        load_reward("length")  # type: ignore[arg-type]


def test_a_pair_of_a_reward_and_its_weight_is_loaded() -> None:
    first, second, third = resolve_rewards([(own_reward, 0.5), ("exact_match", 2), own_reward])
    assert (first.name, first.function, first.weight) == ("own_reward", own_reward, 0.5)
    assert (second.name, second.weight, third.weight) == ("exact_match", 2.0, 1.0)


@pytest.mark.parametrize(
    ("rewards", "named"),
    [
        ((own_reward, 0.5), r"holds the number 0.5, which is no reward; .* reward_funcs=\[\(my_reward, 0.5\)\]"),
        ([(own_reward, "0.5")], "the weight of a reward must be a finite number, and is '0.5'"),
        ([(own_reward, math.nan)], "must be a finite number, and is nan"),
        ([(own_reward, True)], "must be a finite number, and is True"),
        ([(RewardSettings(name="length", weight=2.0), 0.5)], "'length' has two weights, 2 in .* and 0.5 beside"),
        ([("exact_mach", 0.5)], "did you mean 'exact_match'"),
    ],
)
def test_a_weight_that_is_no_finite_number_or_given_twice_is_refused(rewards: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        resolve_rewards(rewards)


def test_the_folder_of_a_reward_model_is_loaded_as_a_reward(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "model_type": "llama"})
    )
    [loaded] = resolve_rewards(str(tmp_path))
    assert isinstance(loaded.function, ModelReward) and loaded.function.path == str(tmp_path)
    options = {"tokens_per_microbatch": 7}
    named = load_reward(RewardSettings(name=str(tmp_path), weight=0.5, options=options))
    assert isinstance(named.function, ModelReward) and (named.weight, named.function.budget) == (0.5, 7)


def test_a_name_that_is_no_local_reward_model_is_refused_with_the_fix(tmp_path: Path) -> None:
    for name in (str(tmp_path), "some/Reward-Model"):
        with pytest.raises(ConfigError, match="must be a local folder of a reward model, and is none; train one"):
            resolve_rewards(name)
    model = new_model({"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}, vocab_size=8)
    with pytest.raises(ConfigError, match=r"live PolicyForCausalLM, which has no tokenizer; save both .*reward_model"):
        resolve_rewards([model])
