"""Distillation, offline and on-policy: losses by plain forward passes, any cut, what is kept of a teacher, learning."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignlab.config.data import RenderSettings
from alignlab.config.run import EvaluationSettings, RunConfig
from alignlab.config.trainers import DistillConfig, GKDConfig
from alignlab.data.examples import Example
from alignlab.data.rendering import PromptRenderer
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import CheckpointError, ConfigError, DataError, NumericsError
from alignlab.files.paths import teacher_cache_folder
from alignlab.functional.distillation import divergence
from alignlab.models.hub.checkpoints import new_model, save_model
from alignlab.run_from_config import run
from alignlab.runs import teacher_cache
from alignlab.runs.teacher_cache import CachedTeacher
from alignlab.trainers.distill import DistillTrainer
from alignlab.trainers.gkd import GKDTrainer, dataset_completion
from alignlab.types import Prompt
from tests.settings import merged
from tests.trainers.conftest import DENSE, SPARSE, even_ids
from tests.trainers.steps import minibatches_of, packs_of
from tests.trainers.tiny import examples

Make = Callable[..., Any]
WIDTH = 262


@pytest.fixture
def save_teacher(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def save(
        architecture: Any = DENSE | {"hidden_size": 48}, *, seed: int = 7, more: int = 0, scale: float = 8.0,
        of_tokens: Any = tokenizer, name: str = "teacher",
    ) -> str:
        torch.manual_seed(seed)
        model = new_model(
            architecture, vocab_size=WIDTH + more, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with torch.no_grad():
            for weight in model.get_output_embeddings().parameters():
                weight.mul_(scale)  # a teacher that has something to say
        save_model(model, tmp_path / name)
        of_tokens.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def make_distill(make_model: Make, tokenizer: Any, tmp_path: Path) -> Callable[..., DistillTrainer]:
    def make(
        teacher: str, *, data: Any = None, folder: str = "run", callbacks: Any = (), architecture: Any = DENSE,
        options: Any = None, **changes: Any,
    ) -> DistillTrainer:
        base: dict[str, Any] = {
            "output_dir": tmp_path / folder, "num_steps": 4, "num_sequences": 4,
            "optim": {"learning_rate": 1e-2}, "trackers": (),
        }
        return DistillTrainer(
            make_model(architecture), DistillConfig(**merged(base, changes), teacher={"name": teacher}),
            data or examples(8), tokenizer=tokenizer, callbacks=callbacks, **options or {},
        )

    return make


@pytest.fixture
def make_gkd(make_model: Make, tokenizer: Any, tmp_path: Path, rows: Any) -> Callable[..., GKDTrainer]:
    def make(
        teacher: str, *, data: Any = None, rewards: Any = (), architecture: Any = DENSE, folder: str = "run",
        options: Any = None, callbacks: Any = (), **changes: Any,
    ) -> GKDTrainer:
        base: dict[str, Any] = {
            "output_dir": tmp_path / folder, "num_steps": 4, "num_prompts": 4,
            "optim": {"learning_rate": 1e-2}, "trackers": (),
            "sampling": {"max_new_tokens": 6},
        }
        return GKDTrainer(
            make_model(architecture), rewards, GKDConfig(**merged(base, changes), teacher={"name": teacher}),
            data or rows, tokenizer=tokenizer, callbacks=callbacks, **options or {},
        )

    return make


def plain_logits(model: Any, ids: tuple[int, ...], mask: tuple[bool, ...]) -> Tensor:
    """Return the logits of the trained tokens, by a plain forward pass."""
    logits = model(torch.tensor([ids])).logits[0].float()[:-1]
    return logits[torch.tensor(mask[1:]), :WIDTH]


def plain_loss(student: Any, teacher: Any, data: list[Example], *, beta: float, temperature: float, hard: float) -> Any:
    total, count = torch.zeros(()), 0
    for example in data:
        ours = plain_logits(student, example.token_ids, example.completion_mask)
        with torch.no_grad():
            theirs = plain_logits(teacher, example.token_ids, example.completion_mask)
        far = divergence((theirs / temperature).log_softmax(-1), (ours / temperature).log_softmax(-1), beta=beta)
        targets = torch.tensor(example.token_ids)[torch.tensor(example.completion_mask)]
        own = ours.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        total = total + ((1 - hard) * temperature**2 * far - hard * own).sum()
        count += len(targets)
    return total / count


def gradient(trainer: Any, packs: Any) -> tuple[float, dict[str, Tensor]]:
    kept: dict[str, Tensor] = {}

    def keep(*_: Any) -> dict[str, float]:
        kept.update({n: p.grad.clone() for n, p in trainer.learner.model.named_parameters() if p.grad is not None})
        trainer.learner.optimizer.zero_grad()
        return {}

    trainer.learner._step = keep
    return trainer.learner.update(packs, trainer.algorithm.loss, trainer.algorithm.loss_weights)["loss"], kept


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("budget", [10, 4096])
@pytest.mark.parametrize(("beta", "temperature", "hard"), [(0.0, 1.0, 0.0), (0.5, 2.0, 0.3), (1.0, 0.7, 0.0)])
def test_offline_is_a_plain_loss_however_it_is_cut(
    budget: int, beta: float, temperature: float, hard: float, save_teacher: Make, make_distill: Make
) -> None:
    trainer = make_distill(
        save_teacher(more=3), beta=beta, temperature=temperature, hard_label_weight=hard,
        memory={"tokens_per_microbatch": budget, "logprob_chunk_tokens": 3},
    )
    value, found = gradient(trainer, packs_of(trainer, range(8)))
    model = trainer.learner.model
    expected = plain_loss(
        model, trainer.algorithm.teacher.model, examples(8), beta=beta, temperature=temperature, hard=hard
    )
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    same(found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert all(p.grad is None for p in trainer.algorithm.teacher.parameters())


def test_all_tokens_kept_are_the_whole_distribution_and_fewer_a_bound(save_teacher: Make, make_distill: Make) -> None:
    teacher = save_teacher()
    found = {}
    for k in (None, 5, WIDTH):
        trainer = make_distill(teacher, top_k=k, beta=0.5)
        trainer.open(None, None, None)
        found[k] = gradient(trainer, packs_of(trainer, [3, 0, 6]))
    assert found[WIDTH][0] == pytest.approx(found[None][0], rel=1e-5)
    same(found[WIDTH][1], found[None][1])
    assert 0 < found[5][0] < found[None][0]


def test_teacher_runs_once_per_example(
    save_teacher: Make, make_distill: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    teacher = save_teacher()
    monkeypatch.setattr(teacher_cache, "ASKED_TOGETHER", 3)
    trainer = make_distill(teacher, top_k=5)
    asked: list[int] = []
    ask = trainer.algorithm._top_tokens

    def killed(some: Any) -> Any:
        asked.append(len(some))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(some)

    trainer.algorithm._top_tokens = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.open(None, None, None)
    trainer.open(None, None, None)
    assert asked == [3, 3, 3, 2]  # what was on the disk is not asked for again
    told = capsys.readouterr().err
    assert "read 8 of 8" in told and "GiB, in " in told
    assert trainer.algorithm.teacher is None, "it was held until it had told all"
    later = make_distill(teacher, top_k=5)
    ask, later.algorithm._top_tokens = later.algorithm._top_tokens, killed
    beside = later.algorithm.forward.teacher
    later.open(None, None, None)
    assert len(asked) == 4
    later.algorithm.forward.teacher = beside
    for row, example in enumerate(examples(8)):
        top, kept = ask([example]), later.algorithm._cached.get(row)
        assert torch.equal(top.ids, kept.ids.long())
        torch.testing.assert_close(top.logprobs, kept.logprobs)
        torch.testing.assert_close(top.other_logprob, kept.other_logprob)


@pytest.mark.parametrize("file", ["ids.npy", "logprobs.npy", "rest.npy", "done.json"])
def test_what_is_damaged_of_a_stopped_asking_is_asked_again(
    file: str, save_teacher: Make, make_distill: Make, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = save_teacher()
    monkeypatch.setattr(teacher_cache, "ASKED_TOGETHER", 2)
    asked: list[int] = []

    def kept(stop_at: int) -> CachedTeacher:
        trainer = make_distill(teacher, top_k=5)
        ask = trainer.algorithm._top_tokens

        def counted(some: Any) -> Any:
            if len(asked) == stop_at:
                raise KeyboardInterrupt
            asked.append(len(some))
            return ask(some)

        trainer.algorithm._top_tokens = counted
        trainer.open(None, None, None)
        return trainer.algorithm._cached

    with pytest.raises(KeyboardInterrupt):
        kept(stop_at=3)  # 3 of 4 parts
    [folder] = teacher_cache_folder().glob(".*.tmp")
    path = folder / file
    content = bytearray(path.read_bytes())
    if file == "done.json":
        content[9] ^= 8
    else:  # in the first row of the second part
        array, row = np.load(path), sum(sum(each.completion_mask) for each in examples(2))
        content[len(content) - array[row:].nbytes] ^= 8
    path.write_bytes(content)
    del asked[:]
    damaged = kept(stop_at=99)
    assert len(asked) == (4 if file == "done.json" else 3), "from the damaged part on"
    assert "are asked for again" in caplog.text
    monkeypatch.setenv("ALIGNLAB_CACHE", str(folder.parent / "other"))
    for one, other in zip(damaged._arrays, kept(stop_at=99)._arrays, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "a pipe"])
def test_damaged_answers_are_not_trained_on(
    damage: str, save_teacher: Make, make_distill: Make, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = save_teacher()
    trainer = make_distill(teacher, top_k=5)
    trainer.open(None, None, None)
    [folder] = {Path(array.filename).parent for array in trainer.algorithm._cached._arrays}
    file = folder / "logprobs.npy"
    content = file.read_bytes()
    if damage in ("missing", "a pipe"):
        file.unlink()
        if damage == "a pipe":
            os.mkfifo(file)
    else:
        file.write_bytes(content[:-4] + bytes(4) if damage == "changed" else content[:-4])
    again = make_distill(teacher, top_k=5)
    again.open(None, None, None)
    assert f"{folder} are damaged, and are asked for again" in caplog.text
    assert (folder / "logprobs.npy").read_bytes() == content and again.algorithm._cached is not None


def test_what_is_kept_is_told_apart(save_teacher: Make, make_distill: Make) -> None:
    def path(teacher: str, data: Any, k: int, temperature: float = 1.0) -> Path:
        trainer = make_distill(teacher)
        model = trainer.algorithm.teacher.model
        cache = teacher_cache.TeacherCache(model, k=k, temperature=temperature, width=WIDTH)
        return cache.path(data)

    first = save_teacher()
    paths = {path(first, examples(8), 5), path(first, examples(8), 6), path(first, examples(7), 5)}
    paths |= {path(first, examples(8), 5, 2.0), path(save_teacher(seed=8, name="other"), examples(8), 5)}
    assert len(paths) == 5
    assert path(first, examples(8), 5) in paths


@pytest.mark.parametrize("changes", [{}, {"top_k": 20}, {"beta": 0.5}, {"beta": 1.0}])
def test_the_student_learns_its_teacher(changes: Any, save_teacher: Make, make_distill: Make) -> None:
    seen: list[float] = []
    trainer = make_distill(
        save_teacher(SPARSE), num_steps=40, num_sequences=8, **changes,
        callbacks=[lambda _, __, metrics: seen.append(metrics["divergence"])],
    )
    trainer.train()
    assert seen[-1] < 0.5 * seen[0]


@pytest.mark.parametrize(("kind", "changes"), [("make_distill", {"top_k": 5}), ("make_gkd", {"student_frac": 0.5})])
def test_resumed_run_equals_uninterrupted_run_and_other_teacher_is_refused(
    kind: str, changes: dict[str, Any], save_teacher: Make, request: pytest.FixtureRequest
) -> None:
    make, teacher = request.getfixturevalue(kind), save_teacher()
    whole = make(teacher, folder="whole", **changes)
    whole.train()

    def stop(_: Any, step: int, __: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert make(teacher, callbacks=[stop], **changes).train().interrupted
    again = make(teacher, **changes)
    again.train(resume=True)
    for one, other in zip(whole.learner.model.parameters(), again.learner.model.parameters(), strict=True):
        assert torch.equal(one, other)
    save_teacher(seed=8)
    with pytest.raises(CheckpointError, match="the teacher has other weights"):
        make(teacher, **changes).train(resume=True)


def test_accuracy_is_measured(save_teacher: Make, make_distill: Make, rows: Any) -> None:
    options = {
        "eval_dataset": rows, "reward_funcs": [even_ids], "evaluation": EvaluationSettings(
            num_problems=2, num_samples=2, sampled={"max_new_tokens": 2}
        ),
    }
    result = make_distill(save_teacher(), options=options).train()
    assert result.before is not None and result.after is not None
    with pytest.raises(ConfigError, match="no scorer decides which answers are right"):
        make_distill(save_teacher(), options={"eval_dataset": rows})


def test_the_accuracy_of_an_average_is_measured(save_teacher: Make, make_distill: Make, rows: Any) -> None:
    """After training, by an engine that generates from the average of the weights."""
    options = {
        "eval_dataset": rows, "reward_funcs": [even_ids], "evaluation": EvaluationSettings(
            num_problems=4, num_samples=4, sampled={"max_new_tokens": 6}
        ),
    }
    teacher = save_teacher()
    trainer = make_distill(teacher, options=options, ema={"decay": 0.9}, num_steps=8)
    result = trainer.train()
    of_weights = trainer.evaluate()
    with torch.no_grad():
        for name, parameter in trainer.learner.trained.items():
            parameter.copy_(trainer.learner.average.tensors[name])
    of_average = trainer.evaluate()
    texts = [[problem.greedy for problem in each.samples] for each in (result.after, of_average, of_weights)]
    assert result.after == of_average and texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("make", ["make_distill", "make_gkd"])
def test_teachers_that_do_not_fit(make: str, save_teacher: Make, request: pytest.FixtureRequest) -> None:
    build = request.getfixturevalue(make)
    with pytest.raises(ConfigError, match=r"the teacher has 260 logits.*262 ids"):
        build(save_teacher(more=-2))
    other = train_tokenizer(["xyz xyz xyy zz"], vocab_size=WIDTH)
    with pytest.raises(ConfigError, match="must have the student's tokenizer"):
        build(save_teacher(of_tokens=other))


def test_a_teacher_reads_whole_examples(save_teacher: Make, make_distill: Make) -> None:
    short = save_teacher(DENSE | {"max_position_embeddings": 5})
    longest = max(len(example.token_ids) for example in examples(8))
    with pytest.raises(DataError, match=f"has {longest} tokens, and must fit the teacher's 5 positions"):
        make_distill(short, data=[max(examples(8), key=lambda example: len(example.token_ids))])
    make_distill(short, data=[Example((1, 2, 3, 4, 5), (False, True, True, True, True))])


def test_completions_must_fit_the_positions_of_the_teacher(save_teacher: Make, make_gkd: Make) -> None:
    short = save_teacher(DENSE | {"max_position_embeddings": 7})
    with pytest.raises(ConfigError, match=r"max_new_tokens is 6, .* must fit the teacher's 7 positions"):
        make_gkd(short)
    make_gkd(short, sampling={"max_new_tokens": 5})


SKIP = {"render_settings": RenderSettings(on_bad_row="skip")}


def test_rows_that_do_not_fit_the_teacher_are_skipped_and_counted(
    save_teacher: Make, make_gkd: Make, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    short = save_teacher(DENSE | {"max_position_embeddings": 12})
    data = [*rows[:4], {"prompt": "a" * 9 + "b" * 9 + "12312", "answer": "1"}, {"prompt": "ab", "answer": "1" * 40}]
    with pytest.raises(DataError, match=r"row 4 .*and the student and its teacher have 12 positions"):
        make_gkd(short, data=[*data[:4], data[5]], student_frac=0.5)
    trainer = make_gkd(short, data=data, student_frac=0.5, options=SKIP, num_steps=1)
    assert [prompt.index for prompt in trainer.source.prompts] == [0, 1, 2, 3]
    assert "skipped 1 of 6 prompts" in caplog.text and "the teacher's 12 positions" in caplog.text
    assert "skipped 1 rows (no_room 1)" in caplog.text
    assert trainer.train().num_steps == 1
    with pytest.raises(ConfigError, match=r"must fit the teacher's 12 .*; lower RenderSettings\.max_prompt_tokens"):
        make_gkd(short, data=[data[4]] * 2, options=SKIP)


def test_where_the_teacher_says_no_number_is_named(save_teacher: Make, make_distill: Make) -> None:
    trainer = make_distill(save_teacher())
    with torch.no_grad():
        trainer.algorithm.teacher.model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(NumericsError, match=r"outputs not finite in \['sequence 0 of pack 0'"):
        trainer.learner.update(packs_of(trainer, [0]), trainer.algorithm.loss, trainer.algorithm.loss_weights)


def test_top_k_above_the_vocabulary_size_is_refused(save_teacher: Make, make_distill: Make) -> None:
    with pytest.raises(ConfigError, match="top_k is 263"):
        make_distill(save_teacher(), top_k=263)


def sampled_examples(trainer: GKDTrainer, step: int = 1) -> tuple[list[Example], list[Any]]:
    batch = trainer.source.collect(step)
    [packs] = minibatches_of(trainer, step, batch.rollouts)
    return [
        Example(
            (*r.prompt.token_ids, *c.token_ids), (False,) * len(r.prompt.token_ids) + (True,) * len(c.token_ids)
        )
        for r in batch.rollouts for c in r.completions
    ], packs


@pytest.mark.parametrize("budget", [10, 4096])
@pytest.mark.parametrize(("beta", "student_frac", "group"), [(0.5, 1.0, 2), (1.0, 0.5, 1), (0.0, 0.0, 1)])
def test_on_policy_is_a_plain_loss_however_it_is_cut(
    budget: int, beta: float, student_frac: float, group: int, save_teacher: Make, make_gkd: Make
) -> None:
    trainer = make_gkd(
        save_teacher(SPARSE), beta=beta, temperature=1.5, student_frac=student_frac, group_size=group,
        memory={"tokens_per_microbatch": budget},
    )
    data, packs = sampled_examples(trainer)
    value, found = gradient(trainer, packs)
    model = trainer.learner.model
    expected = plain_loss(model, trainer.algorithm.teacher.model, data, beta=beta, temperature=1.5, hard=0.0)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    same(found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def test_the_dataset_s_completions_are_those_of_fine_tuning(
    save_teacher: Make, make_gkd: Make, rows: Any, tokenizer: Any
) -> None:
    trainer = make_gkd(save_teacher(), student_frac=0.0)
    for rollout in trainer.source.collect(1).rollouts:
        [completion] = rollout.completions
        assert completion.text == rollout.prompt.columns["answer"]
        assert completion.token_ids[-1] == tokenizer.eos_token_id
    for answer, message in (("", "has an empty string"), ("1" * 5000, "positions; shorten it")):
        bad = [row | {"answer": answer} for row in rows]
        with pytest.raises(DataError, match=f"row 0 .*{message}"):
            make_gkd(save_teacher(), student_frac=0.5, data=bad)
    alike = [Prompt((8, 9), "ab", columns={"answer": str(i)}) for i in range(2)]
    with pytest.raises(DataError, match=r"2 prompts have 1 different indices"):
        make_gkd(save_teacher(), student_frac=0.5, data=alike)
    with pytest.raises(DataError, match=r"row 0 .*has neither completion nor answer"):
        make_gkd(save_teacher(), student_frac=0.5, data=[{"prompt": row["prompt"]} for row in rows])


@pytest.mark.parametrize("changes", [{}, {"architecture": SPARSE}, {"student_frac": 0.5}, {"rewards": [even_ids]}])
def test_the_student_learns_on_its_own_samples(changes: Any, save_teacher: Make, make_gkd: Make) -> None:
    seen: list[float] = []
    trainer = make_gkd(
        save_teacher(SPARSE), num_steps=60, num_prompts=8, **changes,
        callbacks=[lambda _, __, metrics: seen.append(metrics["divergence"])],
    )
    trainer.train()
    assert sum(seen[-4:]) < 0.6 * sum(seen[:4])


def test_settings() -> None:
    with pytest.raises(ConfigError, match="group_size is 2, and must be 1 with student_frac below 1"):
        GKDConfig(teacher={"name": "t"}, group_size=2, student_frac=0.5)
    with pytest.raises(ConfigError, match="mask_truncated is True, and must be false with student_frac 0"):
        GKDConfig(teacher={"name": "t"}, student_frac=0.0, mask_truncated=True)
    with pytest.raises(ConfigError, match="lmbda is here student_frac"):
        GKDConfig(teacher={"name": "t"}, lmbda=0.5)
    with pytest.raises(ConfigError, match=r"beta is 1\.5"):
        DistillConfig(teacher={"name": "t"}, beta=1.5)
    with pytest.raises(ConfigError, match="teacher"):
        DistillConfig()


@pytest.mark.parametrize("trainer", ["distill", "gkd"])
def test_a_whole_run(trainer: str, save_teacher: Make, tmp_path: Path, tokenizer: Any) -> None:
    """From settings alone, with and without a scorer."""
    settings: dict[str, Any] = {
        "model": {"architecture": DENSE, "tokenizer": save_teacher()},
        "data": {"task": "chain_sum", "size": 8},
        "rewards": [{"name": "reasoning_gym_answer"}],
        "trainer": {
            "type": trainer, "teacher": {"name": save_teacher()}, "num_steps": 1, "trackers": [],
            "output_dir": tmp_path / "run",
        },
        "evaluation": {"num_problems": 2, "num_samples": 1, "sampled": {"max_new_tokens": 2}},
    }
    if trainer == "gkd":
        settings["trainer"] |= {"num_prompts": 2, "sampling": {"max_new_tokens": 2}}
    assert set(run(RunConfig.model_validate(settings)).to_json()["after"]) == {"greedy", "sampled"}
    settings["trainer"] |= {"output_dir": tmp_path / "silent"}
    assert run(RunConfig.model_validate(settings | {"rewards": []})).to_json()["after"] is None
    with pytest.raises(ConfigError, match="nothing decides which answers are correct"):
        RunConfig.model_validate(settings | {"rewards": [], "eval_data": {"task": "chain_sum", "split": "eval"}})


def test_a_tools_answer_in_the_dataset_s_completion_is_not_learnt() -> None:
    chat = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    chat.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [{"role": role, "content": text} for role, text in (("assistant", "a"), ("tool", "b"), ("assistant", "c"))]
    prompt = Prompt(tuple(chat("[user]q.[assistant]")["input_ids"]), "q", columns={"completion": turns})
    completion = dataset_completion(prompt, PromptRenderer(RenderSettings(), chat), math.inf)
    ids = completion.token_ids
    assert completion.writers is not None
    taught = chat.decode([token for token, own in zip(ids, completion.policy_tokens, strict=True) if own])
    assert taught == f"a.c.{chat.eos_token}" and "b" in chat.decode(ids)
