"""PPO: token by token what a slow twin computes; critics that share a base as good as copies; any cut the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from alignlab.config.model import LoraSettings
from alignlab.config.run import RunConfig
from alignlab.config.trainers import CriticSettings, KLSettings, MemorySettings, PPOConfig
from alignlab.errors import ConfigError, NumericsError
from alignlab.models.adapters import add_lora
from alignlab.models.critic import Critic, make_critic
from alignlab.trainers.ppo import PPOTrainer
from alignlab.types import Segments
from tests.reference import functional as slow
from tests.settings import merged
from tests.trainers.conftest import DENSE, SPARSE, even_ids
from tests.trainers.steps import credit_of, minibatches_of

Make = Callable[..., Any]
LORA = LoraSettings(rank=2)


@pytest.fixture
def make_trainer(make_model: Make, tokenizer: Any, rows: Any, tmp_path: Any) -> Callable[..., PPOTrainer]:
    def make(
        *, architecture: Any = None, lora: Any = LORA, seed: int = 0, folder: str = "run", callbacks: Any = (),
        reward: Any = even_ids, **changes: Any
    ) -> PPOTrainer:
        base: dict[str, Any] = {
            "output_dir": tmp_path / folder, "num_steps": 4, "num_prompts": 4, "group_size": 2,
            "optim": {"learning_rate": 1e-2},
            "sampling": {"max_new_tokens": 6}, "trackers": (), "num_epochs": 1,
        }
        model = make_model(seed=seed) if architecture is None else make_model(architecture, seed)
        return PPOTrainer(
            model, reward, PPOConfig(**merged(base, changes)), rows, tokenizer=tokenizer, peft_config=lora,
            callbacks=callbacks,
        )

    return make


def excite(trainer: PPOTrainer) -> None:
    """A critic that says something, and a policy that has left the reference."""
    torch.manual_seed(7)
    with torch.no_grad():
        trainer.algorithm.critic_learner.module.weight.normal_()
        for name, weight in trainer.learner.module.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    trainer.source.engine.update_weights(trainer.source.engine.policy_version + 1)


@pytest.mark.parametrize("whiten", [False, True])
def test_credit_is_the_slow_one(whiten: bool, make_trainer: Make) -> None:
    trainer = make_trainer(
        num_minibatches=2, gamma=0.9, gae_lambda=0.8, whiten_advantages=whiten, kl={"coef": 0.3},
        memory={"tokens_per_microbatch": 24},
    )
    excite(trainer)
    rollouts = trainer.source.collect(1).rollouts
    credit = credit_of(trainer, 1, rollouts)
    credited = credit.minibatches
    assert len(credited) == 2 and sum(len(packs) for packs in credited) > 2
    found: list[Tensor] = []
    for part, packs in enumerate(credited):
        rewards = [r for rollout in rollouts[2 * part : 2 * part + 2] for r in rollout.rewards]
        for pack in packs:
            ids, values = pack.segments.sequence_of_token, trainer.algorithm.critic_learner.outputs([pack])[0].values
            for b in set(ids[pack.completion_mask].tolist()):
                own = (ids == b) & pack.completion_mask
                kl = (pack.old_logprobs - pack.ref_logprobs)[own].tolist()
                steps = [-0.3 * x for x in kl]
                steps[-1] += rewards[b]
                expected = torch.tensor(slow.gae(steps, values[own].tolist(), 0.9, 0.8))
                torch.testing.assert_close(pack.returns[own], expected + values[own])
                if not whiten:
                    torch.testing.assert_close(pack.advantages[own], expected)
                found.append(pack.advantages[own])
    everything = torch.cat(found)
    if whiten:
        assert float(everything.mean()) == pytest.approx(0, abs=1e-5) and float(everything.std()) == pytest.approx(1)
    assert credit.metrics["kl_in_reward"] > 0


def test_explained_variance_uses_the_critic_before_the_step(make_trainer: Make) -> None:
    trainer = make_trainer(kl={"coef": 0.0}, gae_lambda=1.0)
    excite(trainer)
    credit = credit_of(trainer, 1, trainer.source.collect(1).rollouts)
    [[pack]] = credit.minibatches
    mask = pack.completion_mask
    errors, returns = (pack.returns - pack.values)[mask], pack.returns[mask]
    expected = 1 - float(errors.var() / returns.var())
    assert credit.metrics["explained_variance"] == pytest.approx(expected, rel=1e-4)


def gradients(learner: Any, packs: Any, loss: Any, weigh: Any) -> dict[str, Tensor]:
    """Return the gradients of an update without the optimizer step."""
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> dict[str, float]:
        gradients.update({n: p.grad.clone() for n, p in learner.module.named_parameters() if p.grad is not None})
        learner.optimizer.zero_grad(set_to_none=True)
        return {}

    step, learner._step = learner._step, keep
    try:
        learner.update(packs, loss, weigh)
    finally:
        learner._step = step
    return gradients


def test_gradient_of_the_critic_does_not_depend_on_the_packs(make_trainer: Make) -> None:
    trainer = make_trainer()
    excite(trainer)
    rollouts, found = trainer.source.collect(1).rollouts, []
    for budget in (16, 4096):
        memory = MemorySettings(tokens_per_microbatch=budget)
        trainer.algorithm.config = trainer.config.model_copy(update={"memory": memory})
        [packs] = minibatches_of(trainer, 1, rollouts)
        moved = [replace(pack, returns=pack.returns + torch.arange(pack.num_tokens) * 0.0 + 0.3) for pack in packs]
        loss, weights = trainer.algorithm.value_loss, trainer.algorithm.loss_weights
        found.append((len(packs), gradients(trainer.algorithm.critic_learner, moved, loss, weights)))
    (many, cut), (one, whole) = found
    assert many > one == 1 and cut.keys() == whole.keys()
    assert any("critic" in name for name in whole) and not any("default" in name for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["lora", "head", "model"])
def test_critic_on_the_shared_base_equals_a_critic_on_a_copy(form: Any, make_model: Make) -> None:
    """Values and gradients, and it leaves the policy, its adapter and what is in training as they are."""
    settings = CriticSettings(form=form, **{"rank": 3} if form == "lora" else {})
    model = add_lora(make_model(), LORA)
    torch.manual_seed(1)
    critic = make_critic(model, settings)
    with torch.no_grad():
        critic.weight.normal_()
        for name, weight in critic.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    tokens, mask = torch.randint(0, 250, (12,)), torch.arange(12) > 4
    training = {name: p.requires_grad for name, p in model.named_parameters()}

    def values_and_gradients(critic: Critic) -> tuple[Tensor, dict[str, Tensor]]:
        critic.zero_grad()
        with critic.in_use():
            values = critic(tokens, Segments.single(12), mask).values
            values.square().sum().backward()
        return values.detach(), {n: p.grad for n, p in critic.named_parameters() if p.grad is not None}

    values, grads = values_and_gradients(critic)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == training
    assert values[~mask].abs().max() == 0 and values[mask].abs().min() > 0
    # The same by hand: the base with that adapter merged, and no adapter around it.
    base = make_model()
    if form != "head":
        twin = add_lora(base, LoraSettings(rank=3 if form == "lora" else 2, alpha=32))
        source = "critic" if form == "lora" else "default"
        weights = {
            n.replace(f".{source}.", ".default."): p for n, p in critic.model.named_parameters() if f".{source}." in n
        }
        twin.load_state_dict(weights, strict=False)
    else:
        twin, source = base.requires_grad_(False), ""
    separate = Critic(twin, "model")
    separate.load_state_dict({"weight": critic.weight, "bias": critic.bias}, strict=False)
    other, other_grads = values_and_gradients(separate)
    torch.testing.assert_close(values, other)
    assert len(grads) == len(other_grads) and {"weight", "bias"} <= grads.keys()
    for name, gradient in other_grads.items():
        torch.testing.assert_close(grads[name.replace(".default.", f".{source}.")], gradient, rtol=1e-4, atol=1e-6)


def test_policy_and_critic_do_not_move_each_other(make_trainer: Make) -> None:
    trainer = make_trainer()
    excite(trainer)
    [packs] = minibatches_of(trainer, 1, trainer.source.collect(1).rollouts)

    def snapshot() -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in trainer.algorithm.critic_learner.module.named_parameters()}

    start = snapshot()
    trainer.algorithm.critic_learner.update(packs, trainer.algorithm.value_loss, trainer.algorithm.loss_weights)
    middle = snapshot()
    trainer.learner.update(packs, trainer.algorithm.loss, trainer.algorithm.loss_weights)
    end = snapshot()

    def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
        return {
            next((r for r in ("critic", "default") if f".{r}." in n), "head" if n in ("weight", "bias") else "base")
            for n in one if not torch.equal(one[n], other[n])
        }

    assert moved(start, middle) == {"critic", "head"}
    assert moved(middle, end) == {"default"}


def test_policy_stands_still_during_the_warm_up_of_the_critic(make_trainer: Make) -> None:
    seen: list[Tensor] = []

    def keep(trainer: PPOTrainer, step: int, metrics: Any) -> None:
        seen.append(torch.cat([p.detach().flatten() for p in trainer.learner.trained.values()]))
        assert ("ratio" in metrics) == (step > 2) and "critic/loss" in metrics

    trainer = make_trainer(callbacks=[keep], critic={"warmup_steps": 2, "learning_rate": 1e-2}, num_minibatches=2)
    start = torch.cat([p.detach().flatten() for p in trainer.learner.trained.values()])
    trainer.train()
    assert torch.equal(seen[0], start) and torch.equal(seen[1], start) and not torch.equal(seen[2], start)
    assert trainer.learner.num_updates == 4 and trainer.algorithm.critic_learner.num_updates == 8
    with pytest.raises(ConfigError, match=r"critic\.warmup_steps is 4, and must be less than num_steps \(4\)"):
        make_trainer(critic={"warmup_steps": 4})


def test_adaptive_coefficient_follows_the_kl_in_the_reward(make_trainer: Make) -> None:
    coefs: list[float] = []
    trainer = make_trainer(
        kl={"coef": 0.5, "target": 1e-3, "horizon": 8},
        callbacks=[lambda t, *_: coefs.append(t.algorithm.objective.kl_coef)]
    )
    excite(trainer)
    trainer.train()
    assert coefs[0] == pytest.approx(0.5 * 1.2) and coefs[1] > coefs[0]


def test_the_critic_writes_to_nothing_but_its_own(make_model: Make) -> None:
    """However the policy's adapter was begun, and whatever else of the model trains."""
    model = add_lora(make_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = parameter.requires_grad or "norm" in name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    critic = make_critic(model, CriticSettings(rank=3))
    with critic.in_use():
        trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert trained and all(".critic." in name or name in ("weight", "bias") for name in trained)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in before.items())
    assert make_critic(model, CriticSettings(rank=3)) is not critic  # of another trainer, in the first one's place


