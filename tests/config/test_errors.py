"""Every broken rule is a ConfigError with the rule, the value and the fix; in YAML and in Python alike."""

from collections.abc import Iterator

import pytest
import yaml

from alignlab.config.base import Frozen
from alignlab.config.error_messages import models_in
from alignlab.config.loader import load_config
from alignlab.config.model import LoraSettings
from alignlab.config.moved_settings import MOVED
from alignlab.config.run import RunConfig
from alignlab.config.trainers import (
    DistillConfig,
    GKDConfig,
    GRPOConfig,
    OnPolicyDistillConfig,
    OptimSettings,
    SFTConfig,
)
from alignlab.errors import ConfigError

RUN = {"model": {"name": "m"}, "data": {"task": "chain_sum"}, "rewards": [{"name": "r"}], "trainer": {"type": "grpo"}}


def message(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "pydantic" not in text and "input_value" not in text
    return text


def run_message(**sections) -> str:
    return message(RunConfig.model_validate, RUN | sections)


def trainer_message(**fields) -> str:
    return run_message(trainer={"type": "grpo", **fields})


def test_the_base_of_these_tests_is_a_valid_run():
    assert RunConfig.model_validate(RUN).trainer.type == "grpo"


def test_bound_names_rule_value_and_fix():
    assert message(GRPOConfig, group_size=1) == "group_size is 1, and must be at least 2; use 2 or more"


def test_nested_setting_is_named_as_the_user_wrote_it():
    assert trainer_message(sampling={"top_p": 2}) == (
        "trainer.sampling.top_p is 2, and must be at most 1.0; use 1.0 or less"
    )
    assert run_message(rewards=[{"name": "r", "weight": "heavy"}]).startswith("rewards.0.weight is 'heavy', and must")


def test_unknown_key_names_the_nearest_known_one():
    assert trainer_message(learnin_rate=1) == (
        "trainer.learnin_rate is not a setting; did you mean trainer.optim.learning_rate?"
    )
    assert run_message(rewards=[{"name": "r", "wieght": 1}]).endswith("did you mean rewards.0.weight?")


def test_unknown_key_that_resembles_nothing_lists_what_there_is():
    assert run_message(zzz=1).endswith("RunConfig has: " + ", ".join(RunConfig.model_fields))


def paths_of(owner: type[Frozen]) -> Iterator[str]:
    for name, field in owner.model_fields.items():
        yield name
        yield from (f"{name}.{path}" for inner in models_in(field.annotation) for path in paths_of(inner))


@pytest.mark.parametrize(("old", "new"), [pair for table in MOVED.values() for pair in table.items()])
def test_old_key_is_answered_with_the_new_one(old, new, tmp_path):
    assert new in set(paths_of(GRPOConfig)), "the new key is no setting"
    assert message(GRPOConfig, **{old: 1}) == f"{old} is now {new}"
    assert message(SFTConfig().model_copy, update={old: 1}) == f"{old} is now {new}"
    assert trainer_message(**{old: 1}) == f"trainer.{old} is now trainer.{new}"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(RUN))
    assert message(load_config, file, [f"trainer.{old}=1"]) == f"{file}: trainer.{old} is now trainer.{new}"


def test_sections_are_given_as_dicts_or_as_objects():
    assert GRPOConfig(optim={"learning_rate": 2e-3}) == GRPOConfig(optim=OptimSettings(learning_rate=2e-3))


def test_optim_is_no_name_of_an_optimizer():
    assert trainer_message(optim="adamw_torch").startswith("trainer.optim is 'adamw_torch', and must be a mapping")


def test_key_in_the_wrong_section_says_where_it_belongs():
    assert run_message(learning_rate=1) == "learning_rate is not a setting; write it as trainer.optim.learning_rate"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("num_generations", "group_size"),
        ("max_completion_length", "sampling.max_new_tokens"),
        ("beta", "kl.coef"),
        ("epsilon_high", "clip_high"),
        ("num_iterations", "num_epochs"),
        ("max_steps", "num_steps"),
        ("steps_per_generation", "num_minibatches"),
        ("vllm_importance_sampling_clip_max", "mismatch.high"),
    ],
)
def test_trl_name_is_answered_with_ours_in_python_and_in_yaml(theirs, ours):
    assert message(GRPOConfig, **{theirs: 8}).endswith(f"TRL or PEFT calls {theirs} is here {ours}")
    assert trainer_message(**{theirs: 8}).endswith(f"is here trainer.{ours}")
    assert run_message(**{theirs: 8}).endswith(f"is here trainer.{ours}")


def test_trl_s_masks_are_answered_with_the_corrections_that_weigh():
    text = message(GRPOConfig, vllm_importance_sampling_mode="sequence_mask")
    assert "token_mask is icepop" in text and "sequence_mask is sequence_mis" in text
    told = message(GRPOConfig, mismatch={"correction": "sequence_truncate"})
    assert told.startswith("mismatch.correction is 'sequence_truncate', and must be sequence_tis")


def test_verl_s_names_are_called_verl_s():
    text = message(GRPOConfig, mismatch={"rollout_rs": "seq_sum_k1"})
    assert "what verl calls rollout_rs is here" in text and "sequence_mask" in text


def test_the_same_trl_name_means_another_setting_in_another_trainer():
    assert "num_prompts" in message(GRPOConfig, per_device_train_batch_size=4)
    assert "num_sequences" in message(SFTConfig, per_device_train_batch_size=4)


def test_every_name_offered_in_place_of_trl_s_exists():
    from alignlab.config.error_messages import _walk
    from alignlab.config.trl_names import PEER_NAMES

    for owner in (GRPOConfig, OnPolicyDistillConfig, GKDConfig, DistillConfig, SFTConfig, LoraSettings):
        for ours in PEER_NAMES[owner.__name__].values():
            if " " not in ours:
                assert _walk(ours.split("."), owner)[0] == ours.split("."), ours


def test_peft_name_is_answered_with_ours():
    assert run_message(model={"name": "m", "lora": {"r": 8}}).endswith("r is here model.lora.rank")


def test_unknown_type_of_trainer_lists_the_types():
    known = "grpo or ppo or sft or dpo or online_dpo or kto or reward or distill or gkd or on_policy_distill or rlaif"
    assert run_message(trainer={"type": "gpo"}) == f"trainer.type is 'gpo', and must be {known}"
    assert run_message(trainer={}) == f"trainer.type is missing, and must be {known}"


def test_misspelled_choice_names_the_nearest():
    assert message(GRPOConfig, recipe="gpso").endswith("did you mean gspo?")


def test_all_broken_rules_are_told_at_once():
    text = message(GRPOConfig, group_size=1, clip_low=0)
    assert text.startswith("2 settings break a rule:") and "group_size" in text and "clip_low" in text


def test_alternatives_of_a_union_are_one_message():
    text = run_message(model={"name": "m", "tokenizer": 3})
    assert text == "model.tokenizer is 3, and must be a string, or must be a mapping of TokenizerTraining's fields"
    assert run_message(model={"architecture": {}, "tokenizer": {"vocab_siz": 300}}) == (
        "model.tokenizer.vocab_siz is not a setting; did you mean model.tokenizer.vocab_size?"
    )


def test_missing_section_is_named_with_its_purpose():
    assert "model is missing, and must be given: The policy" in message(RunConfig)


def test_settings_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        GRPOConfig().group_size = 4
