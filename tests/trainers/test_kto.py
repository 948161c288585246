"""KTO: loss, reference point and gradient by plain forward passes, however the step is cut; learning; resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.model import LoraSettings
from alignlab.config.run import RunConfig
from alignlab.config.trainers import KTOConfig
from alignlab.data.unpaired import UnpairedPreference
from alignlab.errors import CheckpointError, ConfigError, DataError
from alignlab.loop.reference import ExampleReference
from alignlab.trainers.kto import KTOTrainer
from tests.settings import merged
from tests.trainers.conftest import leave_base
from tests.trainers.steps import packs_of, update_on
from tests.trainers.test_dpo import LORA, logprob
from tests.trainers.tiny import labelled

Make = Callable[..., Any]


@pytest.fixture
def make_trainer(
    make_model: Make, tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., KTOTrainer]:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def make(
        *, data: Any = None, held_out: Any = None, lora: Any = LORA, folder: str = "run", callbacks: Any = (),
        seed: int = 0, **changes: Any,
    ) -> KTOTrainer:
        base: dict[str, Any] = {
            "output_dir": tmp_path / folder, "num_steps": 4, "num_sequences": 6,
            "optim": {"learning_rate": 1e-2}, "trackers": (),
        }
        return KTOTrainer(
            make_model(seed=seed), KTOConfig(**merged(base, changes)), data or labelled(12), eval_dataset=held_out,
            tokenizer=tokenizer, peft_config=lora, callbacks=callbacks,
        )

    return make


def gradients(trainer: KTOTrainer, rows: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradient of an update that is not made."""
    found: dict[str, Tensor] = {}
    trainer.learner.module.zero_grad()
    step, trainer.learner._step = trainer.learner._step, lambda *_: (
        found.update({n: p.grad.clone() for n, p in trainer.learner.trained.items()}), {}
    )[1]
    metrics = update_on(trainer, packs_of(trainer, rows))
    trainer.learner._step = step
    return metrics, found


def log_ratio(model: Any, prompt: Any, completion: Any) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = logprob(model, prompt, completion).sum()
    return logprob(model, prompt, completion).sum() - reference


@pytest.mark.parametrize("budget", [10, 30, 4096])
def test_loss_and_gradient_are_those_of_plain_forward_passes(budget: int, make_trainer: Make) -> None:
    trainer = make_trainer(
        memory={"tokens_per_microbatch": budget}, precompute_reference=False, beta=0.3, desirable_weight=0.7,
        undesirable_weight=1.3
    )
    leave_base(trainer)
    data, model = trainer.train_examples[:6], trainer.learner.model
    with torch.no_grad():
        point = torch.stack([log_ratio(model, x.prompt, x.mismatched) for x in data]).mean().clamp(min=0)
    trainer.learner.module.zero_grad()
    total, rewards = torch.zeros(()), {True: [], False: []}
    for x in data:
        lead = 0.3 * (log_ratio(model, x.prompt, x.completion) - point)
        own = 0.7 * (1 - torch.sigmoid(lead)) if x.desirable else 1.3 * (1 - torch.sigmoid(-lead))
        total = total + own / 6
        rewards[x.desirable].append(float(lead.detach() + 0.3 * point))
    total.backward()
    expected = {n: p.grad.clone() for n, p in trainer.learner.trained.items()}
    metrics, found = gradients(trainer, range(6))
    assert float(point) > 0.01, "or nothing is shown"
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert metrics["reference_point"] == pytest.approx(float(point), rel=1e-4)
    assert metrics["desirable_reward"] * 6 == pytest.approx(sum(rewards[True]), rel=1e-3)
    assert metrics["undesirable_reward"] * 6 == pytest.approx(sum(rewards[False]), rel=1e-3)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_the_reference_point_is_of_all_ranks(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(precompute_reference=False)
    leave_base(trainer)
    packs_of(trainer, range(6))
    whole, told = float(trainer.algorithm.reference_point), []
    monkeypatch.setattr(trainer.algorithm.ranks, "sum", lambda value: told.append(value) or value)
    packs_of(trainer, [4, 5])  # what the other rank tells
    assert float(trainer.algorithm.reference_point) != pytest.approx(whole, rel=1e-3)
    monkeypatch.setattr(trainer.algorithm.ranks, "sum", lambda value: value + told[0])
    packs_of(trainer, [0, 1, 2, 3])
    assert float(trainer.algorithm.reference_point) == pytest.approx(whole, rel=1e-4) and whole > 0


def test_rewards_are_means_over_their_own_kind(make_trainer: Make) -> None:
    trainer = make_trainer(precompute_reference=False, num_sequences=12)
    leave_base(trainer)
    data, model = trainer.train_examples, trainer.learner.model
    expected = {
        kind: sum(0.1 * log_ratio(model, x.prompt, x.completion).item() for x in data if x.desirable == kind) / count
        for kind, count in ((True, 8), (False, 4))
    }
    metrics = trainer.train_step(1)
    assert metrics["desirable_frac"] == pytest.approx(8 / 12)
    assert metrics["desirable_reward"] == pytest.approx(expected[True], rel=1e-3)
    assert metrics["undesirable_reward"] == pytest.approx(expected[False], rel=1e-3)
    assert metrics["margin"] == pytest.approx(expected[True] - expected[False], rel=1e-3)


def test_step_of_one_label_has_metrics_of_that_label_alone(make_trainer: Make) -> None:
    data = [UnpairedPreference(x.prompt, x.completion, i > 0) for i, x in enumerate(labelled(12))]
    trainer = make_trainer(data=data, num_sequences=1)
    trainer.sampler.next = lambda: [3]
    metrics = trainer.train_step(1)
    assert "desirable_reward" in metrics and not {"undesirable_reward", "margin"} & set(metrics)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "copy"])
