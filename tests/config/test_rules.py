"""The rules between fields: each is broken once, and holds on its boundary."""

import pytest

from alignlab.config.distill import TeacherSettings
from alignlab.config.judge import ModelJudge, RewardJudge
from alignlab.config.policy_gradient import RECIPES
from alignlab.config.rewards import RewardSettings
from alignlab.config.run import EvaluationSettings, RunConfig
from alignlab.config.trainers import GRPOConfig, OnlineDPOConfig, OnPolicyDistillConfig, RLAIFConfig, SFTConfig
from alignlab.errors import ConfigError
from tests.config.test_errors import RUN, message, run_message


def grpo_message(**fields) -> str:
    return message(GRPOConfig, **fields)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("grpo", ("group_normalized", "ppo_clip", "sequence_mean", 0.2, 0.2)),
        ("dr_grpo", ("group_centered", "ppo_clip", "constant", 0.2, 0.2)),
        ("dapo", ("group_normalized", "ppo_clip", "token_mean", 0.2, 0.28)),
        ("rloo", ("leave_one_out", "reinforce", "constant", 0.2, 0.2)),
        ("reinforce_pp", ("token_whitened", "ppo_clip", "token_mean", 0.2, 0.2)),
        ("reinforce_pp_baseline", ("group_centered_whitened", "ppo_clip", "token_mean", 0.2, 0.2)),
        ("gspo", ("group_normalized", "gspo_clip", "sequence_mean", 3e-4, 4e-4)),
        ("cispo", ("group_normalized", "cispo", "token_mean", 0.2, 4.0)),
    ],
)
def test_recipe_is_the_combination_of_its_paper(recipe, expected):
    config = GRPOConfig(recipe=recipe)
    assert (config.advantage, config.surrogate, config.reduction, config.clip_low, config.clip_high) == expected


def test_every_recipe_is_known_to_the_table():
    assert set(RECIPES) == set(GRPOConfig.model_fields["recipe"].annotation.__args__)


def test_dapo_samples_dynamically_and_penalises_a_fifth_of_the_limit():
    config = GRPOConfig(recipe="dapo", sampling={"max_new_tokens": 100})
    assert config.dynamic_sampling and config.overlong_buffer_tokens == 20
    assert GRPOConfig(recipe="dapo", overlong_buffer_tokens=None).overlong_buffer_tokens is None


def test_what_is_given_wins_over_the_recipe():
    assert GRPOConfig(recipe="dapo", clip_high=0.3, dynamic_sampling=False).clip_high == 0.3
    assert GRPOConfig(recipe="dr_grpo", reduction="token_mean").advantage == "group_centered"


def warned(caplog, **fields) -> list[str]:
    caplog.clear()
    GRPOConfig(**fields)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("reduction", ["token_mean", "constant"])
def test_gspo_averaged_over_tokens_is_warned_of_with_the_fix(reduction, caplog):
    [text] = warned(caplog, recipe="gspo", reduction=reduction)
    assert text.startswith(f"reduction is {reduction} with surrogate gspo_clip")
    assert text.endswith("use reduction: sequence_mean, or surrogate: ppo_clip")


def test_gspo_with_advantages_of_tokens_is_warned_of(caplog):
    kl = {"coef": 0.1, "placement": "reward"}
    [text] = warned(caplog, recipe="gspo", advantage="token_whitened", kl=kl)
    assert "kl.placement: loss" in text
    assert warned(caplog, recipe="gspo", advantage="token_whitened", kl=kl | {"coef": 0.0}) == []
    assert warned(caplog, recipe="gspo", advantage="token_whitened", kl={"coef": 0.1}) == []


def test_dropping_groups_that_teach_is_warned_of(caplog):
    [text] = warned(caplog, recipe="reinforce_pp", dynamic_sampling=True)
    assert "use dynamic_sampling: false" in text
    assert warned(caplog, recipe="reinforce_pp_baseline", dynamic_sampling=True) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_is_warned_of(recipe, caplog):
    assert warned(caplog, recipe=recipe) == []


