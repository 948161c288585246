"""A reward model as a reward: exact ids, on the policy's base as good as a copy beside it, refused where it is none."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from alignlab.cli import main
from alignlab.config.model import LoraSettings
from alignlab.config.rewards import RewardLimits, RewardSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import GRPOConfig, PPOConfig, RewardConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import CheckpointError, ConfigError, RewardError
from alignlab.files.manifest import MODEL_MANIFEST
from alignlab.models.hub.checkpoints import load_model, save_model
from alignlab.models.hub.reward_checkpoints import check_reward_model, load_reward_model
from alignlab.scoring import reward_model as model_reward
from alignlab.scoring.loading import load_reward
from alignlab.scoring.reward_model import ModelReward, bind_rewards
from alignlab.scoring.runner import RewardRunner
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.ppo import PPOTrainer
from alignlab.trainers.reward import RewardTrainer
from alignlab.types import Completion, Prompt, Rollout
from tests.settings import merged
from tests.trainers.conftest import SPARSE, even_ids
from tests.trainers.tiny import pairs

Make = Callable[..., Any]
LORA = LoraSettings(rank=2)
PLUG_IN = "alignlab.scoring.reward_model.ModelReward"
ROLLOUTS = [
    Rollout(
        Prompt(prompt, "p"),
        tuple(Completion.of(ids, "c") for ids in completions),
    )
    for prompt, completions in (((5, 6, 7), ((8, 1), (9, 10, 11))), ((5, 6), ((12,), (), (8, 1))))
]


@pytest.fixture
def make_base(make_model: Make, tokenizer: Any, tmp_path: Path) -> Callable[..., str]:
    def make(name: str = "base", **options: Any) -> str:
        save_model(make_model(**options), tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def make_reward(make_base: Make, tokenizer: Any, tmp_path: Path) -> Callable[..., str]:
    """The folder of a trained reward model."""

    def make(name: str = "reward", base: str | None = None, lora: Any = LORA, seed: int = 0, **options: Any) -> str:
        model = load_model(base or make_base(**options), dtype=torch.float32)
        config = RewardConfig(
            output_dir=tmp_path / name, num_steps=3, num_pairs=4, optim={"learning_rate": 3e-2}, trackers=(), seed=seed
        )
        result = RewardTrainer(model, config, pairs(8, seed=seed), tokenizer=tokenizer, peft_config=lora).train()
        return str(result.model_path)

    return make


@pytest.fixture
def make_trainer(tokenizer: Any, rows: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(
        rewards: Any, *, kind: type = PPOTrainer, base: str | None = None, folder: str = "run", callbacks: Any = (),
        lora: Any = LORA, evaluation: Any = None, held_out: Any = None, **changes: Any,
    ) -> Any:
        config = {PPOTrainer: PPOConfig, GRPOTrainer: GRPOConfig}[kind]
        settings: dict[str, Any] = {
            "output_dir": tmp_path / folder, "num_steps": 3, "num_prompts": 2, "group_size": 2,
            "optim": {"learning_rate": 1e-2},
            "sampling": {"max_new_tokens": 6}, "trackers": (),
        }
        model = load_model(base or str(tmp_path / "base"), dtype=torch.float32)
        return kind(
            model, rewards, config(**merged(settings, changes)), rows, tokenizer=tokenizer, peft_config=lora,
            callbacks=callbacks, evaluation=evaluation, eval_dataset=held_out,
        )

    return make


def scores(reward: Any) -> list[float | None]:
    runner = RewardRunner([load_reward(reward)], RewardLimits(max_failures=0))
    return [value for rollout in runner.score(ROLLOUTS) for value in next(iter(rollout.reward_parts.values()))]


def plain(folder: str) -> list[float | None]:
    """Return rewards by a plain forward pass over each sequence."""
    reward = load_reward_model(folder)
    results: list[float | None] = []
    for rollout in ROLLOUTS:
        for completion in rollout.completions:
            ids = torch.tensor([[*rollout.prompt.token_ids, *completion.token_ids]])
            with torch.no_grad():
                hidden = reward.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
                results.append(float(hidden @ reward.score.weight[0]) if completion.token_ids else None)
    return results


def shares_policy(reward: ModelReward) -> bool:
    """Return whether the reward model is an adapter on the policy's base, without a copy of the base."""
    return reward._reward is not None and reward._reward.role is not None