def test_initial_loss_is_half_the_weight(lora: Any, make_trainer: Make) -> None:
    seen: list[Any] = []
    make_trainer(lora=lora, num_steps=2, callbacks=[lambda t, s, m: seen.append(dict(m))]).train()
    assert seen[0]["loss"] == pytest.approx(0.5, rel=1e-5) and seen[1]["loss"] != seen[0]["loss"]
    assert seen[0]["reference_point"] == pytest.approx(0, abs=1e-5)


def test_equal_policies_have_accuracy_half_and_margin_0(make_trainer: Make) -> None:
    before = make_trainer(held_out=labelled(7, seed=1), num_steps=1, precompute_reference=False).train().before
    assert (before.accuracy, before.margin, before.num_completions) == (0.5, 0.0, 7)


def test_held_out_numbers_do_not_depend_on_the_cut(make_trainer: Make) -> None:
    found = []
    for budget in (10, 4096):
        trainer = make_trainer(held_out=labelled(7, seed=1), memory={"tokens_per_microbatch": budget})
        leave_base(trainer)
        found.append(trainer.evaluate())
    one, other = found
    assert one.accuracy == other.accuracy
    assert (one.margin, one.loss) == pytest.approx((other.margin, other.loss), rel=1e-4)
    model, data = trainer.learner.model, trainer.eval_examples
    with torch.no_grad():
        point = max(0.0, sum(float(log_ratio(model, x.prompt, x.mismatched)) for x in data) / 7)
        agreed = [(float(log_ratio(model, x.prompt, x.completion)) > point) == x.desirable for x in data]
    assert one.accuracy == pytest.approx(sum(agreed) / 7)


def test_cached_reference_is_computed_once_and_equals_the_live_reference(
    make_trainer: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = labelled(5, seed=1)
    first = make_trainer(held_out=held_out)
    first.train()
    assert len(list((tmp_path / "cache" / "reference").glob("*.safetensors"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(ExampleReference, "_compute", lambda *_: pytest.fail("computed again"))
        second = make_trainer(held_out=held_out, folder="second")
        second.train()
    live = make_trainer(folder="live", precompute_reference=False)
    live.train()
    for name, value in first.learner.trained.items():
        assert torch.equal(value, second.learner.trained[name]), name
        torch.testing.assert_close(value, live.learner.trained[name], rtol=1e-3, atol=1e-4)


def test_resumption_with_another_reference_is_refused(make_trainer: Make) -> None:
    make_trainer(lora=None, num_steps=1).train()
    with pytest.raises(CheckpointError, match="the reference has other weights than when the run began"):
        make_trainer(lora=None, num_steps=2, seed=1).train(resume=True)


def test_training_learns_which_completions_are_good(make_trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Good ones begin with one token, bad ones with another: held-out labels are agreed with afterwards."""

    def marked(each: UnpairedPreference) -> UnpairedPreference:
        return replace(each, completion=(8 if each.desirable else 9, *each.completion[1:]))

    train, held_out = ([marked(each) for each in labelled(count, seed)] for count, seed in ((240, 2), (60, 3)))
    trainer = make_trainer(
        data=train, held_out=held_out, lora=None, num_steps=30, num_sequences=32, optim={"learning_rate": 3e-3},
        undesirable_weight=2.0,
    )
    result = trainer.train()
    assert result.before.accuracy == 0.5, "also where the reference was scored in other packs"
    assert result.after.accuracy > 0.9 and result.after.margin > 0.3 and result.after.loss < result.before.loss
    assert "label agreed with" in "".join(capsys.readouterr())


def test_rows_and_pairs_are_read(make_trainer: Make) -> None:
    rows = [{"prompt": "ab", "completion": " 1", "label": True}, {"prompt": "b", "chosen": " 2", "rejected": " 3"}]
    assert [x.desirable for x in make_trainer(data=rows).train_examples] == [True, True, False]
    with pytest.raises(DataError, match=r"row 0 .*has no column 'label'"):
        make_trainer(data=[{"prompt": "ab", "completion": " 1"}])
    with pytest.raises(DataError, match="all 3 are true"):
        make_trainer(data=[replace(x, desirable=True) for x in labelled(3)])
    one_label = [replace(x, desirable=True) for x in labelled(3)]
    for held_out in (one_label, [{"prompt": "ab", "completion": " 1", "label": 0}]):
        with pytest.raises(DataError, match=r"eval_dataset: .*labels must be of both kinds, and all [13] are"):
            make_trainer(held_out=held_out)


def test_run_from_a_file_refuses_rewards_and_evaluation() -> None:
    base: dict[str, Any] = {"model": {"name": "x"}, "data": {"task": "products"}, "trainer": {"type": "kto"}}
    assert RunConfig(**base).trainer == KTOConfig()
    with pytest.raises(ConfigError, match="must be empty for trainer kto, which reads none"):
        RunConfig(**base, rewards=[{"name": "length"}])
    with pytest.raises(ConfigError, match="the metric is how often labels are agreed with"):
        RunConfig(**base, evaluation={"num_samples": 2})


def test_reference_does_not_depend_on_the_adapter_rank(make_trainer: Make) -> None:
    one, other = make_trainer(), make_trainer(lora=LoraSettings(rank=2), folder="other")
    for trainer in (one, other):
        trainer.algorithm.reference.precompute({"train": trainer.train_examples})
    packs = [packs_of(trainer, range(4)) for trainer in (one, other)]
    for a, b in zip(*packs, strict=True):
        assert torch.equal(a.ref_logprobs, b.ref_logprobs)