def test_minibatches_divide_the_prompts():
    assert grpo_message(num_prompts=6, num_minibatches=4) == (
        "num_prompts is 6, and must be a multiple of num_minibatches (4); use 4 or 8"
    )
    assert "use 8" in grpo_message(num_prompts=4, num_minibatches=8)
    assert GRPOConfig(num_prompts=6, num_minibatches=3).num_minibatches == 3


def test_token_clip_on_a_sequence_ratio_is_refused_with_the_reason():
    assert "never acts" in grpo_message(surrogate="gspo_clip")
    assert "clip_high is 0.2" in grpo_message(recipe="gspo", clip_high=0.2)
    assert GRPOConfig(recipe="gspo", clip_low=0.05, clip_high=0.05).clip_low == 0.05


@pytest.mark.parametrize(
    ("surrogate", "field", "value"),
    [
        ("cispo", "dual_clip", 3.0),
        ("cispo", "clip_low", 0.1),
        ("gspo_clip", "dual_clip", 3.0),
        ("reinforce", "clip_high", 0.3),
    ],
)
def test_a_field_that_the_surrogate_ignores_is_refused(surrogate, field, value):
    recipe = {"gspo_clip": "gspo"}.get(surrogate, "grpo")
    text = grpo_message(**{"recipe": recipe, "surrogate": surrogate, field: value})
    assert text.startswith(f"{field} is {value}") and "does not read it" in text


def test_plain_policy_gradient_updates_once_a_batch():
    assert grpo_message(recipe="rloo", num_epochs=2).startswith("num_epochs is 2, and must be 1")
    assert grpo_message(recipe="rloo", num_minibatches=2).startswith("num_minibatches is 2, and must be 1")
    assert GRPOConfig(recipe="rloo", surrogate="ppo_clip", num_epochs=2).num_epochs == 2


def test_overlong_buffer_is_inside_the_limit():
    assert "use 6" in grpo_message(overlong_buffer_tokens=32, sampling={"max_new_tokens": 32})
    assert GRPOConfig(overlong_buffer_tokens=31, sampling={"max_new_tokens": 32}).overlong_buffer_tokens == 31


def test_vllm_samples_no_hotter_than_it_can():
    hot = {"sampling": {"temperature": 2.5}}
    assert "be at most 2 with rollout.engine vllm" in grpo_message(rollout={"engine": "vllm"}, **hot)
    assert GRPOConfig(**hot).rollout.engine == "embedded"


def test_the_engine_chooses_its_settings():
    assert grpo_message(rollout={"engine": "vlm"}).startswith("rollout.engine is 'vlm', and must be embedded or vllm")
    assert "rollout.merge_lora is not a setting" in grpo_message(rollout={"engine": "vllm", "merge_lora": True})
    config = GRPOConfig(rollout={"engine": "vllm", "sync": "adapter"})
    assert GRPOConfig(**config.model_dump()) == config


def test_greedy_rollouts_are_refused():
    wrong = {"logit_bias": {3: 1.0}, "banned_words": ["red"], "forced_tokens": {0: 4}, "regex": "a", "json_schema": {}}
    for name, value in wrong.items():
        message = grpo_message(sampling={name: value})
        assert f"sampling.{name} is" in message and "be left out of a training on rollouts" in message
    assert grpo_message(sampling={"regex": ""}).startswith("sampling.regex is ''")
    assert "greedy completions of a prompt are identical" in grpo_message(sampling={"temperature": 0})


def test_warmup_ends_within_the_run():
    assert grpo_message(num_steps=10, num_epochs=2, optim={"warmup_steps": 10}).startswith("optim.warmup_steps is 10")
    assert "less than num_steps (5)" in message(SFTConfig, num_steps=5, optim={"warmup_steps": 5})
    assert GRPOConfig(num_steps=10, num_epochs=2, optim={"warmup_steps": 9}).optim.warmup_steps == 9


