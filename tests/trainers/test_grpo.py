"""GRPO as a user runs it: it learns, resumes exactly, survives interruption, and says what it did."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.data import RenderSettings
from alignlab.config.model import LoraSettings
from alignlab.data.sampler import IndexSampler
from alignlab.errors import CheckpointError, ConfigError, RewardError
from alignlab.loop.inputs import check_shares
from alignlab.runs.rollout_store import read_rollouts
from alignlab.trainers.grpo import GRPOTrainer
from tests.trainers.conftest import SPARSE, even_ids
from tests.trainers.steps import minibatches_of

Make = Callable[..., Any]


def trained(trainer: GRPOTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.learner.trained.items()}


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["full", "lora"])
def test_learns_a_trivial_task(lora: Any, make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    rewards: list[float] = []
    config = make_config(num_steps=30, group_size=16, optim={"learning_rate": 3e-2 if lora else 1e-2})
    model = make_model()
    with torch.no_grad():  # a random head's logits are so small that an adapter under it could not move them
        model.get_output_embeddings().weight.mul_(20)
    trainer = GRPOTrainer(
        model,
        even_ids,
        config,
        rows,
        tokenizer=tokenizer,
        peft_config=lora,
        callbacks=[lambda _, __, metrics: rewards.append(metrics["reward"])],
    )
    trainer.train()
    assert sum(rewards[:3]) / 3 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.85


def test_first_update_is_on_policy(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    """Same weights, same numbers: ratio 1, no KL, and the engine's log-probs are the trainer's."""
    config = make_config(num_steps=1, num_epochs=1, kl={"coef": 0.1, "placement": "reward"})
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    metrics = trainer.train().metrics
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["kl"] == pytest.approx(0, abs=1e-7)
    assert metrics["rollout_gap"] < 1e-5
    assert metrics["clip_frac"] == 0
    assert metrics["grad_norm"] > 1e-3


def test_rollout_gap_excludes_the_change_of_the_policy(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(num_steps=1, num_epochs=4, optim={"learning_rate": 3e-2})
    metrics = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer).train().metrics
    assert metrics["approx_kl"] > 1e-3
    assert metrics["rollout_gap"] < 1e-5


@pytest.mark.parametrize("options", [{}, {"num_minibatches": 2, "num_epochs": 2, "kl": {"coef": 0.1, "target": 0.01}}])
@pytest.mark.parametrize("architecture", [None, SPARSE], ids=["lora", "moe"])
def test_resumed_run_equals_uninterrupted_run(
    options: dict[str, Any],
    architecture: Any,
    make_model: Make,
    make_config: Make,
    tokenizer: Any,
    rows: Any,
    tmp_path: Path,
) -> None:
    lora = None if architecture else LoraSettings(rank=4)

    def trainer(folder: str, **changes: Any) -> GRPOTrainer:
        config = make_config(
            output_dir=tmp_path / folder, num_steps=4, optim={"schedule": "linear"}, **options, **changes
        )
        model = make_model(architecture) if architecture else make_model()
        return GRPOTrainer(model, even_ids, config, rows, tokenizer=tokenizer, peft_config=lora)

    whole = trainer("whole")
    whole.train()

    class Stop(Exception):
        pass

    def crash(_: Any, step: int, __: Any) -> None:
        if step == 3:
            raise Stop

    first = trainer("cut", checkpoints={"every_steps": 2})
    first.callbacks = (crash,)
    with pytest.raises(Stop):
        first.train()
    second = trainer("cut", checkpoints={"every_steps": 2})
    assert second.train(resume=True).num_steps == 4
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(second)[name]), name
    tables = [read_rollouts(tmp_path / folder / "rollouts") for folder in ("whole", "cut")]
    assert tables[0]["token_ids"].to_pylist() == tables[1]["token_ids"].to_pylist()


def test_signal_saves_and_resume_goes_on(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    def interrupt(_: Any, step: int, __: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = make_config(num_steps=3)
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, callbacks=[interrupt])
    result = trainer.train()
    assert result.interrupted
    assert result.num_steps == 2
    with pytest.raises(ConfigError, match="--resume"):
        GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer).train()
    again = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer).train(resume=True)
    assert not again.interrupted
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_resume_with_other_weights_is_refused(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    config = make_config(num_steps=1)
    GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer).train()
    other = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, peft_config=LoraSettings(rank=2))
    with pytest.raises(CheckpointError, match="train different parameters"):
        other.train(resume=True)


def test_resume_with_other_prompts_is_refused(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    config = make_config(num_steps=1)
    GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer).train()
    other = GRPOTrainer(make_model(), even_ids, config, [*rows[1:], rows[0]], tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="the training data has changed"):
        other.train(resume=True)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["full", "lora"])
def test_resume_with_another_starting_policy_is_refused(
    lora: Any, make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    """The start is the reference, or an adapter's base; neither is in a checkpoint."""

    def train(seed: int, num_steps: int, resume: bool) -> None:
        config = make_config(num_steps=num_steps, kl={"coef": 0.1})
        trainer = GRPOTrainer(make_model(seed=seed), even_ids, config, rows, tokenizer=tokenizer, peft_config=lora)
        trainer.train(resume=resume)

    train(0, 1, resume=False)
    with pytest.raises(CheckpointError, match="was started with"):
        train(1, 2, resume=True)
    train(0, 2, resume=True)


