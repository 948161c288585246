"""Models and tokenizers of different vocabulary sizes: ids without an embedding are refused, padding is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from alignlab.config.distill import TeacherSettings
from alignlab.config.model import LoraSettings
from alignlab.config.rewards import RewardSettings
from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainers import (
    DistillConfig,
    DPOConfig,
    GKDConfig,
    GRPOConfig,
    KTOConfig,
    OnPolicyDistillConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from alignlab.data.packing import pack_rollouts
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.data.vocabulary import num_token_ids
from alignlab.errors import ConfigError
from alignlab.loop.rollout_metrics import PaddingTokens
from alignlab.loop.teacher import readable_part
from alignlab.models.hub.checkpoints import new_model, save_model
from alignlab.models.hub.reward_checkpoints import save_reward_model
from alignlab.models.reward_model import RewardModel
from alignlab.scoring.judges.local import LocalChatModel
from alignlab.scoring.reward_model import ModelReward
from alignlab.trainers.distill import DistillTrainer
from alignlab.trainers.dpo import DPOTrainer
from alignlab.trainers.gkd import GKDTrainer
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.kto import KTOTrainer
from alignlab.trainers.on_policy_distill import OnPolicyDistillTrainer
from alignlab.trainers.ppo import PPOTrainer
from alignlab.trainers.reward import RewardTrainer
from alignlab.trainers.sft import SFTTrainer
from alignlab.types import Completion, Prompt, Rollout
from tests.trainers.conftest import DENSE, even_ids

Make = Callable[..., Any]
NEW = "<new>"
SAMPLING = SamplingSettings(max_new_tokens=6)


@pytest.fixture
def extended() -> Any:
    """Return a tokenizer with one token more than the models of these tests have rows."""
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    tokenizer.add_tokens([NEW])
    return tokenizer


def sized(rows: int, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return new_model(DENSE, vocab_size=rows, pad_token_id=0, eos_token_id=1)


def rows_of_kind(kind: str, text: str) -> list[dict[str, Any]]:
    pairs = [{"prompt": f"a{i}", "chosen": text, "rejected": "b"} for i in range(4)]
    return {
        "pairs": pairs,
        "prompts": [{"prompt": f"{text} {i}", "answer": "1"} for i in range(4)],
        "completions": [{"prompt": f"a{i}", "completion": text} for i in range(4)],
        "labels": [{"prompt": f"a{i}", "completion": f"{text}{i}", "label": i < 2} for i in range(4)],
    }[kind]


@pytest.fixture
def make_trainer(extended: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def make(
        kind: str, text: str, *, rows: int | None = None, teacher_rows: int = 300, **changes: Any
    ) -> Any:
        model = sized(num_token_ids(extended) - 1 if rows is None else rows)
        teacher = tmp_path / f"teacher-{teacher_rows}"
        if not teacher.exists():
            save_model(sized(teacher_rows, seed=1), teacher)
            extended.save_pretrained(teacher)
        common: dict[str, Any] = {"output_dir": tmp_path / kind, "num_steps": 2, "trackers": ()} | changes
        online = common | {"num_prompts": 2, "sampling": SAMPLING}
        taught = {"teacher": TeacherSettings(name=str(teacher))}
        keywords: dict[str, Any] = {"tokenizer": extended}
        prompts, completions, pairs = (rows_of_kind(name, text) for name in ("prompts", "completions", "pairs"))
        critic = {"form": "model"}
        return {
            "sft": lambda: SFTTrainer(model, SFTConfig(**common, num_sequences=2), completions, **keywords),
            "dpo": lambda: DPOTrainer(model, DPOConfig(**common, num_pairs=2), pairs, **keywords),
            "reward": lambda: RewardTrainer(model, RewardConfig(**common, num_pairs=2), pairs, **keywords),
            "kto": lambda: KTOTrainer(
                model, KTOConfig(**common, num_sequences=2), rows_of_kind("labels", text), **keywords
            ),
            "grpo": lambda: GRPOTrainer(model, even_ids, GRPOConfig(**online, group_size=2), prompts, **keywords),
            "ppo": lambda: PPOTrainer(
                model, even_ids, PPOConfig(**online, group_size=2, critic=critic), prompts, **keywords
            ),
            "gkd": lambda: GKDTrainer(model, (), GKDConfig(**online, **taught), prompts, **keywords),
            "on_policy_distill": lambda: OnPolicyDistillTrainer(
                model, (), OnPolicyDistillConfig(**online, **taught, group_size=2), prompts, **keywords
            ),
            "distill": lambda: DistillTrainer(
                model, DistillConfig(**common, **taught, num_sequences=2), completions, **keywords
            ),
        }[kind]()  # fmt: skip

    return make


KINDS = ["sft", "dpo", "reward", "kto", "grpo", "ppo", "gkd", "on_policy_distill", "distill"]


@pytest.mark.parametrize("kind", KINDS)
def test_token_without_an_embedding_in_the_data_is_refused(kind: str, make_trainer: Make) -> None:
    with pytest.raises(ConfigError, match=r"holds token id 262 \('<new>'\), and the model has 262 rows"):
        make_trainer(kind, f"b{NEW}")


@pytest.mark.parametrize("kind", KINDS)
def test_token_without_an_embedding_that_is_not_in_the_data_is_accepted(kind: str, make_trainer: Make) -> None:
    metrics = make_trainer(kind, "ba").train().metrics
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("kind", ["grpo", "ppo", "gkd"])
def test_token_without_an_embedding_in_held_out_prompts_is_refused(
    kind: str, extended: Any, make_config: Make, rows: Any
) -> None:
    with pytest.raises(ConfigError, match=r"prompt 0 .* holds token id 262"):
        GRPOTrainer(
            sized(262), even_ids, make_config(), rows, eval_dataset=rows_of_kind("prompts", NEW), tokenizer=extended
        )


def test_teacher_without_an_embedding_for_the_data_is_refused(make_trainer: Make) -> None:
    """The student has a row for the new token, and the teacher has none."""
    for kind in ("gkd", "on_policy_distill", "distill"):
        with pytest.raises(ConfigError, match="the teacher has 262 logits"):
            make_trainer(kind, "ba", rows=263, teacher_rows=262)


@pytest.mark.parametrize(("rows", "teacher_rows"), [(340, 270), (270, 340), (263, 340), (340, 263)])
@pytest.mark.parametrize("kind", ["gkd", "on_policy_distill"])
def test_student_trains_with_a_teacher_of_another_padding(
    kind: str, rows: int, teacher_rows: int, make_trainer: Make
) -> None:
    metrics = make_trainer(kind, "ba", rows=rows, teacher_rows=teacher_rows).train().metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert ("padding_frac" in metrics) == (rows > 263)


def test_padding_of_a_teacher_has_no_probability(make_trainer: Make, tmp_path: Path, extended: Any) -> None:
    """The teacher's log-probs do not depend on the logits of its padding rows."""
    quiet = make_trainer("on_policy_distill", "ba", rows=263, teacher_rows=264)
    loud = make_trainer("on_policy_distill", "ba", rows=263, teacher_rows=264)
    head = loud.algorithm.teacher.model.get_output_embeddings().weight
    with torch.no_grad():
        head[263:] += 50.0
    rollout = Rollout(Prompt((3, 4), ""), (Completion.of((5, 6)),))
    packs = pack_rollouts([rollout], budget=64)
    scores = [trainer.learner.logprobs(packs, trainer.algorithm.teacher)[0] for trainer in (quiet, loud)]
    torch.testing.assert_close(*scores)
    unrestricted = loud.algorithm.teacher
    unrestricted.num_ids = None
    assert float((loud.learner.logprobs(packs, unrestricted)[0] - scores[0]).abs().max()) > 1