def test_adaptive_kl_cannot_turn_negative():
    """A fifth of more than five horizons would make the coefficient less than nothing."""
    kl = {"coef": 0.1, "target": 0.1, "horizon": 15}
    assert "use 16 or more" in grpo_message(num_prompts=4, group_size=4, kl=kl)
    assert GRPOConfig(num_prompts=4, group_size=4, kl=kl | {"horizon": 16}).kl.horizon == 16
    assert GRPOConfig(kl={"coef": 0.1, "horizon": 1}).kl.target is None


def test_options_that_would_do_nothing_are_refused():
    assert "be k1 in the reward" in grpo_message(kl={"coef": 0.1, "estimator": "k3", "placement": "reward"})
    assert "give overlong_buffer_tokens" in grpo_message(overlong_penalty=0.5)


def test_adaptive_kl_needs_a_coefficient():
    assert "kl.coef is 0.0" in grpo_message(kl={"target": 0.1})
    assert GRPOConfig(kl={"target": 0.1, "coef": 0.01}).kl.target == 0.1


def test_kl_in_the_reward_is_k1_and_in_the_loss_any():
    assert "be k1 in the reward" in grpo_message(kl={"coef": 0.1, "estimator": "k2", "placement": "reward"})
    in_reward = GRPOConfig(kl={"coef": 0.1, "placement": "reward"})
    assert in_reward.kl.estimator == "k1"
    assert GRPOConfig(**in_reward.model_dump()) == in_reward
    assert [GRPOConfig(kl={"coef": 0.1, "estimator": k}).kl.estimator for k in ("k1", "k2", "k3")] == ["k1", "k2", "k3"]
    assert GRPOConfig().kl.estimator == "k2"


def test_clip_low_stays_below_one():
    assert "be less than 1" in grpo_message(clip_low=1.0)


def test_shortest_completion_is_at_most_the_longest():
    assert "sampling.min_new_tokens is 9" in grpo_message(sampling={"min_new_tokens": 9, "max_new_tokens": 8})


@pytest.mark.parametrize(
    ("data", "blamed"),
    [
        ({}, "data.path"),
        ({"path": "a.jsonl", "task": "chain_sum"}, "data.path"),
        ({"path": "a.jsonl", "task_options": {"x": 1}}, "data.task_options"),
        ({"path": "a.jsonl", "split": "test"}, "data.split"),
        ({"path": "a.csv", "config_name": "main"}, "data.config_name"),
        ({"task": "chain_sum", "split": "test"}, "data.split"),
        ({"task": "chain_sum", "split": "eval"}, "data.split"),
        ({"task": "chain_sum", "config_name": "main"}, "data.config_name"),
        ({"task": "chain_sum", "prompt_template": "Solve this."}, "data.prompt_template"),
    ],
)
def test_data_is_one_source_with_settings_of_its_own(data, blamed):
    assert run_message(data=data).startswith(f"{blamed} is ")


def test_evaluation_on_the_training_split_of_a_task_is_refused():
    assert run_message(eval_data={"task": "chain_sum"}).endswith("use train, and eval for eval_data")
    warm_start = {"data": {"task": "chain_sum", "split": "eval"}}
    assert run_message(warm_start=warm_start).startswith("warm_start.data.split is 'eval', and must not be")
    held_out = {"task": "chain_sum", "split": "eval", "eval_frac": 0.5}
    assert run_message(eval_data=held_out).startswith("data.eval_frac is 0.2, and must be the evaluation data's (0.5)")
    assert RunConfig.model_validate(RUN | {"eval_data": held_out | {"eval_frac": 0.2}}).eval_data is not None


@pytest.mark.parametrize(
    ("model", "blamed"),
    [
        ({}, "model.name"),
        ({"name": "m", "architecture": {}}, "model.name"),
        ({"architecture": {"hidden_size": 8}}, "model.tokenizer"),
        ({"name": "m", "tokenizer": {"vocab_size": 300}}, "model.tokenizer"),
        ({"architecture": {}, "tokenizer": "t", "lora": {}}, "model.lora"),
    ],
)
def test_model_is_a_checkpoint_or_a_new_one(model, blamed):
    assert run_message(model=model).startswith(f"{blamed} is ")