def test_the_same_trainer_goes_on_after_an_interruption(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    def interrupt(_: Any, step: int, __: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = make_config(num_steps=3, output_dir=make_config().output_dir / "cut")
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, callbacks=[interrupt])
    assert trainer.train().interrupted
    assert trainer.train(resume=True).num_steps == 3
    whole = GRPOTrainer(make_model(), even_ids, make_config(num_steps=3), rows, tokenizer=tokenizer)
    whole.train()
    assert all(torch.equal(value, trained(whole)[name]) for name, value in trained(trainer).items())


def test_dynamic_sampling_refills_with_groups_with_signal(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    """Rows 0-3 always score the same: their groups are dropped for others."""

    def flat_for_some(*, completion_ids: list[list[int]], flat: list[bool], **_: Any) -> list[float]:
        return [0.5 if same else float(ids[0]) for ids, same in zip(completion_ids, flat, strict=True)]

    data = [row | {"flat": i < 4} for i, row in enumerate(rows)]
    config = make_config(num_steps=2, dynamic_sampling=True, max_refills=4)
    trainer = GRPOTrainer(make_model(), flat_for_some, config, data, tokenizer=tokenizer)
    for step in (1, 2):
        batch = trainer.source.collect(step)
        kept, dropped = batch.rollouts, batch.dropped
        assert len(kept) == config.num_prompts
        assert all(len(set(rollout.rewards)) > 1 for rollout in kept)
        assert (len(kept) + len(dropped)) % config.num_prompts == 0


def test_what_dynamic_sampling_leaves_out_is_measured_and_stored(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    """Accuracy over the groups that were kept would be about a half, whatever the policy can do."""
    mixed = f"ab{IndexSampler(len(rows), 1, seed=0).take(3)[-1]}"

    def mostly_right(*, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[0] % 2) if p == mixed else 1.0 for p, ids in zip(prompts, completion_ids, strict=True)]

    config = make_config(num_steps=1, num_prompts=1, group_size=8, dynamic_sampling=True, max_refills=7)
    trainer = GRPOTrainer(make_model(), mostly_right, config, rows, tokenizer=tokenizer)
    metrics = trainer.train().metrics
    table = read_rollouts(config.output_dir / "rollouts").to_pylist()
    assert len(table) == 3 * 8
    assert metrics["mixed_groups"] == pytest.approx(1 / 3)
    assert metrics["accuracy"] == pytest.approx(sum(row["reward"] for row in table) / len(table))
    assert {row["prompt"] for row in table if row["advantage"] is not None} == {mixed}


def test_mini_batches_are_equal_on_every_rank() -> None:
    check_shares("num_prompts", 12, 2, 3)
    with pytest.raises(ConfigError, match=r"num_prompts is 8, and .* ranks \(4\) x num_minibatches \(4\) = 16; use 16"):
        check_shares("num_prompts", 8, 4, 4)


def test_completions_without_signal_are_masked(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    def some(*, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if i % 4 == 0 else float(i) for i in range(len(completion_ids))]

    config = make_config(mask_truncated=True, num_minibatches=2)
    trainer = GRPOTrainer(make_model(), some, config, rows, tokenizer=tokenizer)
    rollouts = trainer.source.collect(1).rollouts
    packs = [pack for packs in minibatches_of(trainer, 1, rollouts) for pack in packs]
    trained_tokens = sum(
        len(c.token_ids) for r in rollouts for i, c in enumerate(r.completions) if i % 4 and c.finish_reason != "length"
    )
    assert sum(int(pack.completion_mask.sum()) for pack in packs) == trained_tokens
    assert all(pack.advantages is not None and not pack.advantages[~pack.completion_mask].any() for pack in packs)
    trainer.learner.update(packs, trainer.algorithm.loss, trainer.algorithm.loss_weights)


def test_overlong_completions_lose_reward(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    config = make_config(overlong_buffer_tokens=4, overlong_penalty=2.0, advantage="group_centered")
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    rollouts = trainer.source.collect(1).rollouts
    lengths = torch.tensor([[len(c.token_ids) for c in r.completions] for r in rollouts], dtype=torch.float32)
    rewards = torch.tensor([r.rewards for r in rollouts]) - (lengths - 2).clamp(min=0) / 4 * 2
    torch.testing.assert_close(trainer.algorithm.advantages(rollouts, []), rewards - rewards.mean(dim=1, keepdim=True))


def test_adaptive_kl_coefficient_moves(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    """Down while the policy is the reference, up once it has clearly left it."""
    coefs: list[float] = []
    kl = {"coef": 1e-3, "target": 1e-3, "horizon": 64}
    config = make_config(num_steps=12, group_size=16, num_prompts=4, optim={"learning_rate": 3e-2}, kl=kl)
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    keep = [lambda trainer, *_: coefs.append(trainer.algorithm.objective.kl_coef)]
    GRPOTrainer(model, even_ids, config, rows, tokenizer=tokenizer, callbacks=keep).train()
    assert coefs[0] == pytest.approx(0.8e-3)
    assert coefs[-1] > 1.2 * coefs[-3]


def test_measuring_kl_changes_nothing_else(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    seen: dict[int, float | None] = {}

    def keep(_: Any, step: int, metrics: Any) -> None:
        seen[step] = metrics.get("kl")

    def weights(name: str, **kl: Any) -> dict[str, Tensor]:
        base = make_config()
        config = make_config(output_dir=base.output_dir / name, kl=kl)
        trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, callbacks=[keep])
        trainer.train()
        return trained(trainer)

    without, measured = weights("without"), weights("measured", measure_every_steps=2)
    assert all(torch.equal(without[name], value) for name, value in measured.items())
    assert [step for step, value in seen.items() if value is not None] == [2, 4]
    assert seen[4] is not None
    assert seen[4] > 0


def test_truncated_sampling_is_named(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    GRPOTrainer(make_model(), even_ids, make_config(), rows, tokenizer=tokenizer)
    assert not caplog.records
    config = make_config(sampling={"max_new_tokens": 4, "top_p": 0.9, "min_p": 0.1})
    GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    assert "sampling.top_p, sampling.min_p changes the distribution" in caplog.text


def test_failing_rewards_stop_the_run_at_their_limit(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    def broken(**_: Any) -> list[float]:
        raise RuntimeError("no")

    config = make_config(num_steps=4, reward_limits={"max_failures": 1})
    trainer = GRPOTrainer(make_model(), [even_ids, broken], config, rows, tokenizer=tokenizer)
    with pytest.raises(RewardError, match="broken"):
        trainer.train()


def test_bfloat16_weights_are_sampled_from_and_trained(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    trainer = GRPOTrainer(make_model().bfloat16(), even_ids, make_config(num_steps=3), rows, tokenizer=tokenizer)
    result = trainer.train()
    assert result.num_steps == 3 and result.verdict.learnt
    assert {weight.dtype for weight in trainer.learner.trained.values()} == {torch.bfloat16}
    assert 0 < result.metrics["rollout_gap"] < 0.05


def test_adapter_loads_in_plain_peft(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from alignlab.models.hub.checkpoints import load_model, save_model

    base = tmp_path / "base"
    save_model(make_model(), base)
    tokenizer.save_pretrained(base)
    config = make_config(num_steps=2)
    model = load_model(str(base), dtype=torch.float32)
    trainer = GRPOTrainer(model, even_ids, config, rows, tokenizer=tokenizer, peft_config=LoraSettings(rank=4))
    result = trainer.train()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.model_path)
    ids = torch.tensor([[5, 9, 40, 77]])
    ours, theirs = trainer.learner.model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs, AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits, atol=1e-4)


def test_failing_reward_loses_no_step(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    """The steps before the failure are saved, and the resumed run equals one without failure."""
    failing = {"on": True}

    def sometimes(**given: Any) -> list[float]:
        calls.append(len(given["completions"]))
        if failing["on"] and len(calls) == 3:
            raise RuntimeError("service is down")
        return even_ids(**given)

    calls: list[int] = []
    base = make_config(num_steps=4, reward_limits={"max_failures": 0})
    cut = base.model_copy(update={"output_dir": base.output_dir / "cut"})
    with pytest.raises(RewardError, match="service is down"):
        GRPOTrainer(make_model(), sometimes, cut, rows, tokenizer=tokenizer).train()
    failing["on"] = False
    resumed = GRPOTrainer(make_model(), sometimes, cut, rows, tokenizer=tokenizer)
    assert resumed.train(resume=True).num_steps == 4
    whole = GRPOTrainer(make_model(), even_ids, base, rows, tokenizer=tokenizer)
    whole.train()
    assert all(torch.equal(value, trained(whole)[name]) for name, value in trained(resumed).items())


def test_prompts_that_do_not_fit_are_skipped_on_request(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = [*rows[:4], {"prompt": "abd123ba" * 20, "answer": "1"}]
    skip, config = RenderSettings(on_bad_row="skip"), make_config(num_steps=1, rollout={"cache_tokens": 32})
    make = partial(GRPOTrainer, make_model(), even_ids, config, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"must fit rollout\.cache_tokens \(32\); lower RenderSettings\.max_prompt"):
        make(data)
    trainer = make(data, eval_dataset=data[3:], render_settings=skip)
    assert [prompt.index for prompt in trainer.source.prompts] == [0, 1, 2, 3]
    assert [prompt.index for prompt in trainer.held_out.prompts] == [0]
    assert "skipped 1 of 5 prompts" in caplog.text and "skipped 1 of 2 evaluation prompts" in caplog.text
    assert trainer.train().num_steps == 1
    with pytest.raises(ConfigError, match=r"with the longest prompt .* lower RenderSettings\.max_prompt_tokens$"):
        make(data[4:] * 2, render_settings=skip)


def test_refused_start_leaves_the_folder_unused(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    config = make_config(trackers=("nonsense",))
    with pytest.raises(ConfigError, match="nonsense"):
        GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer).train()
    long = make_config(sampling={"max_new_tokens": 100_000})
    with pytest.raises(ConfigError, match=r"sampling\.max_new_tokens is 100000, and with the longest prompt"):
        GRPOTrainer(make_model(), even_ids, long, rows, tokenizer=tokenizer)
    GRPOTrainer(make_model(), even_ids, make_config(num_steps=1), rows, tokenizer=tokenizer).train()
