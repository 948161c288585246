"""The reward model's trainer: loss and gradient by plain forward passes, however pairs are cut; learning; resuming."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from alignlab.cli import main
from alignlab.config.data import RenderSettings
from alignlab.config.model import LoraSettings
from alignlab.config.trainers import RewardConfig
from alignlab.data.preferences import Preference, preferences_from_rows
from alignlab.errors import ConfigError, DataError
from alignlab.evaluation.results import evaluation_from_json
from alignlab.models.hub.checkpoints import load_model, save_model
from alignlab.models.hub.reward_checkpoints import load_reward_model
from alignlab.trainers.reward import RewardTrainer, reward_pairs
from tests.settings import merged
from tests.trainers.conftest import DENSE, SPARSE, leave_base
from tests.trainers.steps import packs_of, update_on
from tests.trainers.tiny import pairs

Make = Callable[..., Any]
LORA = LoraSettings(rank=4)


def with_labels(count: int, seed: int = 0) -> list[Preference]:
    labels = [{"margin": 0.25 * (i % 4), "probability": 1 - 0.1 * (i % 3)} for i in range(count)]
    return [replace(pair, **label) for pair, label in zip(pairs(count, seed), labels, strict=True)]


@pytest.fixture
def make_trainer(make_model: Make, tokenizer: Any, tmp_path: Path) -> Callable[..., RewardTrainer]:
    def make(
        *, data: Any = None, held_out: Any = None, lora: Any = LORA, folder: str = "run", callbacks: Any = (),
        architecture: Any = DENSE, model: Any = None, **changes: Any,
    ) -> RewardTrainer:
        base: dict[str, Any] = {
            "output_dir": tmp_path / folder, "num_steps": 4, "num_pairs": 4,
            "optim": {"learning_rate": 1e-2}, "trackers": (),
        }
        return RewardTrainer(
            make_model(architecture) if model is None else model, RewardConfig(**merged(base, changes)),
            data or pairs(8), eval_dataset=held_out, tokenizer=tokenizer, peft_config=lora, callbacks=callbacks,
        )

    return make


def reward_of(trainer: RewardTrainer, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """Return rewards by a plain forward pass."""
    ids = torch.tensor([[*prompt, *completion]])
    hidden = trainer.learner.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    return (hidden @ trainer.reward_model.score.weight[0]).float()


def gradients(trainer: RewardTrainer, rows: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of an update that is not made."""
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> dict[str, float]:
        found.update({name: p.grad.clone() for name, p in trainer.learner.trained.items() if p.grad is not None})
        return {}

    trainer.learner.module.zero_grad()
    trainer.learner._step = keep  # type: ignore[method-assign]
    metrics = update_on(trainer, packs_of(trainer, rows))
    return metrics["loss"], found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(
    ("architecture", "lora"), [(DENSE, LORA), (DENSE, None), (SPARSE, LORA), (SPARSE, None)],
    ids=["dense-adapter", "dense-all", "experts-adapter", "experts-all"],
)
def test_loss_and_gradient_are_those_of_plain_forward_passes(
    architecture: Any, lora: Any, make_trainer: Make
) -> None:
    trainer = make_trainer(
        architecture=architecture, lora=lora, data=with_labels(8), centring_coef=0.3,
        memory={"tokens_per_microbatch": 30}
    )
    leave_base(trainer)
    assert len(packs_of(trainer, range(4))) > 1
    value, found = gradients(trainer, range(4))
    trainer.learner.module.zero_grad()
    total = torch.zeros(())
    for pair in trainer.train_examples[:4]:
        chosen, rejected = (reward_of(trainer, pair.prompt, ids) for ids in (pair.chosen, pair.rejected))
        right = torch.sigmoid(chosen - rejected - pair.margin)
        total = total - pair.probability * torch.log(right) - (1 - pair.probability) * torch.log(1 - right)
        total = total + 0.3 * (chosen + rejected) ** 2
    (total / 4).backward()
    assert value == pytest.approx(total.item() / 4, rel=1e-5)
    expected = {name: p.grad for name, p in trainer.learner.trained.items() if p.grad is not None}
    assert_same(found, expected)
    assert "score.weight" in found and len(found) == len(trainer.learner.trained)


@pytest.mark.parametrize("budget", [1, 25, 4096])
def test_gradient_does_not_depend_on_the_packs(budget: int, make_trainer: Make) -> None:
    whole, cut = (
        make_trainer(data=with_labels(8), folder=name, memory={"tokens_per_microbatch": size})
        for name, size in (("whole", 100000), ("cut", budget))
    )
    for trainer in (whole, cut):
        leave_base(trainer)
    (value, expected), (other, found) = gradients(whole, range(6)), gradients(cut, range(6))
    assert other == pytest.approx(value, rel=1e-6)
    assert_same(found, expected)


