"""On-policy distillation as a user runs it: advantages by hand, any cut, it learns, resumes, refuses what it must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.data import RenderSettings
from alignlab.config.model import LoraSettings
from alignlab.config.rollout import SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import OnPolicyDistillConfig, SFTConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import CheckpointError, ConfigError
from alignlab.functional.advantages import group_normalized
from alignlab.loop.algorithm import Credit
from alignlab.loop.teacher import check_width
from alignlab.models.hub.checkpoints import load_model, load_tokenizer, new_model, save_model
from alignlab.models.layer_pruning import student_from
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.on_policy_distill import OnPolicyDistillTrainer
from alignlab.trainers.sft import SFTTrainer
from alignlab.types import Completion, Rollout
from tests.settings import merged
from tests.trainers.conftest import DENSE, SPARSE, even_ids
from tests.trainers.steps import credit_of, minibatches_of

Make = Callable[..., Any]


OPTIONS = ("peft_config", "eval_dataset", "evaluation", "callbacks", "render_settings")
WORDS = ("bab", "cab", "ab ba", "abc 12", "ba ab")


def saved(model: Any, tokenizer: Any, folder: Path) -> str:
    """A teacher's folder."""
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def taught(model: Any, tokenizer: Any, words: Sequence[str], folder: Path, num_steps: int = 20) -> Any:
    """The model after a little fine-tuning on words, so that it writes text and no loose bytes."""
    rows = [{"prompt": f"ab{i}", "completion": word} for i in range(8) for word in words]
    config = SFTConfig(
        output_dir=folder, num_steps=num_steps, num_sequences=len(rows), optim={"learning_rate": 1e-2}, trackers=()
    )
    SFTTrainer(model, config, rows, tokenizer=tokenizer).train()
    return model.eval()


def fresh(tokenizer: Any, architecture: dict[str, Any] = DENSE, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return new_model(architecture, vocab_size=len(tokenizer), **ends)


@pytest.fixture(scope="module")
def teacher(tokenizer: Any, tmp_path_factory: Any) -> str:
    """A mixture of experts, and no relative of the student's."""
    folder = tmp_path_factory.mktemp("teacher")
    model = taught(fresh(tokenizer, SPARSE, seed=5), tokenizer, WORDS[:2], folder / "run", num_steps=40)
    return saved(model, tokenizer, folder / "model")


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory: Any) -> str:
    """Save a teacher whose tokenizer has other merges."""
    folder = tmp_path_factory.mktemp("other")
    other = train_tokenizer(["ba ab bab cab " * 3], vocab_size=266)
    small = fresh(other, DENSE | {"num_hidden_layers": 1}, seed=6)
    model = taught(small, other, WORDS[:2], folder / "run", num_steps=40)
    return saved(model, other, folder / "model")


@pytest.fixture(scope="module")
def student_folder(tokenizer: Any, tmp_path_factory: Any) -> str:
    """It writes all the words."""
    folder = tmp_path_factory.mktemp("student")
    return saved(taught(fresh(tokenizer), tokenizer, WORDS, folder / "run", num_steps=30), tokenizer, folder / "model")


@pytest.fixture
def student(student_folder: str) -> Any:
    return load_model(student_folder, dtype=torch.float32)


@pytest.fixture
def make_trainer(student_folder: str, tokenizer: Any, rows: Any, tmp_path: Path) -> Make:
    def make(teacher: str, model: Any = None, rewards: Any = (), **changes: Any) -> OnPolicyDistillTrainer:
        model = model or load_model(student_folder, dtype=torch.float32)
        options = {name: changes.pop(name) for name in OPTIONS if name in changes}
        base: dict[str, Any] = {
            "output_dir": tmp_path / "run", "num_steps": 2,
            "optim": {"learning_rate": 1e-2}, "num_prompts": 2, "group_size": 4,
            "sampling": SamplingSettings(max_new_tokens=6), "trackers": (), "teacher": {"name": teacher},
        }
        data = changes.pop("data", rows)
        config = OnPolicyDistillConfig(**merged(base, changes))
        return OnPolicyDistillTrainer(model, rewards, config, data, tokenizer=tokenizer, **options)

    return make


