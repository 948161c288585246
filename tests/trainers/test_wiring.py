"""That a run uses what it computes: signs, adapters off, temperature, schedule, routers, and steps without a token."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.model import LoraSettings
from alignlab.config.trainers import MemorySettings, SFTConfig
from alignlab.data.examples import Example
from alignlab.data.sampler import IndexSampler
from alignlab.errors import ConfigError
from alignlab.loop.optim import learning_rate_factor
from alignlab.models.adapters import adapters_disabled
from alignlab.models.moe import routers
from alignlab.models.policy import Policy
from alignlab.trainers import sft
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.sft import SFTTrainer
from tests.trainers.conftest import SPARSE, even_ids
from tests.trainers.steps import minibatches_of

Make = Callable[..., Any]
DROPPING = SPARSE | {"attention_dropout": 0.2}
BIASED = SPARSE | {"router_bias_update_rate": 0.05, "router_aux_loss_coef": 0.5}


def same(**given: Any) -> list[float]:
    """No advantage for anybody: what moves the policy is the rest of the loss."""
    return [0.5] * len(given["completions"])


def sharpen(model: torch.nn.Module, factor: float = 30.0) -> None:
    """A random head's logits are so small that nothing could be seen to move."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)  # type: ignore[operator]


def series(name: str, found: list[float]) -> Callable[..., None]:
    return lambda _, __, metrics: found.append(metrics[name])


