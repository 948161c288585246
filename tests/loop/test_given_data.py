"""Datasets as users pass them to trainers: rows in memory with settings, and arguments that are no dataset."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from alignlab import (
    DataSettings,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    LoraSettings,
    RenderSettings,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from alignlab.data.examples import Example
from alignlab.data.prompts import prompts_from_rows
from alignlab.errors import ConfigError, DataError
from alignlab.loop.given_data import given_data, given_held_out, given_prompts
from tests.trainers.conftest import even_ids

Make = Callable[..., Any]
ROWS = [
    {"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0, "chosen": "a", "rejected": "b"} for i in range(4)
]
TRAINERS: dict[str, tuple[Any, Any]] = {
    "grpo": (GRPOTrainer, GRPOConfig), "sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig), "reward": (RewardTrainer, RewardConfig),
}  # fmt: skip


@pytest.fixture
def make_trainer(make_model: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def make(kind: str, dataset: Any, **arguments: Any) -> Any:
        trainer, config = TRAINERS[kind]
        settings = config(output_dir=tmp_path / "run", num_steps=1, trackers=())
        rewards = (even_ids,) if kind == "grpo" else ()
        if kind == "grpo" and arguments.get("eval_dataset") is None:
            arguments.pop("eval_dataset", None)
        return trainer(make_model(), *rewards, settings, dataset, **{"tokenizer": tokenizer} | arguments)

    return make


def tokens_of(trainer: Any, *, held_out: bool = False) -> list[Any]:
    if isinstance(trainer, GRPOTrainer):
        return [prompt.token_ids for prompt in (trainer.held_out.prompts if held_out else trainer.source.prompts)]
    return [item.sequences for item in (trainer.eval_examples if held_out else trainer.train_examples)]


@pytest.mark.parametrize("kind", TRAINERS)
def test_rows_in_memory_and_rows_of_a_file_give_the_same_tokens_under_the_same_settings(
    kind: str, make_trainer: Make, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"prompt_template": "Q: {prompt}!", "size": 3, "on_bad_row": "skip", "prompt_column": "p"}
    rows = [{"p": None}, *({**row, "p": row["prompt"]} for row in ROWS)]
    pd.DataFrame(rows).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    live = make_trainer(kind, rows, render_settings=RenderSettings(**how))
    file = make_trainer(kind, DataSettings(path=str(tmp_path / "rows.jsonl"), **how))
    assert tokens_of(live) == tokens_of(file)
    assert live.tokenizer.decode(tokens_of(live)[0] if kind == "grpo" else tokens_of(live)[0][0]).startswith("Q: q0!")
    assert len(tokens_of(live)) == 2


def test_held_out_rows_take_the_settings_of_training_rows_unless_they_have_their_own(make_trainer: Make) -> None:
    how = RenderSettings(prompt_template="Q: {prompt}!", size=2)
    alike = make_trainer("grpo", ROWS, eval_dataset=ROWS, render_settings=how)
    assert tokens_of(alike, held_out=True)[:2] == tokens_of(alike)
    assert (len(alike.source.prompts), len(alike.held_out.prompts)) == (2, 4)
    other = make_trainer("grpo", ROWS, eval_dataset=ROWS, render_settings=how, eval_render_settings=RenderSettings())
    assert tokens_of(other, held_out=True) == tokens_of(make_trainer("grpo", ROWS))


def test_messages_name_settings_as_the_caller_passes_them(make_trainer: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    pd.DataFrame([{"prompt": "q" * 2000, "completion": "a"}]).to_json(path, orient="records", lines=True)
    settings = DataSettings(path=str(path))
    for dataset, setting in (
        (str(path), f"DataSettings(path='{path}', max_prompt"), (settings, "data.max_prompt_tokens"),
    ):
        with pytest.raises(DataError, match=re.escape(setting)):
            make_trainer("sft", dataset)
    for how in ({}, {"eval_render_settings": RenderSettings(max_prompt_tokens=5)}):
        with pytest.raises(DataError, match=r"eval_dataset: .*set eval_render_settings=RenderSettings\(on_bad_row"):
            make_trainer("sft", ROWS, eval_dataset=[{"prompt": "q" * 2000, "completion": "a"}], **how)


def test_string_prompt_is_not_rendered_as_chat_under_chat_false(make_trainer: Make, tokenizer: Any) -> None:
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = make_trainer("grpo", ROWS, tokenizer=with_template)
    plain = make_trainer("grpo", ROWS, tokenizer=with_template, render_settings=RenderSettings(chat=False))
    assert with_template.decode(tokens_of(chat)[0]) == "[user]q0[assistant]"
    assert with_template.decode(tokens_of(plain)[0]) == "q0"


def test_rows_in_memory_that_are_too_long_are_skipped_on_request(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS, {"prompt": "q", "completion": "a " * 5000}]
    with pytest.raises(DataError, match=r"example 4 .* set render_settings=RenderSettings\(on_bad_row='skip'\)"):
        make_trainer("sft", rows)
    with caplog.at_level(logging.WARNING):
        assert len(tokens_of(make_trainer("sft", rows, render_settings=RenderSettings(on_bad_row="skip")))) == 4
    assert "skipped 1 of 5 examples" in caplog.text


def test_prepared_examples_that_are_too_long_are_skipped_on_request(make_trainer: Make) -> None:
    examples = [Example((1, 2), (False, True)), Example((1,) * 5000, (False, *[True] * 4999))]
    skipping = RenderSettings(on_bad_row="skip")
    assert len(tokens_of(make_trainer("sft", examples, render_settings=skipping))) == 1


def generated_rows() -> Any:
    yield from ROWS


@pytest.mark.parametrize(
    "dataset",
    [ROWS, tuple(ROWS), generated_rows(), Dataset.from_list(ROWS), Dataset.from_list(ROWS).to_iterable_dataset()],
)
def test_rows_in_any_container_are_accepted(dataset: Any, make_trainer: Make) -> None:
    trainer = make_trainer("sft", dataset, render_settings=RenderSettings(size=4))
    assert tokens_of(trainer) == tokens_of(make_trainer("sft", ROWS))


def endless() -> Any:
    while True:
        yield ROWS[0]


NO_DATASETS: list[tuple[Any, str]] = [
    (None, "train_dataset is None, and must be a dataset; give rows, a path or DataSettings"),
    ([], "train_dataset must hold at least one row, and is empty"),
    (iter(()), "train_dataset must hold at least one row, and is empty"),
    ({}, "must be one dataset, and is a mapping of nothing"),
    ({"prompt": "q", "completion": "a"}, r"is a mapping of 'prompt', 'completion'; give a list of such rows"),
    ({"prompt": ["q"], "completion": ["a"]}, r"a mapping of columns \('prompt', 'completion'\); give rows"),
    ({"a": ROWS, "b": ROWS}, r"a mapping of several \('a', 'b'\); give one of them, such as train_dataset\['a'\]"),
    (DatasetDict(train=Dataset.from_list(ROWS)), r"a mapping of several \('train'\); give one of them"),
    (pd.DataFrame(ROWS), r"is a table of pandas; give train_dataset\.to_dict\('records'\)"),
    (IterableDataset.from_generator(endless), r"a stream of unknown length .* render_settings=RenderSettings\(size="),
    (7, "must be rows, a path or DataSettings, and is int"),
    (b"rows.jsonl", "must be rows, a path or DataSettings, and is bytes"),
    (["q"], "row 0 .* is str, and must be a dict"),
    ([None], "row 0 .* is NoneType, and must be a dict"),
]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize(("dataset", "message"), NO_DATASETS, ids=[message[-30:] for _, message in NO_DATASETS])
def test_argument_that_is_no_dataset_is_refused_with_its_kind(
    dataset: Any, message: str, kind: str, make_trainer: Make
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        make_trainer(kind, dataset)
    if dataset is not None and not isinstance(dataset, type(iter(()))):
        held_out = message.replace("train_dataset", "eval_dataset").replace("render_set", "eval_render_set")
        with pytest.raises((ConfigError, DataError), match=held_out):
            make_trainer(kind, ROWS, eval_dataset=dataset)


def test_path_object_is_accepted(make_trainer: Make, tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    assert tokens_of(make_trainer("sft", tmp_path / "rows.jsonl")) == tokens_of(make_trainer("sft", ROWS))


def test_settings_without_effect_are_refused(tokenizer: Any, make_trainer: Make) -> None:
    how = RenderSettings(chat=False)
    with pytest.raises(ConfigError, match=r"render_settings is given, .* where train_dataset is"):
        given_data(DataSettings(path="rows.jsonl"), how)
    with pytest.raises(ConfigError, match=r"put its fields into train_dataset=DataSettings"):
        given_data("rows.jsonl", how)
    with pytest.raises(ConfigError, match="eval_render_settings is given, and there is no eval_dataset"):
        given_held_out(None, how, given_data(ROWS))
    with pytest.raises(ConfigError, match=r"eval_render_settings is given, .* where eval_dataset"):
        given_held_out("rows.jsonl", how, given_data(ROWS))
    with pytest.raises(ConfigError, match=r"render_settings must be RenderSettings, and is DataSettings"):
        given_data(ROWS, DataSettings(path="rows.jsonl"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="render_settings must be RenderSettings, and is dict"):
        given_data(ROWS, {"chat": False})  # type: ignore[arg-type]
    prompts = prompts_from_rows(ROWS, RenderSettings(), tokenizer)
    with pytest.raises(ConfigError, match="render_settings has chat, and train_dataset holds items of Prompt"):
        make_trainer("grpo", prompts, render_settings=how)


ADAPTERS = [
    peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), peft.IA3Config(target_modules="all-linear"),
    peft.AdaLoraConfig(total_step=3), {"r": 8},
]  # fmt: skip


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
def test_adapter_other_than_lora_is_refused(adapter: Any, make_trainer: Make) -> None:
    with pytest.raises(ConfigError, match=f"peft_config must be .* LoraConfig, and is {type(adapter).__name__}"):
        make_trainer("sft", ROWS, peft_config=adapter)


def test_model_object_with_another_adapter_is_refused(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(make_model(), ADAPTERS[0])
    config = SFTConfig(output_dir=tmp_path / "run", num_steps=1, trackers=())
    with pytest.raises(ConfigError, match="is PromptTuningConfig; alignlab trains LoRA or all weights"):
        SFTTrainer(model, config, ROWS, tokenizer=tokenizer)


@pytest.mark.parametrize("adapter", [LoraSettings(rank=2), peft.LoraConfig(r=2, target_modules="all-linear")])
def test_lora_by_either_settings_class_is_accepted(adapter: Any, make_trainer: Make) -> None:
    assert make_trainer("sft", ROWS, peft_config=adapter).learner.has_adapters


def test_nan_answer_in_memory_reaches_rewards_as_none(make_trainer: Make) -> None:
    rows = [{"prompt": "a", "answer": 72.0}, {"prompt": "b", "answer": math.nan}]
    assert [prompt.columns["answer"] for prompt in make_trainer("grpo", rows).source.prompts] == [72, None]


def test_choice_of_taught_turns_is_refused_for_prompts() -> None:
    with pytest.raises(ConfigError, match="taught_turns is last, and is for supervised data alone"):
        given_prompts([{"prompt": "q"}], RenderSettings(taught_turns="last"))
