"""Each setting says what a resumed run may do with it, and the manual says the same."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
from pydantic import Field

from alignlab import config
from alignlab.config import resume as module
from alignlab.config.base import Frozen, MayChange, OnResume, Recorded, Refused
from alignlab.config.judge import EndpointJudge
from alignlab.config.loader import load_config
from alignlab.config.resume import flat_settings, refused_settings, resume_table, rule_of, sections
from alignlab.config.run import RunConfig
from alignlab.config.trainers import GRPOConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_section_declares_its_fields(section: type[Frozen]) -> None:
    assert isinstance(section.on_resume, OnResume)
    for field in section.model_fields:
        assert isinstance(rule_of(section, field), OnResume)


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_a_field_that_is_declared_again_keeps_its_rule(section: type[Frozen]) -> None:
    for base in section.__mro__[1:]:
        if issubclass(base, Frozen) and base in sections():
            for field in base.model_fields:
                assert rule_of(section, field) is rule_of(base, field), f"{section.__name__}.{field}"


def test_all_classes_of_the_config_are_sections_of_a_run() -> None:
    """Or a section by another name, as for messages."""
    names = [name for _, name, _ in pkgutil.walk_packages(config.__path__, "alignlab.config.")]
    modules = [importlib.import_module(name) for name in names]
    owners = {
        owner
        for module in modules
        for owner in vars(module).values()
        if isinstance(owner, type) and issubclass(owner, Frozen) and owner.__module__ == module.__name__
    }
    left = {owner.__name__ for owner in owners if not any(base in sections() for base in owner.__mro__)}
    assert len(owners) > 30 and left == {"Frozen", "Principle", "Constitution"}


def test_the_manual_has_the_table() -> None:
    manual = (ROOT / "alignlab" / "config" / "README.md").read_text(encoding="utf-8")
    assert resume_table() in manual, "write alignlab.config.resume.resume_table() into alignlab/config/README.md"


def test_a_table_says_where_each_field_of_a_class_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inner(Frozen):
        on_resume = OnResume.MAY_CHANGE
        a: int = 1
        b: Refused[int] = Field(2, ge=1)

    class Outer(Frozen):
        on_resume = OnResume.REFUSED
        inner: Inner = Inner()
        others: tuple[Inner, ...] = ()
        perhaps: Inner | None = None
        c: Recorded[int | None] = None

    Outer.model_rebuild(_types_namespace={"Inner": Inner, "Recorded": Recorded})
    monkeypatch.setattr(module, "RunConfig", Outer)
    rows = resume_table().splitlines()[2:]
    assert rows == ["| the file itself (Outer) |  | `c` | `perhaps` |", "| `inner` (Inner) | `a` |  | `b` |"]
    told = Outer(others=(Inner(a=5),), perhaps=Inner())
    assert {name: setting.value for name, setting in flat_settings(told, "x").items()} == {
        "x.inner": "given", "x.inner.a": 1, "x.inner.b": 2, "x.others": 1, "x.others.0.a": 5, "x.others.0.b": 2,
        "x.perhaps": "given", "x.perhaps.a": 1, "x.perhaps.b": 2, "x.c": None,
    }
    absent = flat_settings(Outer())
    assert absent["others"].value == 0 and absent["perhaps"].value is None


def test_settings_of_a_file_are_named_as_in_the_file() -> None:
    settings = flat_settings(load_config(ROOT / "configs" / "grpo_smollm2_cpu.yaml"))
    assert isinstance(load_config(ROOT / "configs" / "grpo_smollm2_cpu.yaml"), RunConfig)
    assert settings["trainer.optim.learning_rate"].rule is OnResume.RECORDED
    assert settings["trainer.kl.coef"].rule is settings["rewards.0.weight"].rule is OnResume.REFUSED
    assert settings["trainer.rollout.max_running"].rule is OnResume.MAY_CHANGE
    assert settings["model.name"].value == "smollm2-135m-instruct"


def test_how_a_judge_is_reached_may_change() -> None:
    judge = EndpointJudge(model="a", url="http://127.0.0.1:9/v1", max_questions=5)
    assert refused_settings(judge) == refused_settings(EndpointJudge(model="a"))
    assert refused_settings(judge) != refused_settings(EndpointJudge(model="b"))


def test_options_that_are_no_json_are_told_by_their_type() -> None:
    from alignlab.config.rewards import RewardSettings

    settings = flat_settings(RewardSettings(name="x", options={"f": len}))
    assert settings["options"].value == {"f": "builtin_function_or_method"}


def test_a_mark_changes_nothing_else_of_a_field() -> None:
    assert MayChange[int] != Recorded[int]
    assert GRPOConfig.model_fields["num_steps"].annotation is int
    assert "Batches" in str(GRPOConfig.model_fields["num_steps"].description)