def logprobs_of(folder: str, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """Return log-probs of a completion's tokens, by a plain forward pass over one sequence."""
    model = load_model(folder, dtype=torch.float32)
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        table = model(input_ids=ids).logits[0].log_softmax(-1)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return table[places, ids[0, len(prompt) :]]


def per_completion(trainer: Any, rollouts: Sequence[Rollout]) -> tuple[list[Tensor], list[Tensor], Credit]:
    """Advantages and old log-probs of each completion's tokens, and the credit."""
    advantages: dict[int, Tensor] = {}
    old: dict[int, Tensor] = {}
    credit = credit_of(trainer, 1, rollouts)
    [credited] = credit.minibatches
    for pack in credited:
        lengths = pack.segments.lengths
        values = (pack.advantages.split(lengths), pack.old_logprobs.split(lengths))
        for sequence, own, before in zip(pack.segments.sequence_ids, *values, strict=True):
            if sequence >= 0:
                advantages[sequence], old[sequence] = own, before
    return [advantages[i] for i in sorted(advantages)], [old[i] for i in sorted(old)], credit


def test_advantage_is_the_log_prob_of_the_teacher_minus_that_of_the_student(make_trainer: Make, teacher: str) -> None:
    trainer = make_trainer(teacher)
    rollouts = trainer.source.collect(1).rollouts
    advantages, _, credit = per_completion(trainer, rollouts)
    completions = [(r.prompt, c) for r in rollouts for c in r.completions]
    total, count = 0.0, 0
    for i, (prompt, completion) in enumerate(completions):
        expected = logprobs_of(teacher, prompt.token_ids, completion.token_ids) - torch.tensor(completion.logprobs)
        torch.testing.assert_close(advantages[i], expected, rtol=1e-4, atol=1e-4)
        assert credit.advantages.flatten()[i].item() == pytest.approx(float(expected.mean()), abs=1e-4)
        total, count = total - float(expected.sum()), count + len(expected)
    assert credit.metrics == {"reverse_kl": pytest.approx(total / count, abs=1e-4)}


def test_the_task_s_advantage_is_added(make_trainer: Make, teacher: str) -> None:
    plain, mixed = make_trainer(teacher), make_trainer(teacher, rewards=even_ids, task_weight=0.5)
    rollouts = mixed.source.collect(1).rollouts
    alone, _, _ = per_completion(plain, rollouts)
    both, _, _ = per_completion(mixed, rollouts)
    task = 0.5 * group_normalized(torch.tensor([rollout.rewards for rollout in rollouts])).flatten()
    assert task.abs().max() > 0.1
    for own, other, extra in zip(alone, both, task, strict=True):
        torch.testing.assert_close(other, own + extra)


def test_the_future_counts_by_the_discount(make_trainer: Make, teacher: str) -> None:
    now, later = make_trainer(teacher), make_trainer(teacher, discount=1.0)
    rollouts = now.source.collect(1).rollouts
    alone, _, _ = per_completion(now, rollouts)
    whole, _, _ = per_completion(later, rollouts)
    for own, sums in zip(alone, whole, strict=True):
        torch.testing.assert_close(sums, own.flip(0).cumsum(0).flip(0), rtol=1e-4, atol=1e-4)


def test_student_equal_to_its_teacher_does_not_change(make_trainer: Make, student_folder: str) -> None:
    metrics = make_trainer(student_folder, num_steps=1).train().metrics
    assert abs(metrics["reverse_kl"]) < 1e-6 and metrics["grad_norm"] < 1e-5


@pytest.mark.parametrize("alignment", ["tokens", "text"])
def test_gradient_does_not_depend_on_the_packs(
    alignment: str, make_trainer: Make, teacher: str, other_teacher: str
) -> None:
    name = teacher if alignment == "tokens" else other_teacher

    def gradient(budget: int, rollouts: Any = None) -> tuple[Any, dict[str, Tensor]]:
        trainer = make_trainer(
            name, memory={"tokens_per_microbatch": budget}, alignment=alignment, discount=0.5,
            optim={"max_grad_norm": 1e9}
        )
        rollouts = rollouts or trainer.source.collect(1).rollouts
        [packs] = minibatches_of(trainer, 1, rollouts)
        found: dict[str, Tensor] = {}

        def keep(*_: Any) -> dict[str, float]:
            found.update({n: p.grad.clone() for n, p in trainer.learner.trained.items() if p.grad is not None})
            return {}

        trainer.learner._step = keep
        trainer.learner.update(packs, trainer.algorithm.loss, trainer.algorithm.loss_weights)
        return rollouts, found

    rollouts, whole = gradient(4096)
    _, cut = gradient(9, rollouts)
    assert whole.keys() == cut.keys() and max(float(g.abs().max()) for g in whole.values()) > 1e-3
    for weight, value in whole.items():
        torch.testing.assert_close(cut[weight], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("alignment", "lora"),
    [("tokens", None), ("tokens", LoraSettings(rank=8)), ("text", None)],
    ids=["full", "lora", "text"],
)
def test_the_reverse_kl_falls(
    alignment: str, lora: Any, make_trainer: Make, teacher: str, other_teacher: str
) -> None:
    """Without any reward; the teacher is a mixture, or has another tokenizer."""
    found: list[float] = []
    trainer = make_trainer(
        teacher if alignment == "tokens" else other_teacher, alignment=alignment, num_steps=40, num_prompts=4,
        group_size=16, optim={"learning_rate": 4e-3 if lora else 2e-3}, peft_config=lora,
        callbacks=[lambda _, __, metrics: found.append(metrics["reverse_kl"])],
    )
    result = trainer.train()
    metrics = result.metrics
    assert result.verdict.learnt and metrics["informative_frac"] == 1, "a teacher judges completions without a reward"
    assert sum(found[-5:]) < 0.5 * sum(found[:5])
    assert "reward" not in metrics and "accuracy" not in metrics and metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics.get("unaligned_frac", 0.0) < 0.2


def test_student_learns_the_task_of_its_teacher_and_continues_with_rl(
    make_trainer: Make, make_model: Make, make_config: Make, tokenizer: Any, rows: Any, tmp_path: Path
) -> None:
    """The teacher says even ids alone; a student of one of its layers never sees the reward and says them too."""

    def even(**given: Any) -> list[float]:
        return [float(value == 1.0) for value in even_ids(**given)]

    learnt = GRPOTrainer(
        make_model(), even_ids, make_config(num_steps=30, group_size=16, output_dir=tmp_path / "rl"), rows,
        tokenizer=tokenizer,
    ).train()
    folder = str(learnt.model_path)
    student = student_from(load_model(folder, dtype=torch.float32), [0])
    with torch.no_grad():
        student.lm_head.weight.normal_(std=0.02)
    trainer = make_trainer(
        folder, student, rewards=even, num_steps=30, num_prompts=4, group_size=8, eval_dataset=rows,
        evaluation=EvaluationSettings(num_samples=4),
    )
    result = trainer.train()
    assert result.before is not None and result.after is not None
    assert result.before.sampled < 0.3 and result.after.sampled > 0.6
    rl = GRPOTrainer(
        str(result.model_path), even_ids, make_config(num_steps=1, output_dir=tmp_path / "more"), rows
    )
    assert rl.train().metrics["reward"] > 0.8


def test_equal_tokenizers_aligned_by_text_give_the_same_advantages(make_trainer: Make, teacher: str) -> None:
    """The case where the text of a sample is tokenised into the sampled ids again."""
    tokens, text = make_trainer(teacher), make_trainer(teacher, alignment="text")
    rollouts = tokens.source.collect(1).rollouts
    completions = [c for rollout in rollouts for c in rollout.completions]
    known = [text.algorithm.scores._aligner.completion(c) for c in completions]
    alike = [each is not None and each.teacher_ids == c.token_ids for each, c in zip(known, completions, strict=True)]
    assert sum(alike) > len(alike) / 2
    expected, _, _ = per_completion(tokens, rollouts)
    found, _, credit = per_completion(text, rollouts)
    for own, other, same in zip(expected, found, alike, strict=True):
        if same:
            torch.testing.assert_close(other, own)
    assert credit.metrics["unaligned_frac"] == sum(each is None for each in known) / len(known)


def test_what_is_no_text_is_left_out_and_counted(make_trainer: Make, other_teacher: str, tokenizer: Any) -> None:
    trainer = make_trainer(other_teacher, alignment="text")
    [rollout, *_] = trainer.source.collect(1).rollouts
    half = tokenizer("漢")["input_ids"][0]
    whole = rollout.completions[0]
    broken = replace(whole, token_ids=(half, *whole.token_ids[1:]))
    mixed = replace(rollout, completions=(whole, broken, whole, broken))
    advantages, _, credit = per_completion(trainer, [mixed])
    assert advantages[0].any() and not advantages[1].any() and not credit.advantages[0, 1]
    assert credit.metrics["unaligned_frac"] == 0.5
    [packs] = minibatches_of(trainer, 1, [mixed])
    trained = {int(i) for pack in packs for i in pack.segments.sequence_of_token[pack.completion_mask]}
    assert trained == {0, 2}


def test_what_the_teacher_has_no_room_for_is_left_out(make_trainer: Make, other_teacher: str, tokenizer: Any) -> None:
    trainer = make_trainer(other_teacher, alignment="text")
    [rollout, *_] = trainer.source.collect(1).rollouts

    def said(text: str) -> Any:
        ids = tuple(tokenizer(text)["input_ids"])
        zeros = (0.0,) * len(ids)
        return replace(
            rollout.completions[0], token_ids=ids, text=text, logprobs=zeros, raw_logprobs=None,
            finish_reason="length", policy_versions=(0,) * len(ids),
        )

    aligner = trainer.algorithm.scores._aligner
    trainer.algorithm.scores._positions = len(aligner.prompt_ids([rollout.prompt])[0]) + 1
    mixed = replace(rollout, completions=(said("a"), said("QZXQZX"), said("a"), said("QZXQZX")))
    _, _, credit = per_completion(trainer, [mixed])
    assert credit.metrics["unaligned_frac"] == 0.5


def test_teacher_uses_its_own_routing(
    make_trainer: Make, tokenizer: Any, teacher: str, student_folder: str
) -> None:
    """A mixture's rollouts come with its choices, which are nothing to another model, of experts or of none."""
    for folder in (teacher, student_folder):
        trainer = make_trainer(folder, fresh(tokenizer, SPARSE, seed=1))
        rollouts = trainer.source.collect(1).rollouts
        assert rollouts[0].completions[0].routing is not None
        advantages, _, _ = per_completion(trainer, rollouts)
        completion = rollouts[0].completions[0]
        known = torch.tensor(completion.logprobs)
        expected = logprobs_of(folder, rollouts[0].prompt.token_ids, completion.token_ids) - known
        torch.testing.assert_close(advantages[0], expected, rtol=1e-3, atol=1e-3)


def test_a_span_s_advantages_sum_to_the_teacher_s_less_the_student_s(
    make_trainer: Make, other_teacher: str, tokenizer: Any
) -> None:
    """Compare with plain forward passes of the teacher over its own tokens."""
    trainer = make_trainer(other_teacher, alignment="text")
    theirs = load_tokenizer(other_teacher)
    [rollout, *_] = trainer.source.collect(1).rollouts
    ids = (*tokenizer("ab bab ba")["input_ids"], tokenizer.eos_token_id)
    told = Completion.of(ids)
    rollout = replace(rollout, completions=(told,) * 4)
    advantages, old, _ = per_completion(trainer, [rollout])
    aligned = trainer.algorithm.scores._aligner.completion(told)
    assert aligned is not None and 2 < aligned.num_spans < len(ids)
    prompt = tuple(theirs(str(rollout.prompt.text))["input_ids"])
    scores = logprobs_of(other_teacher, prompt, aligned.teacher_ids)
    for span in range(aligned.num_spans):
        own = torch.tensor([s == span for s in aligned.spans])
        other = torch.tensor([s == span for s in aligned.teacher_spans])
        expected = (scores[other].sum() - old[0][own].sum()) / own.sum()
        torch.testing.assert_close(advantages[0][own], expected.expand(int(own.sum())), rtol=1e-4, atol=1e-4)


def test_truncated_completions_are_masked_on_request(make_trainer: Make, teacher: str) -> None:
    trainer = make_trainer(teacher, mask_truncated=True, sampling=SamplingSettings(max_new_tokens=3))
    rollouts = trainer.source.collect(1).rollouts
    assert {c.finish_reason for r in rollouts for c in r.completions} == {"length", "stop"}
    advantages, _, _ = per_completion(trainer, rollouts)
    for own, completion in zip(advantages, [c for r in rollouts for c in r.completions], strict=True):
        assert bool(own.any()) == (completion.finish_reason == "stop")


def test_resumed_run_with_a_teacher_of_another_tokenizer_equals_uninterrupted_run(
    make_trainer: Make, other_teacher: str, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def crash(_: Any, step: int, __: Any) -> None:
        if step == 3:
            raise Stop

    def trainer(folder: str, **changes: Any) -> OnPolicyDistillTrainer:
        return make_trainer(other_teacher, num_steps=4, alignment="text", output_dir=tmp_path / folder, **changes)

    whole = trainer("whole")
    whole.train()
    with pytest.raises(Stop):
        trainer("cut", checkpoints={"every_steps": 2}, callbacks=[crash]).train()
    second = trainer("cut", checkpoints={"every_steps": 2})
    assert second.train(resume=True).num_steps == 4
    for weight, value in whole.learner.trained.items():
        assert torch.equal(value, second.learner.trained[weight])


def test_resuming_with_another_teacher_is_refused(make_trainer: Make, teacher: str, student_folder: str) -> None:
    make_trainer(teacher, num_steps=1).train()
    with pytest.raises(CheckpointError, match="the teacher has other weights"):
        make_trainer(student_folder, num_steps=2).train(resume=True)


def narrow_in_time(folder: str, positions: int = 6) -> str:
    """A copy of a teacher with few positions."""
    copy = Path(folder).with_name("narrow")
    model: Any = load_model(folder, dtype=torch.float32)
    model.config.max_position_embeddings = positions
    model.config.hub_config = None
    return saved(model, load_tokenizer(folder), copy)


def test_what_cannot_be_distilled_is_refused(
    make_trainer: Make, teacher: str, other_teacher: str, rows: Any
) -> None:
    with pytest.raises(ConfigError, match=r"must have the student's tokenizer .* or alignment: text"):
        make_trainer(other_teacher)
    with pytest.raises(ConfigError, match=r"the teacher has 262 logits, and must have one for each of the 263 ids"):
        wider = train_tokenizer(["x"], vocab_size=258)
        wider.add_tokens([f"<{i}>" for i in range(263 - len(wider))])
        check_width(load_model(teacher, dtype=torch.float32), wider)
    with pytest.raises(ConfigError, match=r"must fit the teacher's 6 positions"):
        make_trainer(narrow_in_time(teacher))
    with pytest.raises(ConfigError, match=r"must fit the teacher's 6 positions"):
        make_trainer(narrow_in_time(other_teacher), alignment="text")
    with pytest.raises(ConfigError, match=r"task_weight is 1.0, and there are no reward_funcs"):
        make_trainer(teacher, task_weight=1.0)
    with pytest.raises(ConfigError, match=r"eval_dataset is given, and must be left out"):
        make_trainer(teacher, eval_dataset=rows)


@pytest.mark.parametrize(("fixture", "alignment"), [("teacher", "tokens"), ("other_teacher", "text")])
def test_prompts_that_do_not_fit_the_teacher_are_skipped(
    fixture: str, alignment: str, make_trainer: Make, rows: Any, request: pytest.FixtureRequest
) -> None:
    folder = narrow_in_time(request.getfixturevalue(fixture), 14)
    data = [*rows[:4], {"prompt": "abd123ba" * 6, "answer": "1"}]
    settings = RenderSettings(on_bad_row="skip")
    trainer = make_trainer(folder, data=data, alignment=alignment, render_settings=settings, num_steps=1)
    assert [prompt.index for prompt in trainer.source.prompts] == [0, 1, 2, 3]
    assert sorted(trainer.source.sampler.take(4)) == [0, 1, 2, 3], "none of them is drawn"
    assert trainer.train().num_steps == 1


def test_padded_vocabulary_is_accepted(make_trainer: Make, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    wide = new_model(shape, vocab_size=len(tokenizer) + 10, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    metrics = make_trainer(saved(wide, tokenizer, tmp_path / "wide"), num_steps=1).train().metrics
    assert metrics["grad_norm"] > 0