def test_balance_loss_changes_the_routers(make_trainer: Make) -> None:
    seen: list[Any] = []
    make_trainer(
        architecture=SPARSE | {"router_aux_loss_coef": 0.1}, lora=None, callbacks=[lambda t, s, m: seen.append(m)]
    ).train()
    assert all(metrics["router_loss"] > 0 and metrics["expert_load_max"] >= 1 for metrics in seen)


def test_metrics_are_means_over_pairs(make_trainer: Make) -> None:
    seen: list[Any] = []
    trainer = make_trainer(num_steps=1, callbacks=[lambda t, s, m: seen.append(dict(m))])
    rows = trainer.sampler.state_dict()
    known = [
        (reward_of(trainer, p.prompt, p.chosen).item(), reward_of(trainer, p.prompt, p.rejected).item())
        for p in (trainer.train_examples[i] for i in trainer.sampler.next())
    ]
    trainer.sampler.load_state_dict(rows)
    trainer.train()
    assert seen[0]["margin"] == pytest.approx(sum(c - r for c, r in known) / 4, rel=1e-4)
    assert seen[0]["preference_accuracy"] == sum(c > r for c, r in known) / 4
    assert seen[0]["reward_mean"] == pytest.approx(sum(c + r for c, r in known) / 8, rel=1e-4)


def test_tie_counts_as_half_correct(make_trainer: Make) -> None:
    trainer = make_trainer(held_out=pairs(5, seed=1))
    with torch.no_grad():
        trainer.reward_model.score.weight.zero_()
    result = trainer.evaluate()
    assert (result.accuracy, result.margin, result.calibration_error, result.brier) == (0.5, 0, 0, 0.25)
    assert evaluation_from_json(json.loads(json.dumps(result.to_json()))) == result
    assert set(result.metrics()) == {f"eval/{n}" for n in ("accuracy", "margin", "loss", "calibration_error", "brier")}


def test_held_out_numbers_are_those_of_the_pairs(make_trainer: Make) -> None:
    trainer = make_trainer(held_out=with_labels(5, seed=1), memory={"tokens_per_microbatch": 30})
    leave_base(trainer)
    leads = []
    for pair in trainer.eval_examples:
        with torch.no_grad():
            chosen, rejected = (reward_of(trainer, pair.prompt, ids) for ids in (pair.chosen, pair.rejected))
        leads.append(float(chosen - rejected))
    result = trainer.evaluate()
    assert result.accuracy == pytest.approx(sum(lead > 0 for lead in leads) / 5)
    assert result.margin == pytest.approx(sum(leads) / 5, rel=1e-4)
    assert result.brier == pytest.approx(float((1 - torch.tensor(leads).sigmoid()).square().mean()), rel=1e-4)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all"])
def test_training_learns_which_completions_are_preferred(lora: Any, make_trainer: Make) -> None:
    """Chosen ones begin with one token, rejected ones with another: held-out pairs are told apart afterwards."""

    def marked(pair: Preference) -> Preference:
        return replace(pair, chosen=(8, *pair.chosen[1:]), rejected=(9, *pair.rejected[1:]))

    train, held_out = ([marked(pair) for pair in pairs(48, seed=seed)] for seed in (2, 3))
    rate = 1e-2 if lora else 3e-3
    trainer = make_trainer(
        data=train, held_out=held_out, num_steps=40, num_pairs=16, lora=lora, optim={"learning_rate": rate}
    )
    result = trainer.train()
    assert result.after.accuracy > 0.9 and result.after.margin > result.before.margin
    assert result.after.brier < result.before.brier


def test_centring_pulls_the_mean_reward_to_zero(make_trainer: Make) -> None:
    means = {}
    for coef in (0.0, 1.0):
        seen: list[float] = []
        trainer = make_trainer(
            folder=str(coef), centring_coef=coef, num_steps=40, optim={"learning_rate": 1e-3},
            callbacks=[lambda t, s, m, seen=seen: seen.append(m["reward_mean"])],
        )
        with torch.no_grad():
            trainer.learner.model.get_input_embeddings().weight.add_(0.1)
            trainer.reward_model.score.weight.fill_(0.1)  # rewards of one sign
        trainer.train()
        means[coef] = sum(abs(x) for x in seen[-5:]) / 5
    assert means[1.0] < means[0.0] / 4


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all"])
def test_what_is_saved_is_what_was_trained(lora: Any, make_trainer: Make, make_model: Make, tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "base")
    base = load_model(str(tmp_path / "base"), dtype=torch.float32)
    trainer = make_trainer(model=base, lora=lora, held_out=pairs(5, seed=1))
    result = trainer.train()
    reward = load_reward_model(str(result.model_path))
    packs = packs_of(trainer, range(4))
    found = reward.rewards(packs, 8).view(-1, 2)
    outputs = trainer.learner.outputs(packs)
    own = [reward_pairs(output.rewards, pack) for output, pack in zip(outputs, packs, strict=True)]
    assert torch.equal(found[:, 0], torch.cat([pair.chosen for pair in own]))
    assert torch.equal(found[:, 1], torch.cat([pair.rejected for pair in own]))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["command"] == f"rewards: [{{name: reward_model, options: {{model: {result.model_path}}}}}]"
    assert report["after"]["calibration_error"] == result.after.calibration_error