def test_a_step_that_fails_half_way_is_not_saved_as_the_one_before(make_trainer: Make) -> None:
    """The critic has moved already: what is saved is the copy of it as it was after the step before."""
    trainer = make_trainer(critic={"warmup_steps": 2})
    update, calls = trainer.source.engine.update_weights, []

    def fails(version: int) -> None:
        calls.append(version)
        if len(calls) == 2:
            raise RuntimeError("sync")
        update(version)

    trainer.source.engine.update_weights = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="sync"):
        trainer.train()
    resumed, straight = make_trainer(critic={"warmup_steps": 2}), make_trainer(critic={"warmup_steps": 2}, folder="all")
    resumed.train(resume=True)
    straight.train()
    for name, learner in straight.learners.items():
        again = resumed.learners[name].trained
        assert all(torch.equal(weight, again[each]) for each, weight in learner.trained.items())


def test_critic_that_is_not_finite_is_refused_by_name(make_trainer: Make) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.algorithm.critic_learner.module.bias.fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"the weights that the run begins with must be finite, .* critic-.*bias"):
        trainer.train()


def test_step_without_signal_leaves_the_kl_coefficient_unchanged(make_trainer: Make) -> None:
    trainer = make_trainer(
        reward=lambda completions, **_: [None] * len(completions), kl={"coef": 0.5, "target": 0.1, "horizon": 8},
        reward_limits={"max_failures": 100},
    )
    minibatches_of(trainer, 1, trainer.source.collect(1).rollouts)
    assert trainer.algorithm.objective.kl_coef == 0.5


