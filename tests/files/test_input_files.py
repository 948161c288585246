"""Files of settings that never end, or that Python's own errors would name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.config.judge import load_constitution
from alignlab.config.loader import load_config
from alignlab.config.run import RunConfig
from alignlab.errors import ConfigError
from alignlab.files import input_files
from alignlab.files.input_files import parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (BOMB, "line 5: its aliases make more than 20000 values and keys of it; correct the YAML"),
        ("a: &a [*a]", "line 1: a value holds itself, by an alias"),
        ("a: &a {b: {c: *a}}", "a value holds itself"),
        ("[" * 5000, "line 1: it is nested deeper than 50 levels"),
        ("{a: " * 5000, "line 1: it is nested deeper than 50 levels"),
        ("".join(f"- {i}\n" for i in range(20_000)), "line 20000: there are more than 20000 values and keys"),
        ("a: !!int x", "line 1: 'x' is no int"),
        ("a: !!int ''", "line 1: '' is no int"),
        ("b: 1\na: 2026-13-45", "line 2: '2026-13-45' is no timestamp"),
        ("a: !!timestamp x", "'x' is no timestamp"),
        ("a: !!bool x", "'x' is no bool"),
        ("a: !!float x", "'x' is no float"),
        ("a: " + "9" * 5000, "'9{40}' is no int"),
        ("a: " + "9" * 4000, "a whole number has more than 40 digits"),
        ("a: 1" + ":00" * 5000, "a whole number has more than 40 digits"),
        ("a: 0x" + "f" * 9000, "a whole number has more than 40 digits"),
        ("? [1, 2]\n: 3", "found unhashable key"),
        ("a: \x00", "unacceptable character"),
    ],
)
def test_yaml_beyond_the_limits_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^it,? ?.*{named}"):
        parse_yaml(text, "it")


def test_an_alias_that_repeats_a_little_is_let_through() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", "it") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name: !!int x", "line 1: 'x' is no int"), ("name: 2026-13-45", "line 1: '2026-13-45' is no timestamp"),
        ("[" * 5000, "line 1: it is nested deeper than 50 levels"), (BOMB, "its aliases make more than 20000"),
        ("name: a\nname: b", "name is given twice"), ("name: a\nprinciples: []", "principles"),
        ("- a", "must hold a name and principles, and holds list"),
    ],
)  # fmt: skip
def test_a_constitution_has_the_limits_of_settings_and_is_named_in_errors(
    text: str, named: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"the constitution {file}.*{named}"):
        load_constitution(file)


@pytest.mark.parametrize(("held", "kind"), [("a\0b", "zero characters"), ("a\ud800", "halves of surrogate pairs")])
@pytest.mark.parametrize(
    "setting",
    [
        "data.path", "data.chat_template_kwargs", "data.tools", "model.name", "model.tokenizer", "trainer.output_dir",
        "rewards.0.name", "rewards.0.options",
    ],
)  # fmt: skip
def test_no_setting_has_characters_that_names_of_files_cannot_have(setting: str, held: str, kind: str) -> None:
    settings: dict[str, Any] = {
        "model": {"name": "x", "tokenizer": "y"}, "data": {"path": "a.jsonl"}, "rewards": [{"name": "exact_match"}],
        "trainer": {"type": "grpo", "num_steps": 1},
    }  # fmt: skip
    value = {"options": {"x": [held]}, "tools": [{"x": held}], "chat_template_kwargs": {held: 1}}
    *outer, last = setting.split(".")
    holder: Any = settings
    for key in outer:
        holder = holder[int(key) if key.isdecimal() else key]
    holder[last] = value.get(last, held)
    with pytest.raises(ConfigError, match=f"{setting}.*({kind}, and must have none; take them out|unicode)"):
        RunConfig.model_validate(settings)


def test_a_token_file_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("#" * (input_files.MAX_SETTINGS_BYTES + 1))
    with pytest.raises(ConfigError, match=r"run\.yaml must have at most 1048576 bytes, and has more"):
        load_config(tmp_path / "run.yaml")


def test_only_the_first_of_many_broken_rules_are_listed(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("".join(f"key_{i}: 1\n" for i in range(2000)))
    with pytest.raises(ConfigError, match="more than 20 settings break a rule") as caught:
        load_config(tmp_path / "run.yaml")
    assert str(caught.value).count("\n") == 20


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("a." * 30_000 + "b=1", "an override must name a setting at most 50 levels down"),
        ("trainer.seed=" + "9" * 5000, "override trainer.seed, line 1: '9+' is no int"),
        ("trainer.seed=&a [*a]", "a value holds itself"),
    ],
)
def test_overrides_have_the_same_limits(override: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("trainer: {type: grpo}")
    with pytest.raises(ConfigError, match=named):
        load_config(tmp_path / "run.yaml", [override])


def test_what_libraries_do_to_yaml_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that vLLM imports reads all dates as texts, for the whole process."""
    constructors = yaml.SafeLoader.yaml_constructors
    monkeypatch.setitem(constructors, "tag:yaml.org,2002:timestamp", constructors["tag:yaml.org,2002:str"])
    with pytest.raises(ConfigError, match="'2026-13-45' is no timestamp"):
        parse_yaml("a: 2026-13-45", "it")
