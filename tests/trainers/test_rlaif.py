"""RLAIF: each path from prompts to a trained policy, stopped and resumed in the middle of a stage."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignlab.config.data import RenderSettings
from alignlab.config.judge import ModelJudge, load_constitution
from alignlab.config.model import LoraSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import RLAIFConfig
from alignlab.errors import CheckpointError, ConfigError, DataError, JudgeError
from alignlab.loop.training_loop import Callback
from alignlab.scoring.judges.answer_cache import AnswerStore
from alignlab.scoring.judges.chat_model import Failure
from alignlab.scoring.judges.judge import PromptedJudge
from alignlab.synthesis.labels import judge_pairs, preferences
from alignlab.synthesis.revision import supervised_rows
from alignlab.trainers.rlaif.trainer import RLAIFTrainer
from alignlab.types import Completion, Prompt, Rollout
from tests.ranks import run_ranks
from tests.scoring.judges.conftest import CONSTITUTION, RuledModel, shown
from tests.settings import merged

Make = Callable[..., Any]
LORA = LoraSettings(rank=8)
STAGE: dict[str, Any] = {"num_steps": 3, "optim": {"learning_rate": 1e-2}, "trackers": ()}
SAMPLING = {"max_new_tokens": 6}
POLICIES: dict[str, dict[str, Any]] = {
    "direct": {"type": "grpo", "num_prompts": 2, "group_size": 4, "sampling": SAMPLING} | STAGE,
    "reward_model": {"type": "grpo", "num_prompts": 2, "group_size": 4, "sampling": SAMPLING} | STAGE,
    "dpo": {"type": "dpo", "num_pairs": 4} | STAGE,
    "online_dpo": {"type": "online_dpo", "num_prompts": 4, "group_size": 2, "sampling": SAMPLING} | STAGE,
}
CASES_OF_RANKS = {"direct": "direct", "reward_model": "reward_model", "dpo": "dpo", "judged by its base": "direct"}
"""What `rank_rlaif.py` runs, and the path of each."""


def letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


class LetterModel(RuledModel):
    """Prefers, and rates highly, an answer of many letters."""

    def _choose(self, answers: list[str], choices: Any) -> Any:
        counts = [letters(answer) for answer in answers]
        if len(counts) == 2:
            return float(counts[0] - counts[1]), 0.0
        rating = min(1 + counts[0] // 2, len(choices))
        return tuple(0.0 if str(rating) == choice else -1e9 for choice in choices)


@dataclass
class Interrupting(LetterModel):
    """The same, and a signal at the given question."""

    at: int = 1

    def __post_init__(self) -> None:
        super().__init__()

    def choose(self, conversations: Any, choices: Any) -> Any:
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().choose(conversations, choices)


@pytest.fixture
def make_trainer(
    make_model: Make, tokenizer: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RLAIFTrainer]:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    constitution = tmp_path / "constitution.yaml"
    constitution.write_text(yaml.safe_dump(CONSTITUTION.model_dump(mode="json")))

    def make(
        path: str, *, model: Any = None, base: Any = None, lora: Any = LORA, held_out: Any = None, data: Any = None,
        render_settings: Any = None, callbacks: Any = (), **changes: Any,
    ) -> RLAIFTrainer:
        told: dict[str, Any] = {
            "output_dir": tmp_path / "run", "constitution": str(constitution), "path": path,
            "judge": {"name": "given"},
        }
        if path in POLICIES:
            told["policy"] = POLICIES[path]
        if path in ("dpo", "reward_model"):
            told["labels"] = {"sampling": SAMPLING, "prompts_per_batch": 2}
        if path == "reward_model":
            told["reward"] = {"num_pairs": 4} | STAGE
        config = RLAIFConfig(**told | changes)
        judge = PromptedJudge(model or LetterModel(), CONSTITUTION, config.judge)
        scorer = EvaluationSettings(scorer=f"{__file__}:is_long") if held_out else None
        return RLAIFTrainer(
            base or make_model(), config, data or rows, eval_dataset=held_out, tokenizer=tokenizer, peft_config=lora,
            judge=judge, evaluation=scorer, render_settings=render_settings, callbacks=callbacks,
        )

    return make


def is_long(*, prompts: Any, completions: Any, **_: Any) -> list[float]:
    """Right is what has three letters or more."""
    return [float(letters(completion) >= 3) for completion in completions]


@pytest.mark.parametrize("path", list(POLICIES))
def test_every_path_trains_a_policy(path: str, make_trainer: Make, rows: Any, tmp_path: Path) -> None:
    trainer = make_trainer(path, held_out=rows)
    result = trainer.train()
    assert not result.interrupted and result.num_steps == 3
    assert result.model_path == (tmp_path / "run" / "policy" / "adapter") and (result.model_path).is_dir()
    assert result.before is not None and result.after is not None
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["questions"]["asked"] > 0 and report["after"]["sampled"] == result.after.sampled
    stages = {"direct": set(), "online_dpo": set(), "dpo": {"labels"}, "reward_model": {"labels", "reward"}}
    assert {folder.name for folder in (tmp_path / "run").iterdir() if folder.is_dir()} == {"policy"} | stages[path]


def test_labels_are_the_preferences_of_the_judge(make_trainer: Make, rows: Any, tmp_path: Path) -> None:
    make_trainer("dpo").train()
    found = [json.loads(line) for line in (tmp_path / "run" / "labels" / "preferences.jsonl").read_text().splitlines()]
    assert found and all(letters(pair["chosen"]) > letters(pair["rejected"]) for pair in found)
    assert all(pair["prompt"] in {row["prompt"] for row in rows} for pair in found)
    report = json.loads((tmp_path / "run" / "labels" / "report.json").read_text())
    assert report["outcomes"]["labelled"] == len(found) and report["num_pairs"] == len(rows)
    assert report["agreement"] == 1 and report["first_rate"] == 0.5


def test_policy_learns_completions_that_the_judge_rates_highly(make_trainer: Make, rows: Any) -> None:
    policy = POLICIES["direct"] | {"num_steps": 30, "num_prompts": 4, "group_size": 8}
    result = make_trainer("direct", held_out=rows, policy=policy, lora=None).train()
    assert result.before.sampled < 0.5 and result.after.sampled > result.before.sampled + 0.3


@pytest.mark.parametrize("path", ["dpo", "direct", "online_dpo"])
def test_stopped_run_resumes_to_the_same_policy(path: str, make_trainer: Make, tmp_path: Path) -> None:
    """Stopped in its second question: among the labels, or in a step of the policy."""
    whole = make_trainer(path, output_dir=tmp_path / "whole").train()
    stopped = make_trainer(path, model=Interrupting(at=2)).train()
    assert stopped.interrupted
    later = make_trainer(path)
    resumed = later.train(resume=True)
    assert not resumed.interrupted and resumed.num_steps == 3
    for name in ("adapter_model.safetensors",):
        assert (resumed.model_path / name).read_bytes() == (whole.model_path / name).read_bytes()
    if path == "dpo":
        assert later.judge.counts["asked"] < 2 * 8  # what was judged before is not asked again
    texts = [(tmp_path / run / "policy" / "metrics.jsonl").read_text().count("\n") for run in ("whole", "run")]
    assert texts[0] == texts[1]


def test_completed_stage_is_not_repeated(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer("reward_model").train()
    before = (tmp_path / "run" / "reward" / "adapter" / "adapter_model.safetensors").read_bytes()
    again = make_trainer("reward_model")
    assert again.train(resume=True).num_steps == 3 and again.judge.counts["asked"] == 0
    assert (tmp_path / "run" / "reward" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_signal_in_the_last_step_of_a_stage_stops_the_run_after_the_stage(make_trainer: Make, tmp_path: Path) -> None:
    """In the last stage a signal in the last step does not interrupt the run: no step follows."""
    def stop_in(title: str) -> Callback:
        def stop(loop: Any, step: int, metrics: Any) -> None:
            if title in loop.run.title and step == loop.config.num_steps:
                os.kill(os.getpid(), signal.SIGINT)
        return stop

    stopped = make_trainer("reward_model", callbacks=[stop_in("RewardTrainer")]).train()
    assert stopped.interrupted and not (tmp_path / "run" / "policy").exists()
    ends = (tmp_path / "run" / "ends.jsonl").read_text()
    assert json.loads(ends)["outcome"] == "interrupted"
    resumed = make_trainer("reward_model", callbacks=[stop_in("GRPOTrainer")]).train(resume=True)
    assert not resumed.interrupted and resumed.num_steps == 3 and resumed.signal == "SIGINT"


def test_labels_of_fewer_prompts_are_not_reused_for_more_prompts(make_trainer: Make, tmp_path: Path) -> None:
    labels: dict[str, Any] = {"sampling": SAMPLING, "prompts_per_batch": 2}
    make_trainer("dpo", labels=labels | {"num_prompts": 3}).train()
    with pytest.raises(CheckpointError, match=r"labels is over, with rows of 3 prompts, and is to have \d+ now"):
        make_trainer("dpo", labels=labels).train(resume=True)


def test_revisions_are_trained_on(make_trainer: Make, tmp_path: Path) -> None:
    """Every answer is revised to "abab": the policy learns to say so."""
    texts = [text for _ in range(8) for text in ("criticism", "abab")]

    class Editor(RuledModel):
        def write(self, conversations: Any, **_: Any) -> Any:
            return ["abab" if len(conversation) == 3 else "criticism" for conversation in conversations]

    revision = {"sampling": SAMPLING, "trainer": {"num_sequences": 4} | STAGE | {"num_steps": 30}}
    trainer = make_trainer("revision", model=Editor(texts=texts), revision=revision, lora=None)
    result = trainer.train()
    assert result.model_path == tmp_path / "run" / "revision" / "model" and (result.model_path / "config.json").exists()
    told = [json.loads(x) for x in (tmp_path / "run" / "revision" / "revisions.jsonl").read_text().splitlines()]
    assert {row["completion"] for row in told} == {"abab"} and len(told) >= 6
    assert result.metrics["loss"] < 0.5


def test_rows_of_two_judges_are_not_mixed(make_trainer: Make, make_model: Make, tmp_path: Path) -> None:
    assert make_trainer("dpo", model=Interrupting(at=2)).train().interrupted
    other = {"name": "given", "votes": 2}
    with pytest.raises(CheckpointError, match=r"config\.judge\.votes was 1 and is 2"):
        make_trainer("dpo", judge=other).train(resume=True)
    identity = tmp_path / "run" / "identity.json"
    content = identity.read_bytes()
    identity.write_bytes(content.replace(b'"config', b'"confih').replace(b"votes", b"votez"))
    with pytest.raises(CheckpointError, match=r"identity\.json is damaged.*remove it to go on without a comparison"):
        make_trainer("dpo", judge=other).train(resume=True)
    identity.unlink()
    with pytest.raises(CheckpointError, match=r"made with another judge, see made_with\.json"):
        make_trainer("dpo", judge=other).train(resume=True)
    identity.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"made with another model"):
        make_trainer("dpo", base=make_model(seed=1)).train(resume=True)
    with pytest.raises(CheckpointError, match="the training data has changed"):
        make_trainer("dpo", data=[{"prompt": f"cd{i}"} for i in range(8)]).train(resume=True)
    assert not make_trainer("dpo", judge={"name": "given", "max_questions": 99}).train(resume=True).interrupted


def test_damaged_evaluation_before_the_run_is_repeated(
    make_trainer: Make, rows: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_trainer("dpo", model=Interrupting(at=2), held_out=rows).train()
    file = tmp_path / "run" / "before.json"
    content = file.read_text()
    file.write_text(content.replace('"num_problems": 8', '"num_problems": 9'))
    assert file.read_text() != content
    policy = merged(POLICIES["dpo"], {"optim": {"learning_rate": 3e-3}})
    result = make_trainer("dpo", held_out=rows, policy=policy).train(resume=True)
    assert result.before == first.before and file.read_text() == content
    assert "before.json is damaged" in caplog.text and "it is measured again" in caplog.text
    assert "config.policy.optim.learning_rate was" in caplog.text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["changed_on_resume"]) == 1


def test_revision_stage_without_a_revision_raises(make_trainer: Make) -> None:
    class Mute(RuledModel):
        def write(self, conversations: Any, **_: Any) -> Any:
            return [" "] * len(conversations)

    with pytest.raises(DataError, match="none of 8 answers was revised"):
        make_trainer("revision", model=Mute(), revision={"sampling": SAMPLING, "trainer": STAGE}).train()


def test_adapters_train_on_a_bfloat16_base(make_trainer: Make, make_model: Make) -> None:
    trainer = make_trainer("reward_model", base=make_model().bfloat16())
    assert trainer.train().num_steps == 3 and trainer.model.dtype == torch.bfloat16


def test_run_ended_by_a_judge_that_is_down_can_be_resumed(make_trainer: Make) -> None:
    from tests.scoring.judges.test_judge import DownModel

    with pytest.raises(JudgeError, match="answered none of"):
        make_trainer("dpo", model=DownModel()).train()
    assert not make_trainer("dpo").train(resume=True).interrupted


class Failing(LetterModel):
    """Down from the given question on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def choose(self, conversations: Any, choices: Any) -> Any:
        self.at -= 1
        down = [Failure("unreachable", "gone")] * len(conversations)
        return down if self.at < 0 else super().choose(conversations, choices)