def test_the_policys_learning_rate_warms_up_after_the_critic(make_trainer: Make) -> None:
    rates: list[float] = []

    def keep(trainer: PPOTrainer, step: int, metrics: Any) -> None:
        if "learning_rate" in metrics:
            rates.append(metrics["learning_rate"])

    warmups = {"critic": {"warmup_steps": 3}, "optim": {"warmup_steps": 2}}
    make_trainer(num_steps=8, **warmups, num_minibatches=2, callbacks=[keep]).train()
    assert len(rates) == 5 and rates[0] < rates[1] < rates[2] == rates[-1] == 1e-2
    with pytest.raises(ConfigError, match=r"warmup_steps is 2, and must be less than the 2 steps in which the policy"):
        make_trainer(num_steps=8, critic={"warmup_steps": 6}, optim={"warmup_steps": 2})


def test_settings_of_a_critic() -> None:
    with pytest.raises(ConfigError, match="rank is 4, and must stay 16 with form head"):
        CriticSettings(form="head", rank=4)
    assert PPOConfig(kl=KLSettings(coef=0.2)).kl.placement == "reward"
    assert PPOConfig(kl={"coef": 0.2, "placement": "loss"}).kl.placement == "loss"


def test_the_saved_adapter_is_the_policy_s_alone(make_trainer: Make) -> None:
    path = make_trainer(num_steps=1).train().model_path
    assert sorted(each.name for each in path.iterdir() if each.is_dir()) == []
    assert (path / "adapter_model.safetensors").is_file()