def test_reinforcement_learning_needs_rewards_and_fine_tuning_does_not():
    assert run_message(rewards=[]).startswith("rewards is []")
    assert RunConfig.model_validate(RUN | {"rewards": [], "trainer": {"type": "sft"}}).rewards == ()


def test_pass_at_k_needs_k_samples():
    assert "use num_samples 8" in run_message(evaluation={"pass_at": [1, 8]})
    assert run_message(evaluation={"pass_at": [0]}).startswith("evaluation.pass_at is [0]")
    assert RunConfig.model_validate(RUN | {"evaluation": {"pass_at": [4]}}).evaluation.pass_at == (4,)


def test_warm_start_before_fine_tuning_is_refused():
    assert run_message(warm_start={}, trainer={"type": "sft"}).startswith("warm_start is ")


def test_answer_template_holds_the_answer():
    assert run_message(warm_start={"answer_template": "yes"}).startswith("warm_start.answer_template is 'yes'")


def test_a_live_config_is_taken_as_it_is():
    trainer = GRPOConfig(recipe="dapo", clip_high=0.5)
    assert RunConfig.model_validate(RUN | {"trainer": trainer}).trainer is trainer


def test_config_errors_are_not_value_errors():
    assert not issubclass(ConfigError, ValueError)


def test_preferences_need_no_rewards():
    message = run_message(trainer={"type": "dpo"}, rewards=[{"name": "length"}])
    assert "rewards is ['length'], and must be empty" in message


def test_tokens_of_older_weights_must_be_weighted():
    servers = {"engine": "vllm_server", "max_staleness": 2}
    message = grpo_message(rollout=servers, mismatch={"correction": "geometric_mask"})
    known = "token_tis, icepop, sequence_tis or sequence_mis"
    assert f"mismatch.correction is 'geometric_mask', and must be {known} with rollout.max_staleness 2" in message
    for correction in ("auto", "token_tis", "icepop", "sequence_tis", "sequence_mis"):
        assert GRPOConfig(rollout=servers, mismatch={"correction": correction}).rollout.max_staleness == 2
    assert GRPOConfig(rollout=servers | {"max_staleness": 0}, mismatch={"correction": "none"})
    assert "max_staleness 1: tokens" in grpo_message(
        rollout=servers | {"max_staleness": 1}, mismatch={"correction": "none"}
    )
    assert "max_staleness is not a setting" in grpo_message(rollout={"engine": "vllm", "max_staleness": 1})


def test_a_quantized_engine_needs_a_correction():
    quantized = {"engine": "vllm", "quantization": "fp8"}
    text = grpo_message(rollout=quantized, mismatch={"correction": "none"})
    assert "mismatch.correction is 'none', and must be another with rollout.quantization fp8" in text
    assert GRPOConfig(rollout=quantized).mismatch.correction == "auto"
    assert GRPOConfig(rollout=quantized | {"quantization": None}, mismatch={"correction": "none"})
    text = message(OnlineDPOConfig, rollout=quantized)
    assert "rollout.quantization is 'fp8', and must be null with a trainer that has no mismatch.correction" in text
    assert "quantization" in grpo_message(rollout={"quantization": "fp8"})
    text = grpo_message(rollout={"quantization": "int8"}, mismatch={"correction": "none"})
    assert "mismatch.correction is 'none', and must be another with rollout.quantization int8" in text
    text = message(OnlineDPOConfig, rollout={"quantization": {"type": "int4", "group": 64}})
    assert "rollout.quantization is 'int4', and must be null with a trainer that has no mismatch.correction" in text
    assert GRPOConfig(rollout={"quantization": "int8_dynamic"}).rollout.quantization.exact == ("lm_head",)
    text = grpo_message(rollout={"quantization": "int8", "merge_lora": False})
    assert "merge_lora is False, and must be true or left out with quantization int8" in text