@pytest.mark.parametrize("path", ["direct", "online_dpo"])
def test_judge_that_goes_down_ends_the_training_without_a_lost_step(
    path: str, make_trainer: Make, tmp_path: Path
) -> None:
    whole = make_trainer(path, output_dir=tmp_path / "whole").train()
    with pytest.raises(JudgeError, match="answered none of"):
        make_trainer(path, model=Failing(2)).train()
    resumed = make_trainer(path).train(resume=True)
    assert resumed.num_steps == 3
    weights = [(result.model_path / "adapter_model.safetensors").read_bytes() for result in (whole, resumed)]
    assert weights[0] == weights[1]


def test_online_training_stops_when_the_budget_is_spent(make_trainer: Make) -> None:
    judge = {"name": "given", "max_questions": 12}
    with pytest.raises(JudgeError, match=r"asked 12 questions, which is judge\.max_questions; raise it"):
        make_trainer("direct", judge=judge).train()
    assert make_trainer("direct", judge={"name": "given"}).train(resume=True).num_steps == 3


class FailingStore(AnswerStore):
    """Keeps what it is given, and ends the run the second time: before the labels or the step are kept."""

    num_puts = 0

    def put(self, answers: Any, **told: Any) -> None:
        super().put(answers, **told)
        self.num_puts += 1
        if self.num_puts == 2:
            raise JudgeError("the run ends here")