def close(values: list[float | None]) -> list[Any]:
    return [None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5) for value in values]


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all"])
def test_reward_of_a_completion_equals_a_plain_forward_pass(lora: Any, make_reward: Make) -> None:
    folder = make_reward(lora=lora)
    for results in (scores(ModelReward(folder)), scores(ModelReward(folder, tokens_per_microbatch=1))):
        assert results == close(plain(folder))
    assert results[3] is None and len({round(value, 4) for value in results if value is not None}) == 4
    named = load_reward(RewardSettings(name=PLUG_IN, options={"model": folder}, weight=0.5))
    assert named.weight == 0.5 and isinstance(named.function, ModelReward) and not named.options


def test_completion_beyond_the_positions_of_the_reward_model_has_no_reward(make_reward: Make, tmp_path: Path) -> None:
    folder = make_reward()
    config = tmp_path / "base/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 5}))
    results = ModelReward(folder)(prompt_ids=[(5, 6, 7)] * 3, completion_ids=[(8, 1), (9, 10, 11), (8, 1)])
    assert results[1] is None and results[0] == results[2] == close(plain(folder))[0]


def test_reward_model_of_the_same_base_shares_it_with_the_policy(make_reward: Make, make_trainer: Make) -> None:
    folder = make_reward()
    reward = ModelReward(folder)
    trainer = make_trainer(reward)
    assert shares_policy(reward) and sorted(trainer.learner.model.peft_config) == ["critic", "default", "reward"]
    assert scores(reward) == close(plain(folder))


def test_reward_model_of_another_base_is_loaded_beside_the_policy(
    make_reward: Make, make_base: Make, make_trainer: Make
) -> None:
    folder = make_reward()
    other = make_base("other", seed=4)
    expected = scores(ModelReward(folder))
    for settings in ({"base": other}, {"lora": None, "critic": {"form": "model"}}):
        reward = ModelReward(folder)
        trainer = make_trainer(reward, folder=str(len(settings)), **settings)
        assert not shares_policy(reward) and scores(reward) == expected
        assert "reward" not in getattr(trainer.learner.model, "peft_config", {})
    ahead = ModelReward(folder)
    trainer = make_trainer(even_ids, folder="ahead")
    bind_rewards([load_reward(ahead)], trainer.learner.model, trainer.tokenizer, share=False)
    assert not shares_policy(ahead) and scores(ahead) == expected


def weights(trainer: Any) -> dict[str, Tensor]:
    return {
        f"{role}{name}": p.detach().clone()
        for role, learner in trainer.learners.items() for name, p in learner.trained.items()
    }