@pytest.mark.parametrize(
    "kl", [{"placement": "loss", "estimator": "k3"}, {"placement": "loss"}, {"placement": "reward"}], ids=str
)
def test_the_kl_is_priced_and_not_paid(
    kl: dict[str, Any], make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    """Without other rewards, a policy that was moved away returns to its reference."""
    found: list[float] = []
    config = make_config(
        num_steps=40, num_prompts=4, group_size=8, optim={"learning_rate": 3e-3}, advantage="group_centered",
        kl={"coef": 1.0, **kl},
    )
    model = make_model()
    sharpen(model, 10)
    trainer = GRPOTrainer(model, same, config, rows, tokenizer=tokenizer, callbacks=[series("kl", found)])
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.learner.trained.values():
            weight.add_(0.05 * torch.randn_like(weight))
    trainer.source.engine.update_weights(1)
    trainer.train()
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_the_price_of_kl_sums_over_packs(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    """A completion's KL is the same wherever the batch is cut."""
    config = make_config(kl={"coef": 1.0, "placement": "reward"}, advantage="group_centered")
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.learner.trained.values():
            weight.add_(0.05 * torch.randn_like(weight))
    trainer.source.engine.update_weights(1)
    rollouts = trainer.source.collect(1).rollouts
    found = []
    for budget in (4096, 16, 1):
        trainer.algorithm.config = config.model_copy(update={"memory": MemorySettings(tokens_per_microbatch=budget)})
        [packs] = minibatches_of(trainer, 1, rollouts)
        found.append((len(packs), trainer.algorithm.advantages(rollouts, [packs])))
    assert len({count for count, _ in found}) == 3
    for _, advantages in found[1:]:
        torch.testing.assert_close(advantages, found[0][1], atol=1e-5, rtol=0)
    rewards = torch.tensor([r.rewards for r in rollouts])
    assert (found[0][1] - (rewards - rewards.mean(dim=1, keepdim=True))).abs().max() > 0.01


def test_entropy_is_a_bonus(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    found: list[float] = []
    config = make_config(num_steps=15, optim={"learning_rate": 3e-3}, entropy_coef=1.0)
    model = make_model()
    sharpen(model)
    GRPOTrainer(model, same, config, rows, tokenizer=tokenizer, callbacks=[series("entropy", found)]).train()
    assert found[-1] > found[0] + 0.3


def test_the_reference_of_an_adapter_is_its_base(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(num_steps=3, optim={"learning_rate": 0.1}, kl={"coef": 0.1})
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, peft_config=LoraSettings(rank=4))
    trainer.train()
    [[pack]] = minibatches_of(trainer, 9, trainer.source.collect(9).rollouts)
    base = Policy(make_model())(pack.tokens, pack.segments, pack.completion_mask).logprobs
    assert pack.ref_logprobs is not None
    torch.testing.assert_close(pack.ref_logprobs, base.detach(), atol=1e-6, rtol=0)
    own = trainer.learner.logprobs([pack])[0]
    assert (own - base).abs().max() > 1e-3


def test_what_a_user_froze_stays_frozen(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    config = make_config(num_steps=2, kl={"coef": 0.1})
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, peft_config=LoraSettings(rank=4))
    for name, parameter in trainer.learner.module.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = set(trainer.learner.trained)
    with adapters_disabled(trainer.learner.module.model):
        pass
    assert set(trainer.learner.trained) == before


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_the_trainer_scores_at_the_temperature_of_the_rollouts(
    temperature: float, make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(num_steps=1, sampling={"max_new_tokens": 6, "temperature": temperature})
    model = make_model()
    sharpen(model)
    assert GRPOTrainer(model, even_ids, config, rows, tokenizer=tokenizer).train().metrics["rollout_gap"] < 2e-5


def test_scores_are_without_dropout(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    lora = LoraSettings(rank=4, dropout=0.5)
    trainer = GRPOTrainer(make_model(), even_ids, make_config(num_steps=2), rows, tokenizer=tokenizer, peft_config=lora)
    trainer.train()
    [[pack]] = minibatches_of(trainer, 9, trainer.source.collect(9).rollouts)
    trainer.learner.module.train()
    assert torch.equal(trainer.learner.logprobs([pack])[0], trainer.learner.logprobs([pack])[0])
    assert trainer.learner.module.training


def test_random_numbers_go_on_where_they_stood(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    """Dropout draws from the global generator."""

    def make(folder: str, steps: int) -> GRPOTrainer:
        base = make_config()
        config = make_config(output_dir=base.output_dir / folder, num_steps=steps)
        lora = LoraSettings(rank=4, dropout=0.3)
        return GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, peft_config=lora)

    whole = make("whole", 4)
    whole.train()
    make("cut", 2).train()
    torch.manual_seed(99)
    resumed = make("cut", 4)
    torch.rand(7)
    resumed.train(resume=True)
    for name, value in whole.learner.trained.items():
        assert torch.equal(value, resumed.learner.trained[name]), name


def test_the_learning_rate_follows_its_schedule(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    found: list[float] = []
    config = make_config(num_steps=5, optim={"schedule": "cosine", "warmup_steps": 2})
    keep = [series("learning_rate", found)]
    GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, callbacks=keep).train()
    expected = [1e-2 * learning_rate_factor(i, schedule="cosine", warmup=2, total=5) for i in range(5)]
    assert found == pytest.approx(expected)
    assert len(set(found)) == 5


def test_routers_are_balanced_as_they_train(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    trainer = GRPOTrainer(make_model(BIASED), even_ids, make_config(num_steps=3), rows, tokenizer=tokenizer)
    metrics = trainer.train().metrics
    [router] = routers(trainer.learner.module.model)
    assert router.e_score_correction_bias is not None
    assert router.e_score_correction_bias.abs().max() > 0.04
    loads = [metrics[f"expert_load/{i}"] for i in range(4)]
    torch.testing.assert_close(router.expert_load, torch.tensor(loads))
    assert metrics["router_loss"] > 0.4


def test_router_losses_reach_the_gradient(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    """Without an advantage nothing else does."""

    def moved(architecture: dict[str, Any]) -> Tensor:
        model = make_model(architecture)
        before = routers(model)[0].weight.detach().clone()
        base = make_config(num_steps=1)
        config = base.model_copy(update={"output_dir": base.output_dir / str(len(architecture))})
        GRPOTrainer(model, same, config, rows, tokenizer=tokenizer).train()
        return (routers(model)[0].weight - before).abs().max()

    assert moved(SPARSE | {"router_aux_loss_coef": 0.5}) > 1e-3
    assert moved(SPARSE) < 1e-6


def test_adapter_training_leaves_router_biases_unchanged(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    """They are the base's: the saved adapter and the reference would not be what was trained."""
    lora = LoraSettings(rank=2)
    trainer = GRPOTrainer(
        make_model(BIASED), even_ids, make_config(num_steps=2), rows, tokenizer=tokenizer, peft_config=lora
    )
    trainer.train()
    [router] = routers(trainer.learner.module.model)
    assert router.e_score_correction_bias is not None
    assert router.e_score_correction_bias.abs().max() == 0
    assert (router.expert_load - 0.25).abs().max() > 1e-3


def test_the_rollouts_experts_are_replayed(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    trainer = GRPOTrainer(make_model(SPARSE), even_ids, make_config(), rows, tokenizer=tokenizer)
    [[pack]] = minibatches_of(trainer, 1, trainer.source.collect(1).rollouts)
    assert pack.routing is not None
    other = replace(pack, routing=torch.where(pack.routing >= 0, (pack.routing + 1) % 4, pack.routing))
    own, replayed = trainer.learner.logprobs([replace(pack, routing=None), pack])
    torch.testing.assert_close(own, replayed, atol=1e-6, rtol=0)
    assert (trainer.learner.logprobs([other])[0] - own).abs().max() > 1e-5


def test_the_trainers_own_experts_are_replayed_in_later_updates(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    """R2: chosen once, before the first update, whatever the engine chose."""
    config = make_config(routing_replay="trainer", num_minibatches=2, optim={"learning_rate": 0.5})
    trainer = GRPOTrainer(make_model(SPARSE), even_ids, config, rows, tokenizer=tokenizer)
    rollouts = trainer.source.collect(1).rollouts
    wrong = [
        replace(rollout, completions=tuple(replace(c, routing=1 - c.routing % 2) for c in rollout.completions))
        for rollout in rollouts
    ]
    minibatches = minibatches_of(trainer, 1, wrong)
    packs = [pack for packs in minibatches for pack in packs]
    for pack, output in zip(packs, trainer.learner.outputs([replace(p, routing=None) for p in packs]), strict=True):
        assert pack.routing is not None and torch.equal(pack.routing, output.routing)
        torch.testing.assert_close(pack.old_logprobs, output.logprobs)
    for minibatch in minibatches:
        trainer.learner.update(minibatch, trainer.algorithm.loss, trainer.algorithm.loss_weights)
    for pack, output in zip(packs, trainer.learner.outputs(packs), strict=True):
        assert torch.equal(pack.routing, output.routing)
        assert output.routing_disagreement is not None and output.routing_disagreement.mean() > 0.05
    free = trainer.learner.outputs([replace(pack, routing=None) for pack in packs])
    assert any(not torch.equal(pack.routing, output.routing) for pack, output in zip(packs, free, strict=True))


def test_routing_is_not_replayed_when_replay_is_off(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(routing_replay="none")
    trainer = GRPOTrainer(make_model(SPARSE), even_ids, config, rows, tokenizer=tokenizer)
    [[pack]] = minibatches_of(trainer, 1, trainer.source.collect(1).rollouts)
    assert pack.routing is None
    assert "routing_disagreement" not in trainer.train().metrics
    with pytest.raises(ConfigError, match="routing_replay is none, and PolicyForCausalLM has no experts"):
        GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)


def test_step_without_a_reward_changes_no_weight(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    """An optimizer step would change them by momentum and weight decay."""
    seen: list[dict[str, Tensor]] = []
    calls: list[int] = []

    def at_first(**given: Any) -> list[float | None]:
        calls.append(1)
        return list(even_ids(**given)) if len(calls) <= 2 else [None] * len(given["completions"])

    def keep(trainer: GRPOTrainer, step: int, metrics: Any) -> None:
        seen.append({name: p.detach().clone() for name, p in trainer.learner.trained.items()})

    config = make_config(num_steps=4, optim={"weight_decay": 0.1})
    trainer = GRPOTrainer(make_model(), at_first, config, rows, tokenizer=tokenizer, callbacks=[keep])
    assert trainer.train().metrics["empty_updates"] == 2
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert all(torch.equal(seen[1][name], seen[3][name]) for name in seen[0])
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward"] is None for line in lines] == [False, False, True, True]


def test_resuming_a_finished_run_writes_no_line_twice(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(num_steps=2)

    def exactly(**given: Any) -> list[float]:
        return [float(len(ids) > 3) for ids in given["completion_ids"]]

    for resume in (False, True):
        trainer = GRPOTrainer(make_model(), exactly, config, rows, eval_dataset=rows[:2], tokenizer=tokenizer)
        trainer.train(resume=resume)
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2]


def test_signal_in_the_last_step_is_in_the_result(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    def interrupt(_: Any, step: int, __: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = make_config(num_steps=2)
    result = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, callbacks=[interrupt]).train()
    assert result.signal == "SIGTERM"
    assert not result.interrupted


def test_ranks_share_out_the_examples(
    make_model: Make, tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [Example((1, 2 + i), (False, True)) for i in range(8)]
    taken: list[list[int]] = []

    class Stop(Exception):
        pass

    def keep(chosen: list[Example], **_: Any) -> None:
        taken.append([example.token_ids[1] - 2 for example in chosen])
        raise Stop

    monkeypatch.setattr(sft, "pack_examples", keep)
    for rank in (0, 1):
        config = SFTConfig(output_dir=tmp_path, num_sequences=6, trackers=())
        trainer = SFTTrainer(make_model(), config, examples, tokenizer=tokenizer)
        trainer.ranks.index, trainer.ranks.count = rank, 2
        with pytest.raises(Stop):
            trainer.train_step(1)
    assert len(taken[0]) == len(taken[1]) == 3
    assert sorted(taken[0] + taken[1]) == sorted(IndexSampler(8, 6, 0).next())


def test_experts_of_an_adapter_train_and_generate(
    make_model: Make, make_config: Make, rows: Any, tokenizer: Any
) -> None:
    """Rollouts come from the merged experts: the engine's log-probs are the trainer's in the second step too."""
    lora = LoraSettings(rank=4, experts=True)
    gaps: list[float] = []
    trainer = GRPOTrainer(
        make_model(DROPPING), even_ids, make_config(num_steps=2, optim={"learning_rate": 1e-2}), rows,
        tokenizer=tokenizer,
        peft_config=lora, callbacks=[series("rollout_gap", gaps)],
    )
    before = {name: p.detach().clone() for name, p in trainer.learner.trained.items() if ".experts." in name}
    trainer.train()
    moved = [name for name, p in trainer.learner.trained.items() if name in before and not torch.equal(p, before[name])]
    assert len(before) == 4 and moved
    assert len(gaps) == 2 and max(gaps) < 1e-4


def test_dropout_of_the_model_is_off_before_anything_is_generated(
    make_model: Make, make_config: Make, rows: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = GRPOTrainer(make_model(DROPPING), even_ids, make_config(num_steps=1), rows, tokenizer=tokenizer)
    assert "dropout of the model is switched off (attention_dropout 0.2)" in caplog.text
    assert all(getattr(module, "attention_dropout", 0) == 0 for module in trainer.learner.model.modules())
