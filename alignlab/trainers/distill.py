"""Offline distillation: the student learns its teacher's distribution at each token of given completions.

Hinton et al. (2015), arXiv:1503.02531, with the divergences of GKD (arXiv:2306.13649). The teacher answers at each
step; or once for all examples, of which its likeliest tokens are kept on disk (`runs.teacher_cache`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignlab.config.data import RenderSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import DistillConfig
from alignlab.data.examples import Example
from alignlab.data.packing import pack_examples
from alignlab.errors import ConfigError
from alignlab.evaluation.results import EvaluationResult
from alignlab.functional.distillation import Head, TopTokens, chunked_top_tokens
from alignlab.loop.given_data import DatasetLike, GivenData, given_data, given_held_out, resolve_examples
from alignlab.loop.held_out import held_out_problems
from alignlab.loop.inputs import Model, Reward, resolve_rewards
from alignlab.loop.offline import OfflineTrainer
from alignlab.loop.offline_algorithm import OfflineAlgorithm, OfflineInputs, policy_learner
from alignlab.loop.preflight import Preflight
from alignlab.loop.student import Comparison, Student, StudentForward, StudentOutput, TaughtExperience, shared_width
from alignlab.loop.teacher import load_teacher
from alignlab.models.decoder import num_embeddings, num_positions, output_head
from alignlab.models.fingerprints import model_fingerprint
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.models.hub.checkpoints import load_tokenizer
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.runs.teacher_cache import CachedTeacher, TeacherCache
from alignlab.types import Experience


class Distill(OfflineAlgorithm[Example]):
    """Distillation on fixed completions.

    Raises:
        ConfigError: the teacher has other tokens than the student, or fewer logits.
    """

    config: DistillConfig

    def __init__(self, config: DistillConfig, inputs: OfflineInputs) -> None:
        chunk_tokens = config.memory.logprob_chunk_tokens
        teacher = load_teacher(config.teacher, inputs.accelerator.device, chunk_tokens=chunk_tokens)
        width = shared_width(teacher.model, load_tokenizer(config.teacher.name), inputs.model, inputs.tokenizer)
        if config.top_k is not None and config.top_k > width:
            raise ConfigError(f"top_k is {config.top_k}, and must be at most the tokenizer's {width} ids; use 64")
        self.comparison = Comparison(config.beta, config.temperature, width, labels=config.hard_label_weight > 0)
        student = Student(inputs.model, self.comparison, chunk_tokens=chunk_tokens)
        self.forward = StudentForward(1.0, teacher)
        super().__init__(config, inputs, policy_learner(config, inputs, student, forward=self.forward))
        self._fingerprint = model_fingerprint(teacher.model)
        self._cached: CachedTeacher | None = None

    @property
    def teacher(self) -> Policy | None:
        """The teacher, frozen; None once all that it says of the examples is on disk."""
        return self.forward.teacher

    @property
    def positions(self) -> dict[str, float]:
        """The most tokens of an example for the student and its teacher."""
        return super().positions | ({} if self.teacher is None else {"the teacher": num_positions(self.teacher.model)})

    @property
    def embedding_rows(self) -> dict[str, int]:
        """The rows of the embedding tables of the student and its teacher."""
        teacher = {} if self.teacher is None else {"the teacher": num_embeddings(self.teacher.model)}
        return super().embedding_rows | teacher

    def read(self, data: GivenData) -> Sequence[Example]:
        """Return the examples of rows with `prompt` and `completion` or `messages`, or examples made already."""
        return resolve_examples(data, self.tokenizer)

    def prepare(self, train: Sequence[Example], held_out: Sequence[Example]) -> None:
        """With `top_k`, compute the teacher's likeliest tokens for all examples, or read them; then drop the teacher.
        """
        if self.config.top_k is None or self.teacher is None:
            return
        cache = TeacherCache(
            self.teacher.model, k=self.config.top_k, temperature=self.comparison.temperature,
            width=self.comparison.width,
        )
        self._cached = cache.get_or_make(train, self._top_tokens)
        self.forward.teacher = None

    def _top_tokens(self, examples: Sequence[Example]) -> TopTokens:
        """Return the teacher's likeliest tokens where each taught token of `examples` is predicted, in order."""
        teacher, k = self.teacher, self.config.top_k
        assert teacher is not None and k is not None
        by_example: dict[int, TopTokens] = {}
        for pack in pack_examples(examples, budget=self.config.memory.tokens_per_microbatch):
            moved = pack.to(self.learner.device)
            hidden, _ = teacher.predicting_states(moved.tokens, moved.segments, moved.completion_mask)
            top = chunked_top_tokens(
                hidden, Head(*output_head(teacher.model)), k=k, width=self.comparison.width,
                temperature=self.comparison.temperature, chunk_tokens=self.config.memory.logprob_chunk_tokens,
            )
            check_finite([("pack", top.logprobs)], "the log-probs of the teacher", fix=TAKE_ANOTHER)
            counts = [int(part.sum()) for part in pack.completion_mask.split(pack.segments.lengths)]
            parts = zip(*(tensor.cpu().split(counts) for tensor in top), strict=True)
            by_example |= {i: TopTokens(*part) for i, part in zip(pack.segments.sequence_ids, parts, strict=True)}
        return join([by_example[i] for i in range(len(examples))])

    def packs(self, name: str, examples: Sequence[Example], rows: Sequence[int]) -> list[Experience]:
        """Return the packs of some examples, each a sequence of its own, with the teacher's likeliest tokens if cached.
        """
        packs = pack_examples([examples[i] for i in rows], budget=self.config.memory.tokens_per_microbatch)
        if self._cached is None:
            return packs
        return [_taught(pack, [rows[i] for i in pack.segments.sequence_ids], self._cached) for pack in packs]

    def loss(self, output: StudentOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return (1 - w) T^2 divergence - w log p of each token [N]: Hinton et al. (2015), Sec. 2."""
        weight, scale = self.config.hard_label_weight, self.config.temperature**2
        metrics = {"divergence": output.divergence, "entropy": output.entropy, "cross_entropy": -output.logprobs}
        return (1 - weight) * scale * output.divergence - weight * output.logprobs, metrics

    @property
    def models_beside(self) -> dict[str, str]:
        """Description of the teacher."""
        return {"teacher": f"{self.config.teacher.name}, judges by tokens"}

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of the teacher."""
        return {"teacher": self._fingerprint}


class DistillTrainer(OfflineTrainer):
    """Trainer of offline distillation, on completions as `SFTTrainer` reads them; other arguments are its.

    Args:
        eval_dataset: prompts, as an `OnlineTrainer` reads them, on which the student's accuracy is measured.
        reward_funcs: the first one's value 1 means a right answer; nothing is learnt from it.
        evaluation: how accuracy is measured.

    Raises:
        ConfigError: the teacher does not fit the student; or accuracy is to be measured, and nothing says what is
            right.
    """

    config: DistillConfig
    algorithm: Distill
    algorithm_class = Distill
    size_field = "num_sequences"

    def __init__(
        self,
        model: Model,
        config: DistillConfig,
        train_dataset: Any,
        *,
        eval_dataset: DatasetLike | None = None,
        render_settings: RenderSettings | None = None,
        eval_render_settings: RenderSettings | None = None,
        reward_funcs: Reward | Sequence[Reward] = (),
        evaluation: EvaluationSettings | None = None,
        **options: Any,
    ) -> None:
        rewards = resolve_rewards(reward_funcs) if reward_funcs else []
        problems = held_out_problems(
            evaluation, rewards, SamplingSettings(), RolloutSettings(), needed=eval_dataset is not None
        )
        train = given_data(train_dataset, render_settings)
        held_out = given_held_out(eval_dataset, eval_render_settings, train)
        super().__init__(model, config, train, **options)
        self.held_out = problems.read(held_out, self.learner.model, self.tokenizer)
        self.identity.add_held_out(self.held_out.prompts, self.held_out.settings, train, held_out)

    def preflight(self) -> Preflight:
        """Return the examples, the held-out prompts, the scorer and the teacher; see `TrainingLoop.preflight`."""
        return replace(super().preflight(), held_out=self.held_out.prompts, scorer=self.held_out.scorer)

    @property
    def has_held_out(self) -> bool:
        """Whether there are held-out prompts."""
        return bool(self.held_out)

    def evaluate(self) -> EvaluationResult | None:
        """Return greedy and sampled accuracy on the held-out prompts."""
        if not self.held_out:
            return None
        engine = EmbeddedEngine(self.learner.model, self.tokenizer, RolloutSettings())
        return self.held_out.evaluate(engine, seed=self.config.seed)


def _taught(pack: Experience, rows: Sequence[int], cached: CachedTeacher) -> TaughtExperience:
    ids, logprobs, rest = join([cached.get(row) for row in rows])
    return TaughtExperience(
        pack.tokens, pack.segments, pack.completion_mask,
        teacher_ids=ids, teacher_logprobs=logprobs, teacher_rest=rest,
    )


def join(parts: Sequence[TopTokens]) -> TopTokens:
    """Return the tokens of several parts, one after another."""
    return TopTokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
