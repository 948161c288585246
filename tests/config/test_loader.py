"""YAML and overrides in, an equal config out."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from alignlab.config.loader import apply_override, dump_resolved, load_config, parse_yaml
from alignlab.errors import ConfigError

RUN = """\
model: {name: m}
data: {task: chain_sum}
rewards:
  - name: r
trainer:
  type: grpo
  optim: {learning_rate: 1e-6}
"""
SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", ["1e-6", "1E6", "-2e-4", ".5e1", "1.e+2", "2.5e-3", "1_0e2"])
def test_scientific_notation_is_a_number(text):
    assert parse_yaml(text, "test") == float(text.replace("_", ""))


@pytest.mark.parametrize("text", ["e6", "1e", "1e-", "v1e6", "1.2.3e4", "'1e-6'"])
def test_other_words_stay_words(text):
    assert isinstance(parse_yaml(text, "test"), str)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_yaml(value):
    assert parse_yaml(repr(value), "test") == value
    assert parse_yaml(yaml.safe_dump(value), "test") == value


def test_overrides_reach_nested_settings_lists_and_sections_that_the_file_leaves_out(run_file):
    overrides = ["trainer.num_steps=7", "trainer.kl.coef=1e-3", "rewards.0.weight=2", "model.lora={rank: 4}"]
    config = load_config(run_file, overrides)
    assert config.trainer.num_steps == 7 and config.trainer.kl.coef == 1e-3
    assert config.rewards[0].weight == 2 and config.model.lora.rank == 4
    assert config.trainer.optim.learning_rate == 1e-6


def test_the_last_override_wins(run_file):
    assert load_config(run_file, ["trainer.seed=1", "trainer.seed=2"]).trainer.seed == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainer.num_steps", "must be key=value"),
        ("=3", "must be key=value"),
        ("rewards.1.weight=2", "it has rewards.0 to rewards.0"),
        ("rewards.first.weight=2", "rewards has no entry first"),
        ("trainer.optim.learning_rate.x=2", "trainer.optim.learning_rate is 1e-06, and has no entries"),
        ("trainer.num_step=2", "did you mean trainer.num_steps?"),
        ("trainer.num_steps=[", "override trainer.num_steps"),
    ],
)
def test_wrong_override_is_refused_by_name(run_file, override, told):
    with pytest.raises(ConfigError) as caught:
        load_config(run_file, [override])
    assert told in str(caught.value)


def test_override_fills_a_section_that_is_null():
    settings = {"trainer": {"kl": None}}
    apply_override(settings, "trainer.kl.coef=0.5")
    assert settings == {"trainer": {"kl": {"coef": 0.5}}}


def test_missing_file_names_those_beside_it(run_file):
    with pytest.raises(ConfigError, match=r"use one of .*run\.yaml"):
        load_config(run_file.with_name("rum.yaml"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1\nb: 2", "line 2"),
        ("seed: 1\nseed: 2", "line 2: seed is given twice"),
        ("hello", "must be a mapping of settings"),
        ("[1]: 2", "unhashable"),
        ("a: \x00", "correct the YAML"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(run_file, text, told):
    run_file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(run_file)
    assert told in str(caught.value) and "run.yaml" in str(caught.value)


def test_broken_rule_names_the_file(run_file):
    with pytest.raises(ConfigError, match=r"run\.yaml: trainer\.group_size is 1"):
        load_config(run_file, ["trainer.group_size=1"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_is_short_and_its_resolved_form_loads_back(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40 and text.startswith("# ")
    config = load_config(path)
    copy = tmp_path / "resolved.yaml"
    copy.write_text(dump_resolved(config), encoding="utf-8")
    assert load_config(copy) == config


def test_there_are_shipped_configs():
    assert len(SHIPPED) >= 2


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "rloo", "gspo", "cispo"])
def test_recipe_survives_being_written_out(run_file, tmp_path, recipe):
    config = load_config(run_file, [f"trainer.recipe={recipe}"])
    copy = tmp_path / "resolved.yaml"
    copy.write_text(dump_resolved(config), encoding="utf-8")
    assert load_config(copy) == config