@pytest.mark.parametrize("shape", [{}, {"architecture": SPARSE}], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", [PPOTrainer, GRPOTrainer])
def test_training_on_a_shared_base_equals_training_with_copies(
    kind: type, shape: Any, make_reward: Make, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actor, critic, reference and reward model: the same rewards, values and weights, to the last bit."""
    folder, results = make_reward(**shape), []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(model_reward, "known_base", lambda _: None)
        reward, steps = ModelReward(folder), []
        trainer = make_trainer(
            reward, kind=kind, folder=str(shares), kl={"coef": 0.1},
            callbacks=[lambda t, s, m, steps=steps: steps.append({n: v for n, v in m.items() if not n.endswith("_s")})],
        )
        start = weights(trainer)
        trainer.train()
        assert shares_policy(reward) is shares
        results.append((steps, weights(trainer)))
    (metrics, end), (others, other_end) = results
    assert metrics == others and metrics[0]["reward"] != 0
    assert all(torch.equal(end[name], other_end[name]) for name in start)
    assert any(not torch.equal(end[name], start[name]) for name in start)


def test_run_with_a_reward_model_resumes_bit_for_bit_and_saves_only_the_policy(
    make_reward: Make, make_trainer: Make
) -> None:
    def cut(trainer: Any, step: int, metrics: Any) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = make_reward()
    whole = make_trainer(ModelReward(folder))
    path = whole.train().model_path
    assert make_trainer(ModelReward(folder), folder="cut", callbacks=[cut]).train().interrupted
    second = make_trainer(ModelReward(folder), folder="cut")
    assert second.train(resume=True).num_steps == 3
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())
    assert not [each for each in path.iterdir() if each.is_dir()]
    saved = load_file(path / "adapter_model.safetensors")
    assert saved and not [name for name in saved if "reward" in name or "score" in name]
    for file in whole.config.output_dir.rglob("*.safetensors"):
        assert not [name for name in load_file(file) if ".reward." in name]


@pytest.mark.parametrize("shared", [True, False])
def test_resumption_with_another_reward_model_is_refused(
    shared: bool, make_base: Make, make_reward: Make, make_trainer: Make
) -> None:
    base = make_base()
    of_reward = base if shared else make_base("other", seed=3)
    one, two = (make_reward(name, base=of_reward, seed=seed) for name, seed in (("one", 0), ("two", 7)))

    def run(folder: str, num_steps: int, *, resume: bool) -> None:
        reward = ModelReward(folder)
        make_trainer(reward, kind=GRPOTrainer, folder="cut", num_steps=num_steps).train(resume=resume)
        assert shares_policy(reward) == shared

    run(one, 1, resume=False)
    run(one, 2, resume=True)
    description = Path(one) / "reward_model.json"
    (Path(one) / MODEL_MANIFEST).unlink()  # a file of the folder is changed on purpose
    if shared:  # the same reward model, of which nothing says any more whose base it is on
        kept = description.read_text()
        description.write_text(kept.replace(json.loads(kept)["base_digest"], "another"))
        reward = ModelReward(one)
        make_trainer(reward, kind=GRPOTrainer, folder="cut", num_steps=3).train(resume=True)
        assert not shares_policy(reward)
        description.write_text(kept)
    with pytest.raises(CheckpointError, match="the reward model 1 has other weights than when the run began"):
        run(two, 4, resume=True)


@pytest.mark.parametrize("change", ["weights", "config"])
def test_resumption_with_another_base_of_the_reward_model_is_refused(
    change: str, make_base: Make, make_reward: Make, make_trainer: Make
) -> None:
    make_base()
    base = Path(make_base("other", seed=3))
    folder = make_reward(base=str(base))
    make_trainer(ModelReward(folder), kind=GRPOTrainer, folder="cut", num_steps=1).train()
    if change == "weights":
        make_base("other", seed=4)
    else:
        config = base / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    trainer = make_trainer(ModelReward(folder), kind=GRPOTrainer, folder="cut", num_steps=2)
    with pytest.raises(CheckpointError, match="the base of the reward model 1 has other weights than when"):
        trainer.train(resume=True)


def test_two_reward_models_are_two_roles_on_the_base(make_reward: Make, make_trainer: Make) -> None:
    one = make_reward()
    other = make_reward("second", base=str(Path(one).parents[1] / "base"), seed=7)
    expected = [scores(ModelReward(folder)) for folder in (one, other)]
    models = [ModelReward(folder) for folder in (one, other)]
    trainer = make_trainer(models)
    assert sorted(trainer.learner.model.peft_config) == ["critic", "default", "reward", "reward_1"]
    assert [scores(model) for model in models] == [close(each) for each in expected]
    assert trainer.source.rewards.names == ("reward_model", "reward_model_2")
    assert set(trainer.source.collect(1).rollouts[0].reward_parts) == {"reward_model", "reward_model_2"}


def test_reward_model_runs_inline_and_leaves_the_policy_adapter_active(
    make_reward: Make, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = ModelReward(make_reward())
    trainer = make_trainer(reward)
    threads: list[Any] = []

    def fails(*_: Any) -> Any:
        threads.append(threading.current_thread())
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(reward._reward.score), "forward", fails)
    monkeypatch.setattr("alignlab.models.reward_model.linear", fails)
    with pytest.raises(RewardError, match="no memory"):
        scores(reward)
    assert threads == [threading.main_thread()] and trainer.learner.model.active_adapter == "default"
    assert all(".default." in name for name in trainer.learner.trained)


def test_rewards_that_are_not_finite_are_failures(make_reward: Make) -> None:
    reward = ModelReward(make_reward())
    scores(reward)
    with torch.no_grad():
        reward._reward.score.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match=r"failed \(not finite\)"):
        scores(reward)


def test_other_tokenizer_is_refused(
    make_reward: Make, make_trainer: Make, tokenizer: Any, tmp_path: Path
) -> None:
    reward = ModelReward(make_reward())
    model = load_model(str(tmp_path / "base"), dtype=torch.float32)
    others = {"vocabulary": train_tokenizer(["abc xyz xyz 99 99"], vocab_size=262)}
    others |= {name: copy.deepcopy(tokenizer) for name in ("end", "template")}
    others["end"].eos_token = others["end"].convert_ids_to_tokens(5)
    others["template"].chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = {
        "vocabulary": r"is (\d+|no token) to one and (\d+|no token) to the other",
        "end": "texts end with",
        "template": "one has a chat template, and the other has none",
    }
    for name, other in others.items():
        other.name_or_path = f"other-{name}"
        with pytest.raises(ConfigError, match=rf"reward model .*reward/adapter .*\(other-{name}\): .*{messages[name]}"):
            reward.bind(model, other, share=True)


def test_other_rendering_of_a_chat_is_refused(make_reward: Make, tokenizer: Any) -> None:
    folder = make_reward()
    chats = copy.deepcopy(tokenizer)
    chats.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chats.save_pretrained(folder)
    reward, other = ModelReward(folder), copy.deepcopy(chats)
    reward.check_tokenizer(other)
    other.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="they make other ids of the same conversation"):
        reward.check_tokenizer(other)


def test_reward_model_is_refused_as_a_scorer(make_reward: Make, make_trainer: Make, rows: Any) -> None:
    folder = make_reward()
    with pytest.raises(ConfigError, match=r"evaluation\.scorer must be a reward function whose value 1"):
        make_trainer(ModelReward(folder), held_out=rows[:2])
    scored = make_trainer(
        ModelReward(folder), folder="scored", held_out=rows[:2],
        evaluation=EvaluationSettings(scorer="exact_match", num_samples=1), num_steps=1,
    )
    assert scored.train().after is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs the option 'model'"),
        ({"model": "nowhere"}, "must be a local folder of a reward model, and 'nowhere' is none"),
        ({"model": "~/nowhere"}, r"must be a local folder of a reward model, and '/[^~]*nowhere' is none"),
        ({"model": 3}, "must be a local folder of a reward model, and 3 is none"),
        ({"modle": "x"}, "has no option 'modle'; did you mean 'model'"),
    ],
)
def test_wrong_options_of_a_reward_model_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(RewardSettings(name=PLUG_IN, options=options))


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all"])
def test_check_refuses_reward_model_weights_that_do_not_fit_the_config(lora: Any, make_reward: Make) -> None:
    folder = Path(make_reward(lora=lora))
    check_reward_model(str(folder))
    (folder / MODEL_MANIFEST).unlink()
    name, change = ("config.json", {"intermediate_size": 16}) if lora is None else ("adapter_config.json", {"r": 3})
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for refuses in (check_reward_model, load_reward_model):
        with pytest.raises(CheckpointError):
            refuses(str(folder))


def test_language_model_is_refused_as_a_reward_model(make_base: Make, make_reward: Make) -> None:
    with pytest.raises(ConfigError, match="must be a local folder of a reward model"):
        ModelReward(make_base())
    with pytest.raises(ConfigError, match="tokens_per_microbatch of a reward must be a whole number, at least 1"):
        ModelReward(make_reward(), tokens_per_microbatch=0)


@pytest.mark.parametrize("shape", [{}, {"architecture": SPARSE}], ids=["dense", "experts"])
def test_merged_reward_model_gives_the_same_rewards(
    shape: Any, make_reward: Make, tmp_path: Path, capsys: Any
) -> None:
    folder, merged = make_reward(**shape), str(tmp_path / "merged")
    assert main(["merge", folder, merged]) == 0
    assert scores(ModelReward(merged)) == close(scores(ModelReward(folder)))
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    with torch.no_grad():
        one = model(torch.tensor([[*ROLLOUTS[0].prompt.token_ids, 8, 1]])).logits
    assert float(one) == pytest.approx(plain(folder)[0], rel=1e-4)
    assert main(["merge", folder, str(tmp_path / "low"), "--model", str(tmp_path / "base"), "--dtype", "bfloat16"]) == 0
    assert load_reward_model(str(tmp_path / "low")).model.dtype == torch.bfloat16
    assert main(["generate", str(tmp_path / "base"), "a", "--adapter", folder]) == 2
    assert "is a reward model, and a language model is needed here" in capsys.readouterr().err


def test_alignlab_check_tries_a_reward_model(make_reward: Make, make_base: Make, tmp_path: Path, capsys: Any) -> None:
    folder = make_reward()
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"ab{i}", "answer": "a"}) for i in range(4)))
    config = tmp_path / "ppo.yaml"
    config.write_text(json.dumps({
        "model": {"name": str(tmp_path / "base"), "lora": {"rank": 2}},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "rewards": [{"name": PLUG_IN, "options": {"model": folder}}],
        "trainer": {"type": "ppo", "output_dir": str(tmp_path / "run"), "num_steps": 1, "trackers": []},
    }))
    assert main(["check", str(config)]) == 0
    assert "ModelReward: " in capsys.readouterr().out
    assert main(["check", str(config), f"eval_data.path={tmp_path / 'rows.jsonl'}"]) == 2
    assert "evaluation.scorer must be" in capsys.readouterr().err