def test_an_approximate_cache_is_replayed_or_corrected():
    alone = {"kv_cache": {"type": "int8", "replay": False}}
    text = grpo_message(rollout=alone, mismatch={"correction": "none"})
    assert "mismatch.correction is 'none', and must be another with rollout.kv_cache int8 that is not replayed" in text
    assert GRPOConfig(rollout=alone).mismatch.correction == "auto"
    assert GRPOConfig(rollout={"kv_cache": {"type": "int8"}}, mismatch={"correction": "none"})
    assert "rollout.kv_cache.replay is False, and must be true" in message(OnlineDPOConfig, rollout=alone)
    assert OnlineDPOConfig(rollout={"kv_cache": {"type": "fp8"}}).rollout.kv_cache.replay


def test_an_approximate_cache_is_the_embedded_engines():
    assert GRPOConfig().rollout.kv_cache.type == "exact"
    assert "kv_cache" in grpo_message(rollout={"engine": "vllm", "kv_cache": {"type": "int8"}})
    text = grpo_message(rollout={"engine": "auto", "kv_cache": {"type": "int8"}})
    assert "kv_cache" in text and "use engine: embedded" in text
    assert "kv_cache" in grpo_message(rollout={"kv_cache": {"type": "int9"}})


def test_a_rounded_cache_of_vllm_needs_a_correction():
    served = {"engine": "vllm", "kv_cache": "fp8"}
    text = grpo_message(rollout=served, mismatch={"correction": "none"})
    assert "mismatch.correction is 'none', and must be another with rollout.kv_cache fp8, which vLLM rounds" in text
    assert GRPOConfig(rollout=served).rollout.kv_cache == "fp8"
    text = message(OnlineDPOConfig, rollout=served)
    assert "rollout.kv_cache is 'fp8', and must be null with a trainer that has no mismatch.correction" in text


def test_caches_that_two_settings_can_describe_need_one_of_them() -> None:
    for cache, name in (({"type": "threshold"}, "part"), ({"type": "threshold", "part": 0.1, "mass": 0.9}, "part"),
                        ({"type": "low_rank"}, "rank"), ({"type": "low_rank", "rank": 4, "energy": 0.9}, "rank")):
        text = grpo_message(rollout={"kv_cache": cache})
        assert f"{name} is" in text and "one of them says" in text
    text = grpo_message(rollout={"kv_cache": {"type": "low_rank", "rank": 64, "calibration_tokens": 63}})
    assert "rank is 64, and must be at most calibration_tokens (63)" in text
    assert "heavy" in grpo_message(rollout={"kv_cache": {"type": "evict", "heavy": 0}})
    assert GRPOConfig(rollout={"kv_cache": {"type": "evict", "interval": None}}).rollout.kv_cache.interval is None


def test_own_choices_are_replayed_in_later_updates_only():
    assert "be rollout or none where a batch has one update" in grpo_message(routing_replay="trainer")
    assert GRPOConfig(routing_replay="trainer", num_minibatches=2).routing_replay == "trainer"


def test_servers_are_addresses_named_once():
    for wrong in ("localhost:8000", "http://host", "https://host:1", "http://host:1/path", "http://host:port"):
        message = grpo_message(rollout={"engine": "vllm_server", "servers": [wrong]})
        assert "rollout.servers is" in message and f"http://HOST:PORT; correct {wrong}" in message
    twice = {"engine": "vllm_server", "servers": ["http://a:1", "http://a:1"]}
    assert "name each server once" in grpo_message(rollout=twice)
    assert "rollout.servers" in grpo_message(rollout={"engine": "vllm_server", "servers": []})


