"""Changes on resumption, free, recorded or refused: of settings, data, rewards and adapters."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.config.base import OnResume
from alignlab.config.loader import load_config
from alignlab.config.model import LoraSettings
from alignlab.config.rollout import SamplingSettings, VLLMServerSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import CheckpointSettings, GRPOConfig, KLSettings, MemorySettings, OptimSettings
from alignlab.errors import CheckpointError
from alignlab.loop.given_data import given_data
from alignlab.loop.run_identity import RunIdentity
from alignlab.models.fingerprints import model_fingerprint
from alignlab.run_from_config import run
from alignlab.scoring.loading import load_reward, load_weighted
from alignlab.scoring.source_digest import source_digest
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.types import Prompt
from tests.trainers.conftest import DENSE, even_ids

CONFIG = GRPOConfig(sampling=SamplingSettings(max_new_tokens=6))
PROMPTS = [Prompt((1, 2), "ab", index=i, columns={"answer": str(i), "tags": ["x", {"y": 1.5}]}) for i in range(3)]


def even(*, completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


def odd(*, completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def identity(
    config: GRPOConfig = CONFIG, *, rewards: Any = ((even, 1.0),), prompts: Any = PROMPTS, held_out: Any = PROMPTS[:1],
    source: str | None = None,
) -> RunIdentity:
    run_identity = RunIdentity(config)
    run_identity.add_prompts("tokens", prompts)
    run_identity.add_held_out(held_out, EvaluationSettings(), given_data(source or PROMPTS), None)
    run_identity.add_rewards([load_weighted(*reward) for reward in rewards])
    return run_identity


def check(now: RunIdentity, before: RunIdentity | None = None) -> None:
    saved = json.loads(json.dumps((before or identity()).to_json()))
    now.check(saved, path=Path("run/step-00000003"), step=3)


REFUSED = {
    r"config\.kl\.coef was 0\.0 and is 0\.1": {"config": CONFIG.model_copy(update={"kl": KLSettings(coef=0.1)})},
    r"config\.clip_low was 0\.2 and is 0\.3": {"config": CONFIG.model_copy(update={"clip_low": 0.3})},
    r"config\.recipe was 'grpo' and is 'dr_grpo'": {"config": CONFIG.model_copy(update={"recipe": "dr_grpo"})},
    r"config\.group_size was 8 and is 4": {"config": CONFIG.model_copy(update={"group_size": 4})},
    r"config\.sampling\.temperature was 1\.0 and is 0\.5": {
        "config": CONFIG.model_copy(update={"sampling": SamplingSettings(max_new_tokens=6, temperature=0.5)})
    },
    r"rewards\.0\.weight was 1\.0 and is 2\.0": {"rewards": [(even, 2.0)]},
    r"rewards\.0\.name was 'even' and is 'odd'": {"rewards": [(odd, 1.0)]},
    r"rewards was 1 and is 2": {"rewards": [(even, 1.0), (odd, 1.0)]},
    "the given rows: the training data has changed.*such as answers": {
        "prompts": [*PROMPTS[:2], Prompt((1, 2), "ab", index=2, columns={**PROMPTS[2].columns, "answer": "7"})]
    },
    "the held-out data, on which the run was measured at its start, has changed": {"held_out": PROMPTS[:2]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_change_that_makes_another_run_is_refused(message: str) -> None:
    check(identity())
    with pytest.raises(CheckpointError, match=f"(?s)is of a run with other settings.*- {message}") as error:
        check(identity(**REFUSED[message]))
    assert "Resume with the settings and data that the run was started with, or begin a new run" in str(error.value)


def test_error_lists_all_refused_changes_and_no_recorded_one() -> None:
    sections = {"optim": OptimSettings(learning_rate=0.5), "checkpoints": CheckpointSettings(every_steps=1)}
    now = CONFIG.model_copy(update={"clip_low": 0.3, "group_size": 4, **sections})
    with pytest.raises(CheckpointError) as error:
        check(identity(now, rewards=[(even, 2.0)]))
    listed = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert [line.split()[1] for line in listed] == ["config.group_size", "config.clip_low", "rewards.0.weight"]


def test_recorded_change_is_logged_once_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    changes = {"optim": OptimSettings(learning_rate=1e-3, schedule="linear"), "num_steps": 7, "num_prompts": 4}
    now = identity(CONFIG.model_copy(update=changes))
    check(now)
    assert len(caplog.records) == 1 and caplog.records[0].levelname == "WARNING"
    text = caplog.records[0].getMessage()
    assert text.startswith("from step 4 on the run has other settings: config.num_steps was 100 and is 7; config.opti")
    assert text.count(" was ") == 1 + len(changes)
    free_to_change = {"trackers": (), "memory": MemorySettings(tokens_per_microbatch=9)}
    later = identity(CONFIG.model_copy(update=changes | free_to_change))
    check(later, before=now)
    assert len(caplog.records) == 1, "a free change is not logged, and a recorded one not again"
    assert later.summary == {"changed_on_resume": [{"step": 3, "changes": now.changes[0]["changes"]}]}


def test_settings_under_older_names_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    saved = identity().to_json()
    saved["settings"]["trainer.learning_rate"] = saved["settings"].pop("trainer.optim.learning_rate") * 10
    identity().check(saved, path=Path("checkpoint"), step=3)
    assert "config.optim.learning_rate was 0.0001 and is 1e-05" in caplog.text


def test_other_engine_is_recorded_and_settings_of_engines_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    check(identity(CONFIG.model_copy(update={"rollout": VLLMServerSettings()})))
    assert "config.rollout.engine was 'embedded' and is 'vllm_server'" in caplog.text
    assert "servers" not in caplog.text and "memory_frac" not in caplog.text


def test_changed_source_of_a_reward_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = identity()
    again = identity()
    change = "the source of the reward even has changed"
    again.add_content("reward_source.0", "other", rule=OnResume.RECORDED, change=change)
    check(again, before)
    assert change in caplog.text


def scaled(scale: float) -> Any:
    def inner(**columns: Any) -> list[float]:
        return [scale]

    return inner


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale, self.seen = scale, [scale]

    def __call__(self, **columns: Any) -> list[float]:
        return [self.scale]


@pytest.mark.parametrize("make", [lambda scale: functools.partial(even, scale=scale), scaled, Scaled])
def test_value_bound_to_a_reward_is_part_of_its_source_digest(make: Any) -> None:
    assert source_digest(make(0.5)) == source_digest(make(0.5)) != source_digest(make(0.25))
    assert source_digest(print) is None and source_digest(even) is not None


def test_checkpoint_of_an_earlier_version_is_not_compared_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    identity().check(None, path=Path("run/step-00000003"), step=3)
    assert "kept no settings: they are not compared" in caplog.text


def test_loaded_reward_holds_the_settings_that_it_was_loaded_by() -> None:
    from alignlab.config.rewards import RewardSettings

    settings = RewardSettings(name="alignlab_rewards.length.length", weight=0.5, options={"max_tokens": 3})
    assert load_reward(settings).settings == settings
    assert load_weighted("length", 2).settings == RewardSettings(name="length", weight=2.0)


def test_message_of_changed_data_names_the_source(tmp_path: Path) -> None:
    now = identity(prompts=PROMPTS[1:], source=str(tmp_path / "rows.jsonl"))
    with pytest.raises(CheckpointError, match=r"rows\.jsonl: the training data has changed"):
        check(now)


def test_trainer_refuses_a_change_before_anything_is_generated(
    make_model: Any, make_config: Any, tokenizer: Any, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def make(lora: Any = None, **changes: Any) -> GRPOTrainer:
        lora = lora or LoraSettings(rank=2)
        return GRPOTrainer(
            make_model(), even_ids, make_config(**{"num_steps": 1} | changes), rows, tokenizer=tokenizer,
            peft_config=lora,
        )

    make().train()
    before = {path: path.read_bytes() for path in (make_config().output_dir / "rollouts").iterdir()}
    other = make(lora=LoraSettings(rank=2, alpha=7), num_steps=2)
    with pytest.raises(CheckpointError, match=r"peft_config\.lora_alpha was 32\.0 and is 7\.0"):
        other.train(resume=True)
    with pytest.raises(CheckpointError, match=r"config\.group_size was 4 and is 2"):
        make(group_size=2, num_steps=2).train(resume=True)
    assert {path: path.read_bytes() for path in (make_config().output_dir / "rollouts").iterdir()} == before
    caplog.clear()
    make(num_steps=2, optim={"learning_rate": 2e-2}).train(resume=True)
    message = "from step 2 on the run has other settings: config.num_steps was 1 and is 2; config.optim.learning"
    assert message in caplog.text
    report = json.loads((make_config().output_dir / "report.json").read_text())
    assert report["changed_on_resume"][0]["step"] == 1


RUN = """
model:
  architecture: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
  tokenizer: {vocab_size: 300, num_texts: 20}