def test_mask_ends_at_the_first_id_that_the_teacher_cannot_read() -> None:
    completions = tuple(Completion.of(ids) for ids in ((3, 4), (5, 99, 6), (99, 7)))
    rollouts = [Rollout(Prompt((1, 2), ""), completions)]
    [pack] = pack_rollouts(rollouts, budget=64)
    masks = {True: [], False: []}  # type: dict[bool, list[int]]
    for with_first in masks:
        cut = readable_part(pack, 50, with_first_unknown=with_first)
        masks[with_first] = cut.tokens[cut.completion_mask].tolist()
        assert torch.equal(cut.tokens, pack.tokens)
    assert masks == {True: [3, 4, 5, 99, 99], False: [3, 4, 5]}
    assert readable_part(pack, 100, with_first_unknown=False) is pack


def test_ids_without_a_token_are_counted_with_one_warning(extended: Any, caplog: pytest.LogCaptureFixture) -> None:
    padding = PaddingTokens(sized(300), extended)
    rollouts = [Rollout(Prompt((1,), ""), (Completion.of((262, 263, 299, 4)),))]
    for _ in range(2):
        assert padding.metrics(rollouts, lambda value: value) == {"padding_frac": 0.5}
    assert caplog.text.count("sampled 2 of 4 ids that its tokenizer has no token for, from 263 on") == 1
    assert PaddingTokens(sized(263), extended).metrics(rollouts, lambda value: value) == {}


def test_reward_model_gives_no_reward_for_ids_without_an_embedding(
    extended: Any, tmp_path: Path, make_config: Make
) -> None:
    folder = str(tmp_path / "reward")
    save_reward_model(RewardModel(sized(263)), folder, extended)
    reward = ModelReward(folder)
    prompts, completions = [[3, 4]] * 2, [[5, 6], [5, 270]]
    values = reward(prompt_ids=prompts, completion_ids=completions)
    assert values[0] is not None and values[1] is None
    small = str(tmp_path / "small")
    save_reward_model(RewardModel(sized(262)), small, extended)
    named = RewardSettings(name="reward_model", options={"model": small})
    with pytest.raises(ConfigError, match=r"prompt 0 .* and the reward model .*small has 262 rows"):
        GRPOTrainer(
            sized(263), named, make_config(), rows_of_kind("prompts", NEW), tokenizer=extended,
            peft_config=LoraSettings(rank=2),
        )


def test_padding_token_of_a_reward_model_without_an_embedding_is_refused(extended: Any, tmp_path: Path) -> None:
    extended.pad_token = NEW
    config = RewardConfig(output_dir=tmp_path / "run", num_pairs=2)
    with pytest.raises(ConfigError, match="the padding token of a reward model is id 262"):
        RewardTrainer(sized(262), config, rows_of_kind("pairs", "ba"), tokenizer=extended)


def test_judge_with_a_template_of_tokens_without_an_embedding_is_refused(extended: Any) -> None:
    template = "{% for m in messages %}MARK{{ m['content'] }}{% endfor %}"
    extended.chat_template = template.replace("MARK", NEW)
    with pytest.raises(ConfigError, match=r"token id 262 .* the judge has 262 rows"):
        LocalChatModel(sized(262), extended)
    extended.chat_template = template
    [judged, refused] = LocalChatModel(sized(262), extended).choose(
        [[{"role": "user", "content": text}] for text in ("ab", NEW)], ["1", "2"]
    )
    assert isinstance(judged, tuple) and not isinstance(refused, tuple)
