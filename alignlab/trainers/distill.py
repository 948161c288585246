"""Offline distillation: the student learns its teacher's distribution at each token of given completions.

Hinton et al. (2015), arXiv:1503.02531, with the divergences of GKD (arXiv:2306.13649). The teacher is asked at each
step, or once for all examples, of which its likeliest tokens are kept on disk (`training.teacher_cache`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from alignlab.config.render import RenderSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import DistillConfig
from alignlab.data.examples import Example
from alignlab.data.packing import pack_examples
from alignlab.errors import ConfigError
from alignlab.functional.distillation import Head, TopTokens, chunked_top_tokens
from alignlab.models.attention import num_embeddings, num_positions, output_head
from alignlab.models.checkpoints import load_tokenizer
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.rollout.engine import EmbeddedEngine
from alignlab.trainers.assemble import Model, Reward, resolve_rewards
from alignlab.trainers.distilling import (
    Comparison,
    StudentLearner,
    StudentOutput,
    StudentPolicy,
    TaughtExperience,
    shared_width,
)
from alignlab.trainers.given_data import (
    Dataset,
    GivenData,
    given_data,
    given_held_out,
    resolve_examples,
)
from alignlab.trainers.held_out import held_out_problems
from alignlab.trainers.offline import OfflineTrainer
from alignlab.trainers.reduction import Weigh, token_mean
from alignlab.trainers.teacher import load_teacher
from alignlab.training.checkpoint import fingerprint_of_model
from alignlab.training.evaluation import EvaluationResult
from alignlab.training.run_folder import RunFolder
from alignlab.training.teacher_cache import KeptTeacher, TeacherCache
from alignlab.types import Experience


class DistillTrainer(OfflineTrainer):
    """Distillation on completions as `SFTTrainer` reads them; other arguments are `OfflineTrainer`'s.

    Args:
        eval_dataset: prompts, as an `OnlineTrainer` reads them, on which the student's accuracy is measured.
        reward_funcs: the first one's value 1 means a right answer; nothing is learnt from it.
        evaluation: how accuracy is measured.

    Raises:
        ConfigError: the teacher has other tokens than the student, or fewer logits; or accuracy is to be measured, and
            nothing says what is right.
    """

    config: DistillConfig
    learner: StudentLearner
    size_field = "num_sequences"

    def __init__(
        self,
        model: Model,
        config: DistillConfig,
        train_dataset: Any,
        *,
        eval_dataset: Dataset | None = None,
        render_settings: RenderSettings | None = None,
        eval_render_settings: RenderSettings | None = None,
        reward_funcs: Reward | Sequence[Reward] = (),
        evaluation: EvaluationSettings | None = None,
        **options: Any,
    ) -> None:
        rewards = resolve_rewards(reward_funcs) if reward_funcs else []
        how = held_out_problems(
            evaluation, rewards, SamplingSettings(), RolloutSettings(), needed=eval_dataset is not None
        )
        train = given_data(train_dataset, render_settings)
        held_out = given_held_out(eval_dataset, eval_render_settings, train)
        super().__init__(model, config, train, **options)
        self.held_out = how.read(held_out, self.learner.model, self.tokenizer)
        self.identity.add_held_out(self.held_out.prompts, self.held_out.settings, train, held_out)
        teacher = self.learner.teacher
        assert teacher is not None, "it is there until it was asked"
        self._teacher_fingerprint = fingerprint_of_model(teacher.model)
        self._kept: KeptTeacher | None = None

    def make_learner(
        self, model: Any, tokenizer: Any, config: DistillConfig, accelerator: Accelerator, **schedule: Any
    ) -> StudentLearner:
        """The student beside its teacher."""
        chunk_tokens = config.logprob_chunk_tokens
        teacher = load_teacher(config.teacher, accelerator.device, chunk_tokens=chunk_tokens)
        width = shared_width(teacher.model, load_tokenizer(config.teacher.name), model, tokenizer)
        if config.top_k is not None and config.top_k > width:
            raise ConfigError(f"top_k is {config.top_k}, and must be at most the tokenizer's {width} ids; use 64")
        how = Comparison(config.beta, config.temperature, width, labels=config.hard_label_weight > 0)
        student = StudentPolicy(model, how, chunk_tokens=chunk_tokens)
        return StudentLearner(student, config, accelerator, teacher=teacher, **schedule)

    @property
    def positions(self) -> dict[str, float]:
        """The student's, and its teacher's."""
        teacher = self.learner.teacher
        return super().positions | ({} if teacher is None else {"the teacher": num_positions(teacher.model)})

    @property
    def rows(self) -> dict[str, int]:
        """The student's, and its teacher's."""
        teacher = self.learner.teacher
        return super().rows | ({} if teacher is None else {"the teacher": num_embeddings(teacher.model)})

    @property
    def weigh(self) -> Weigh:
        """Every completion token weighs the same."""
        return token_mean

    def examples(self, data: GivenData) -> Sequence[Example]:
        """Of settings, a path, or rows with `prompt` and `completion` or `messages`; or examples made already."""
        return resolve_examples(data, self.tokenizer)

    def open(self, stack: ExitStack, folder: RunFolder, resume_step: int | None) -> None:
        """With `top_k`, ask the teacher about all examples, or read what it answered an earlier run; then let it go."""
        teacher = self.learner.teacher
        if self.config.top_k is None or teacher is None:
            return
        how = self.learner.policy.comparison
        cache = TeacherCache(teacher.model, k=self.config.top_k, temperature=how.temperature, width=how.width)
        self._kept = cache.get_or_make(self.train_examples, self._ask)
        self.learner.teacher = None

    def _ask(self, examples: Sequence[Example]) -> TopTokens:
        """The teacher's likeliest tokens where each taught token of `examples` is predicted, in order."""
        teacher, how, k = self.learner.teacher, self.learner.policy.comparison, self.config.top_k
        assert teacher is not None and k is not None, "asked for what is kept"
        found: dict[int, TopTokens] = {}
        for pack in pack_examples(examples, budget=self.config.tokens_per_microbatch):
            moved = pack.to(self.learner.device)
            hidden, _ = teacher.predicting_states(moved.tokens, moved.segments, moved.completion_mask)
            top = chunked_top_tokens(
                hidden, Head(*output_head(teacher.model)), k=k, width=how.width,
                temperature=how.temperature, chunk_tokens=self.config.logprob_chunk_tokens,
            )
            check_finite([("pack", top.logprobs)], "the log-probs of the teacher", fix=TAKE_ANOTHER)
            counts = [int(part.sum()) for part in pack.completion_mask.split(pack.segments.lengths)]
            parts = zip(*(tensor.cpu().split(counts) for tensor in top), strict=True)
            found |= {i: TopTokens(*part) for i, part in zip(pack.segments.sequence_ids, parts, strict=True)}
        return join([found[i] for i in range(len(examples))])

    def packs(self, rows: Sequence[int]) -> list[Experience]:
        """Each example a sequence of its own, with what is kept of the teacher."""
        packs = pack_examples([self.train_examples[i] for i in rows], budget=self.config.tokens_per_microbatch)
        if self._kept is None:
            return packs
        return [self._taught(pack, [rows[i] for i in pack.segments.sequence_ids], self._kept) for pack in packs]

    @staticmethod
    def _taught(pack: Experience, rows: Sequence[int], kept: KeptTeacher) -> TaughtExperience:
        ids, logprobs, rest = join([kept.of(row) for row in rows])
        return TaughtExperience(
            pack.tokens, pack.segments, pack.completion_mask,
            teacher_ids=ids, teacher_logprobs=logprobs, teacher_rest=rest,
        )

    def loss(self, output: StudentOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:  # type: ignore[override]
        """(1 - w) T^2 divergence - w log p of each token [N]: Hinton et al. (2015), Sec. 2."""
        weight, scale = self.config.hard_label_weight, self.config.temperature**2
        metrics = {"divergence": output.divergence, "entropy": output.entropy, "cross_entropy": -output.logprobs}
        return (1 - weight) * scale * output.divergence - weight * output.logprobs, metrics

    def evaluate(self) -> EvaluationResult | None:
        """Greedy and sampled accuracy on the held-out prompts."""
        if not self.held_out:
            return None
        engine = EmbeddedEngine(self.learner.model, self.tokenizer, RolloutSettings())
        return self.held_out.evaluate(engine, seed=self.config.seed)

    def frozen(self) -> dict[str, str]:
        """The teacher."""
        return super().frozen() | {"teacher": self._teacher_fingerprint}


def join(parts: Sequence[TopTokens]) -> TopTokens:
    """One after another."""
    return TopTokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