@pytest.mark.parametrize("path", ["dpo", "direct", "online_dpo"])
def test_question_count_of_a_resumed_run_equals_an_uninterrupted_one(
    path: str, make_trainer: Make, tmp_path: Path
) -> None:
    whole = make_trainer(path, output_dir=tmp_path / "whole")
    whole.judge.store = AnswerStore(tmp_path / "whole.sqlite")
    whole.train()
    stopped = make_trainer(path)
    stopped.judge.store = FailingStore(tmp_path / "run.sqlite")
    with pytest.raises(JudgeError, match="the run ends here"):
        stopped.train()
    resumed = make_trainer(path)
    resumed.judge.store = AnswerStore(tmp_path / "run.sqlite")
    resumed.train(resume=True)
    reports = [json.loads((tmp_path / run / "report.json").read_text())["questions"] for run in ("whole", "run")]
    assert reports[0] == reports[1] == {name: count for name, count in whole.judge.counts.items() if count}
    if path == "dpo":
        labels = [(tmp_path / run / "labels" / "report.json").read_text() for run in ("whole", "run")]
        assert labels[0] == labels[1]
        return
    lines = [(tmp_path / run / "policy" / "metrics.jsonl").read_text().splitlines() for run in ("whole", "run")]
    asked = [[json.loads(line)["judge/asked"] for line in part] for part in lines]
    assert asked[0] == asked[1] and len(asked[0]) == 3