data: {task: chain_sum, task_options: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}, size: 20}
rewards: [{name: reasoning_gym_answer}]
trainer: {type: grpo, num_steps: 1, num_prompts: 2, group_size: 2, trackers: [], sampling: {max_new_tokens: 3}}
evaluation: {num_problems: 2, num_samples: 1}
"""


def test_run_from_a_file_names_settings_as_the_file_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    folder = f"trainer.output_dir={tmp_path / 'run'}"
    run(load_config(file, [folder]))
    changes = [
        folder, "trainer.num_steps=2", "trainer.clip_low=0.1", "rewards.0.weight=2", "rewards.0.name=length",
        "evaluation.num_problems=3", "data.seed=1", "model.architecture.intermediate_size=48",
    ]
    with pytest.raises(CheckpointError) as error:
        run(load_config(file, changes), resume=True)
    lines = [line.split()[1] for line in str(error.value).splitlines() if line.startswith("  - ")]
    changed = {"trainer.clip_low", "rewards.0.weight", "rewards.0.name", "evaluation.num_problems", "data.seed"}
    assert changed <= {*lines}
    assert "model.architecture" in lines and "trainer.num_steps" not in lines
    summary = run(load_config(file, [folder, "trainer.num_steps=2", "trainer.optim.learning_rate=1e-4"]), resume=True)
    assert summary.result.num_steps == 2
    assert "trainer.num_steps was 1 and is 2; trainer.optim.learning_rate was 1e-05 and is 0.0001" in caplog.text


def test_other_starting_weights_are_recorded_where_the_checkpoint_holds_all_weights(
    make_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    check(RunIdentity(CONFIG, make_model()), RunIdentity(CONFIG, make_model()))
    assert not caplog.records
    check(RunIdentity(CONFIG, make_model(seed=1)), RunIdentity(CONFIG, make_model()))
    assert "the starting weights are others, and are not used: training goes on from the" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 77.0}, r"model_config\.rope_parameters was .*10000.* and is .*77"),
        ({"rms_norm_eps": 0.1}, r"model_config\.rms_norm_eps was 1e-06 and is 0\.1"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, r"model_config\.head_dim was 8 and is"),
    ],
)
def test_same_weights_under_another_architecture_are_refused(
    change: dict[str, Any], message: str, make_model: Any
) -> None:
    def with_model(architecture: dict[str, Any]) -> RunIdentity:
        return RunIdentity(CONFIG, make_model(architecture))

    check(with_model(DENSE), with_model(DENSE))
    with pytest.raises(CheckpointError, match=message):
        check(with_model(DENSE | change), with_model(DENSE))
    assert model_fingerprint(make_model(DENSE | change)) != model_fingerprint(make_model(DENSE))