def test_all_weights_can_train_with_a_critic_of_its_own(make_trainer: Make) -> None:
    metrics = make_trainer(lora=None, critic={"form": "model"}).train().metrics
    assert metrics["rollout_gap"] < 1e-5
    with pytest.raises(ConfigError, match=r"critic\.form is lora, which shares the frozen base .* use critic"):
        make_trainer(lora=None, folder="other")
    new = {"architecture": {"hidden_size": 8}, "tokenizer": {"vocab_size": 300}}
    with pytest.raises(ConfigError, match=r"trainer\.critic\.form is 'lora', and must be model for a new model"):
        RunConfig(
            model=new, data={"task": "products"}, rewards=[{"name": "length"}],
            trainer={"type": "ppo"},
        )


def test_a_mixture_of_experts(make_trainer: Make) -> None:
    """The critic leaves the policy's routers alone, also what they count."""
    trainer = make_trainer(architecture=SPARSE | {"router_aux_loss_coef": 0.01})
    counted: list[Any] = []
    update = trainer.algorithm.critic_learner.update

    def watched(*args: Any) -> Any:
        from alignlab.models.moe import expert_counts

        result = update(*args)
        counted.append(int(expert_counts(trainer.learner.model).sum()))
        return result

    trainer.algorithm.critic_learner.update = watched  # type: ignore[method-assign]
    trainer.train()
    assert counted == [0] * 4


@pytest.mark.parametrize(("form", "lora"), [("lora", LoraSettings(rank=8)), ("model", None)])
def test_training_learns_a_trivial_task(form: str, lora: Any, make_trainer: Make) -> None:
    rewards: list[float] = []
    make_trainer(
        num_steps=40, num_prompts=16, optim={"learning_rate": 2e-2}, critic={"form": form, "learning_rate": 1e-2},
        lora=lora, architecture=DENSE | {"initializer_range": 0.2}, kl={"coef": 0.01},
        callbacks=[lambda trainer, step, metrics: rewards.append(metrics["reward"])],
    ).train()
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def by_prompt(*, prompts: list[str], **_: Any) -> list[float]:
    return [int(prompt[-1]) / 4 for prompt in prompts]


@pytest.mark.parametrize("form", ["lora", "head", "model"])
def test_the_critic_learns_what_the_prompt_is_worth(form: str, make_trainer: Make) -> None:
    explained: list[float] = []
    make_trainer(
        num_steps=60, num_prompts=16, reward=by_prompt, kl={"coef": 0.0}, gae_lambda=1.0, num_epochs=2,
        critic={"form": form, "learning_rate": 1e-2, "warmup_steps": 59, "value_clip": None},
        architecture=DENSE | {"initializer_range": 0.2},
        callbacks=[lambda trainer, step, metrics: explained.append(metrics["explained_variance"])],
    ).train()
    assert explained[0] == pytest.approx(0.0, abs=1e-6)
    assert max(explained[-5:]) > (0.1 if form == "head" else 0.8)  # a random base says little to a linear head