def test_margins_come_from_a_column(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "better_by": by} for by in (0.5, 2)]
    found = preferences_from_rows(rows, RenderSettings(), tokenizer, margin_column="better_by")
    assert [pair.margin for pair in found] == [0.5, 2.0]


def test_soft_labels_come_from_a_column(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "sure": p} for p in (0.5, 1, 0.4)]
    found = preferences_from_rows(rows[:2], RenderSettings(), tokenizer, probability_column="sure")
    assert [pair.probability for pair in found] == [0.5, 1.0]
    with pytest.raises(DataError, match=r"row 2 .*has probability 0\.4 .*must be from 0\.5"):
        preferences_from_rows(rows, RenderSettings(), tokenizer, probability_column="sure")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.5, r"has margin -0\.5 .*must be finite and at least 0"),
        (float("nan"), "has nothing in the column 'by'"),
        ("much", "has 'much' in the column 'by', which holds numbers"),
        (True, "has True in the column"),
        (None, "has nothing in the column 'by'"),
    ],
)
def test_rows_without_a_proper_margin(value: Any, message: str, make_trainer: Make, tokenizer: Any) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "by": 1}
    rows = [good, good | {"by": value}, good | {"rejected": "b"}]
    with pytest.raises(DataError, match=f"row 1 .*{message}"):
        make_trainer(data=rows, margin_column="by")
    skipping = RenderSettings(on_bad_row="skip")
    found = preferences_from_rows(rows, skipping, tokenizer, margin_column="by")
    assert len(found) == 1 and found.skipped.total() == 2 and found.skipped["identical"] == 1


def test_settings() -> None:
    with pytest.raises(ConfigError, match=r"memory\.logprob_chunk_tokens is 64, and must stay null for a reward model"):
        RewardConfig(memory={"logprob_chunk_tokens": 64})
    with pytest.raises(ConfigError, match="centring_coef"):
        RewardConfig(centring_coef=-1)
    assert "margin from by" in RewardConfig(margin_column="by").method


def test_tokenizer_without_a_separate_padding_token_is_refused(make_model: Make, tokenizer: Any) -> None:
    """Refused before the first step; the user's tokenizer stays unchanged."""
    ends = copy.deepcopy(tokenizer)
    ends.pad_token = ends.eos_token
    trainer = RewardTrainer(make_model(), RewardConfig(trackers=()), pairs(32), tokenizer=ends, peft_config=LORA)
    assert trainer.tokenizer.pad_token_id != ends.eos_token_id == ends.pad_token_id
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1}, unk_token="a"))
    alone = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    with pytest.raises(ConfigError, match="needs a padding token that is not the end token"):
        RewardTrainer(make_model(), RewardConfig(trackers=()), pairs(32), tokenizer=alone, peft_config=LORA)


def test_run_from_a_file_is_checked_first(
    make_model: Make, tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    save_model(make_model(), tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"ab{i}", "chosen": f"{i}", "rejected": "b", "by": i} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = tmp_path / "reward.yaml"
    config.write_text(json.dumps({
        "model": {"name": str(tmp_path / "base"), "lora": {"rank": 2}},
        "data": {"path": str(tmp_path / "pairs.jsonl")},
        "eval_data": {"path": str(tmp_path / "pairs.jsonl"), "size": 3},
        "trainer": {
            "type": "reward", "output_dir": str(tmp_path / "run"), "num_steps": 2, "num_pairs": 4, "trackers": [],
            "margin_column": "by",
        },
    }))
    assert main(["check", str(config)]) == 0
    told = capsys.readouterr().out
    assert "8 pairs of" in told and "reward model (Bradley-Terry, centring 0.01, margin from by)" in told
    assert main(["train", str(config)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["num_steps"] == 2 and summary["adapter"] == str(tmp_path / "run" / "adapter")
    assert load_reward_model(summary["adapter"]).model.dtype == torch.bfloat16
    assert main(["check", str(config), "trainer.margin_column=missing"]) == 2