@pytest.mark.parametrize(("path", "kept"), [("direct", 8), ("dpo", 4)])
def test_the_budget_counts_questions_of_all_starts(path: str, kept: int, make_trainer: Make, tmp_path: Path) -> None:
    """Of 12 or 6 questions, the answers of the first step or of the first labels are reused."""
    judge = {"name": "given", "max_questions": kept * 3 // 2}
    stopped = make_trainer(path, judge=judge)
    stopped.judge.store = FailingStore(tmp_path / "run.sqlite")
    with pytest.raises(JudgeError):
        stopped.train()
    model = LetterModel()
    again = make_trainer(path, judge=judge, model=model)
    if path == "dpo":
        again.train(resume=True)
        assert len(model.asked) == kept // 2
        return
    with pytest.raises(JudgeError, match=r"asked 12 questions, which is judge\.max_questions"):
        again.train(resume=True)
    assert len(model.asked) == kept // 2


def test_labels_are_made_of_the_pairs_that_the_budget_allows(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer("dpo", judge={"name": "given", "max_questions": 10}).train()
    report = json.loads((tmp_path / "run" / "labels" / "report.json").read_text())
    assert report["outcomes"]["unanswered"] == 3 and report["counts"]["over_budget"] > 0
    # What was learnt from stays as it is.
    again = make_trainer("dpo")
    again.train(resume=True)
    assert again.judge.counts["asked"] == 0


def test_judge_that_is_down_ends_the_run_and_is_asked_again_on_resume(make_trainer: Make) -> None:
    class Editor(RuledModel):
        def write(self, conversations: Any, **_: Any) -> Any:
            return [Failure("timeout", "late") if self.bias else "abab"] * len(conversations)

    revision = {"sampling": SAMPLING, "trainer": STAGE}
    with pytest.raises(JudgeError, match="the first because: late"):
        make_trainer("revision", model=Editor(bias=1.0), revision=revision).train()
    assert make_trainer("revision", model=Editor(), revision=revision).train(resume=True).num_steps == 3


def test_the_judge_argument_replaces_the_config_s_judge(make_trainer: Make) -> None:
    mine = LetterModel()
    make_trainer("direct", model=mine, judge={}).train()
    assert mine.asked


def test_questions_to_the_judge_are_in_the_metrics(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer("direct").train()
    lines = [json.loads(x) for x in (tmp_path / "run" / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert [line["judge/asked"] for line in lines] == [8, 16, 24]


def test_the_run_s_seed_is_every_stage_s_seed(make_trainer: Make, tmp_path: Path) -> None:
    found = [make_trainer("direct", seed=seed, output_dir=tmp_path / str(seed)).train() for seed in (0, 1)]
    weights = [(result.model_path / "adapter_model.safetensors").read_bytes() for result in found]
    assert weights[0] != weights[1]


def test_label_stage_without_a_preference_raises(make_trainer: Make) -> None:
    class Undecided(RuledModel):
        def _choose(self, answers: list[str], choices: Any) -> Any:
            return 0.0, 0.0

    with pytest.raises(DataError, match=r"preferred no completion of 8 pairs .*min_confidence"):
        make_trainer("dpo", model=Undecided()).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "direct"}, r"policy\.type is null, and must be given, of type grpo or ppo, with path direct"),
        ({"path": "direct", "policy": POLICIES["dpo"]}, r"policy\.type is 'dpo'.*of type grpo or ppo"),
        ({"path": "revision", "policy": POLICIES["dpo"]}, "policy is 'dpo', and must be left out with path revision"),
        ({"path": "direct", "policy": POLICIES["direct"], "labels": {}}, "labels is 'given', and must be left out"),
        ({"path": "dpo", "policy": POLICIES["dpo"], "reward": {}}, "reward is 'given', and must be left out"),
        (
            {"path": "dpo", "policy": POLICIES["dpo"] | {"output_dir": "x"}},
            r"policy\.output_dir is 'x', and must be left out: every stage is in a folder of its own",
        ),
        ({"path": "dpo", "policy": POLICIES["dpo"] | {"seed": 3}}, r"policy\.seed is '3', and must be left out"),
        ({"path": "dpo", "policy": POLICIES["dpo"] | {"eval_every_steps": 1}}, r"policy\.eval_every_steps is '1'"),
        (
            {"path": "reward_model", "policy": POLICIES["direct"], "reward": {"margin_column": "by"}},
            r"reward\.margin_column is 'by', and must be left out",
        ),
    ],
)
def test_sections_that_do_not_fit_the_path_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RLAIFConfig(constitution="c.yaml", judge={"name": "m"}, **changes)


def test_judge_on_the_base_of_the_policy_needs_a_frozen_base(make_trainer: Make) -> None:
    with pytest.raises(ConfigError, match=r"judge\.name is not given, so that the policy's own base judges"):
        make_trainer("direct", lora=None, judge={})


def test_held_out_data_needs_a_scorer(make_trainer: Make, rows: Any) -> None:
    trainer = make_trainer("direct")
    with pytest.raises(ConfigError, match=r"give reward_funcs or evaluation\.scorer"):
        RLAIFTrainer(
            trainer.model, trainer.config, rows, eval_dataset=rows, tokenizer=trainer.tokenizer, peft_config=LORA
        )


def test_unreadable_constitution_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the constitution nowhere\.yaml must be a YAML file"):
        load_constitution("nowhere.yaml")
    (tmp_path / "c.yaml").write_text("name: x\nprinciples: []\n")
    with pytest.raises(ConfigError, match="principles"):
        load_constitution(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="holds list"):
        load_constitution(tmp_path / "c.yaml")
    assert ModelJudge().max_rating == 9 and shown([{"content": "Answer: x"}]) == ["x"]


def test_labelled_pairs_have_the_prompts_that_were_sampled_from(make_trainer: Make, rows: Any) -> None:
    seen: list[Any] = []
    settings = RenderSettings(prompt_template="Q: {prompt} A:")
    trainer = make_trainer(
        "dpo", render_settings=settings, callbacks=[lambda stage, *_: seen.append(stage.train_examples)]
    )
    trainer.train()
    sampled = {prompt.token_ids for prompt in trainer.prompts}
    assert seen and all(pair.prompt in sampled for pair in seen[0])


def test_rows_of_stages_keep_the_template_s_columns() -> None:
    columns = {"tools": json.dumps([{"function": {"name": "x"}}]), "chat_template_kwargs": {"a": 1}, "answer": "1"}
    completions = [Completion.of((1,), text) for text in ("a", "abc")]
    rollout = Rollout(Prompt((1,), "q", columns=columns), tuple(completions))
    judged = judge_pairs(PromptedJudge(LetterModel(), CONSTITUTION, ModelJudge(name="x")), [rollout])
    given = {"tools": [{"function": {"name": "x"}}], "chat_template_kwargs": {"a": 1}}
    [pair] = preferences(json.loads(json.dumps(judged)), min_confidence=0.5)
    assert {name: pair[name] for name in given} == given and pair["chosen"] == "abc"
    [row] = supervised_rows([{"prompt": "q", **given, "completion": "b", "outcome": "revised"}])
    assert row == {"prompt": "q", **given, "completion": "b"}


@pytest.mark.distributed
def test_stages_train_the_same_policy_with_weights_that_are_spread_over_ranks(tmp_path: Path) -> None:
    done = run_ranks(str(Path(__file__).with_name("rank_rlaif.py")), str(tmp_path))
    assert done.returncode == 0, done.stderr[-20000:]
    for case in CASES_OF_RANKS:
        expected, first, second = (
            load_file(tmp_path / f"{case}.{run}.safetensors") for run in ("ddp.rank0", "fsdp2.rank0", "fsdp2.rank1")
        )
        assert expected and expected.keys() == first.keys() == second.keys()
        for name, weight in expected.items():
            assert torch.equal(first[name], second[name]), name
            # A rounding of the first stage is learnt from in the next ones; a wrong gradient moves weights by 1e-2.
            torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-4, msg=f"{case}: {name}")


def test_stages_have_the_same_sharding(make_trainer: Make) -> None:
    spread = {"sharding": {"strategy": "fsdp2"}}
    with pytest.raises(ConfigError, match=r"reward\.sharding is .*ddp.* must be the last stage's"):
        make_trainer("reward_model", policy=POLICIES["reward_model"] | spread)