def test_a_student_begins_with_chosen_layers_of_a_named_model():
    model = {"name": "m", "student": {"layers": [0, 2]}}
    assert RunConfig.model_validate(RUN | {"model": model}).model.student.layers == (0, 2)
    assert "layers is null, and must be given exactly where num_layers is not" in run_message(
        model={"name": "m", "student": {}}
    )
    assert "give one of the two" in run_message(model={"name": "m", "student": {"layers": [0], "num_layers": 1}})
    assert run_message(model={"name": "m", "student": {"layers": [2, 0, 2]}}).endswith("ascending; use [0, 2]")
    assert "none below 0" in run_message(model={"name": "m", "student": {"layers": [-1, 0]}})
    assert "use [0]" in run_message(model={"name": "m", "student": {"layers": []}})
    new = {"architecture": {}, "tokenizer": {"vocab_size": 300}, "student": {"num_layers": 1}}
    assert "model.student is 'given', and must be null for a new model" in run_message(model=new)
    assert "alignlab student" in run_message(model={**model, "lora": {"rank": 2}})


def distill_message(**fields) -> str:
    return message(OnPolicyDistillConfig, teacher={"name": "t"}, **fields)


def test_on_policy_distillation_reads_what_it_is_given():
    assert OnPolicyDistillConfig(teacher={"name": "t"}).discount == 0
    assert "normalize_length is True, and must be false with discount 0" in distill_message(normalize_length=True)
    assert OnPolicyDistillConfig(teacher={"name": "t"}, discount=1, normalize_length=True).normalize_length
    assert "group_size is 1, and must be at least 2 with task_weight" in distill_message(group_size=1, task_weight=0.1)
    assert "kl.placement is 'reward', and must be loss" in distill_message(kl={"coef": 0.1, "placement": "reward"})
    assert "kl.target is 0.1, and must be null" in distill_message(kl={"coef": 0.1, "target": 0.1})
    assert "clip_low is 0.1, and must stay 0.2 with surrogate reinforce" in distill_message(
        surrogate="reinforce", clip_low=0.1
    )
    assert "num_epochs is 2, and must be 1 with surrogate reinforce" in distill_message(
        surrogate="reinforce", num_epochs=2
    )
    assert "discount is 1.5" in distill_message(discount=1.5)
    assert "trainer.teacher is missing" in run_message(trainer={"type": "on_policy_distill"})


def test_on_policy_distillation_may_do_without_rewards_but_says_what_it_measures():
    trainer = {"type": "on_policy_distill", "teacher": {"name": "t"}}
    run = RunConfig.model_validate(RUN | {"rewards": [], "trainer": trainer})
    assert not run.has_scorer and run.measured_data is None
    scored = RunConfig.model_validate(RUN | {"trainer": trainer})
    assert scored.has_scorer and scored.measured_data.split == "eval"
    alone = RunConfig.model_validate(RUN | {"rewards": [], "trainer": trainer, "evaluation": {"scorer": "r"}})
    assert alone.measured_data is not None
    held_out = {"task": "chain_sum", "split": "eval"}
    assert "eval_data is 'given', and must be null where nothing decides" in run_message(
        rewards=[], trainer=trainer, eval_data=held_out
    )
    assert "trainer.task_weight is 0.5, and must be 0 where there are no rewards" in run_message(
        rewards=[], trainer=trainer | {"task_weight": 0.5}
    )


def test_a_path_that_begins_with_the_home_folder_is_that_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/me")
    changes = {"model": {"name": "~/model", "tokenizer": "~/tokens"}, "data": {"path": "~/rows.jsonl"}}
    run = RunConfig.model_validate(RUN | changes)
    assert (run.model.name, run.model.tokenizer) == ("/home/of/me/model", "/home/of/me/tokens")
    assert run.data.path == "/home/of/me/rows.jsonl"
    assert TeacherSettings(name="~/teacher").name == "/home/of/me/teacher"
    assert RewardSettings(name="~/rewards.py:f").name == "/home/of/me/rewards.py:f"
    assert EvaluationSettings(scorer="~/rewards.py:f").scorer == "/home/of/me/rewards.py:f"
    assert ModelJudge(name="~/judge").name == RewardJudge(name="~/judge").name == "/home/of/me/judge"
    rlaif = RLAIFConfig(path="direct", constitution="~/c.yaml", judge={"name": "x"}, policy={"type": "grpo"})
    assert rlaif.constitution == "/home/of/me/c.yaml"
    assert TeacherSettings(name="owner/~teacher").name == "owner/~teacher"
