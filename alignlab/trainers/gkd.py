"""Generalised knowledge distillation: the student samples, and learns its teacher's distribution at each token of that.

Agarwal et al. (2023), GKD, arXiv:2306.13649, Algorithm 1. No gradient goes through the sampling. A fraction of the
prompts may be completed by the dataset instead.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignlab.config.trainers import GKDConfig
from alignlab.data.examples import completion_example
from alignlab.data.messages import BadRow, check_text
from alignlab.data.preferences import Mask
from alignlab.data.prompts import count_or_raise, report
from alignlab.data.rendering import PromptRenderer
from alignlab.data.vocabulary import check_ids
from alignlab.errors import DataError
from alignlab.models.attention import num_embeddings, num_positions
from alignlab.models.checkpoints import load_tokenizer
from alignlab.models.policy import Policy
from alignlab.rollout.detokenizer import decode
from alignlab.trainers.assemble import Model, Reward
from alignlab.trainers.distilling import (
    Comparison,
    StudentLearner,
    StudentOutput,
    StudentPolicy,
    shared_width,
)
from alignlab.trainers.given_data import Dataset
from alignlab.trainers.grpo import spread
from alignlab.trainers.online import OnlineTrainer
from alignlab.trainers.preflight import with_room
from alignlab.trainers.reduction import Weigh, token_mean
from alignlab.trainers.teacher import load_teacher, readable_part
from alignlab.training.checkpoint import fingerprint_of_model
from alignlab.types import Completion, Experience, Prompt, Rollout

COMPLETIONS = ("completion", "answer")


class DivergenceObjective:
    """How far the student is from its teacher; an `Objective`. There is no state."""

    uses_reference = False
    entropy_grad = False
    routing: Literal["rollout", "trainer", "none"] = "rollout"

    def __init__(self, temperature: float) -> None:
        self._scale = temperature**2

    def needs(self, step: int) -> frozenset[str]:
        """Nothing: the teacher is asked with each pack."""
        return frozenset()

    def __call__(self, output: StudentOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """T^2 divergence of each token [N]; see Hinton et al. (2015), arXiv:1503.02531, Sec. 2."""
        return self._scale * output.divergence, {"divergence": output.divergence, "entropy": output.entropy}

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class GKDTrainer(OnlineTrainer):
    """On-policy distillation by divergences; arguments are `OnlineTrainer`'s, and reward functions may be left out.

    Raises:
        ConfigError: the teacher has other tokens than the student, or fewer logits.
        DataError: with `student_frac` below 1, a row has no completion.
    """

    config: GKDConfig
    learner: StudentLearner

    def __init__(
        self,
        model: Model,
        reward_funcs: Reward | Sequence[Reward],
        config: GKDConfig,
        train_dataset: Dataset,
        **options: Any,
    ) -> None:
        super().__init__(model, reward_funcs, config, train_dataset, **options)
        self._teacher_fingerprint = fingerprint_of_model(self.teacher.model)
        fit = with_room(
            self.prompts, self.teacher.model, config, self.render_settings, whose="the teacher",
            tokenizer=self.tokenizer,
        )
        self._given = self._given_completions(fit) if config.student_frac < 1 else {}
        self.keep_prompts([prompt for prompt in fit if prompt.index in self._given] if self._given else fit)

    def _given_completions(self, prompts: Sequence[Prompt]) -> dict[int, tuple[tuple[int, ...], Mask]]:
        """Return the dataset's completions by the index of their prompt.

        Raises:
            DataError: one cannot be used, and is not to be left out; or none can.
        """
        numbers = {prompt.index for prompt in prompts}
        if len(numbers) < len(prompts):
            raise DataError(
                f"{len(prompts)} prompts have {len(numbers)} different indices, and the dataset's completions are "
                "found by them; number the prompts (Prompt.index)"
            )
        render = PromptRenderer(self.render_settings, self.tokenizer)
        limit = min(num_positions(each.model) for each in (self.learner.policy, self.teacher))
        given: dict[int, tuple[tuple[int, ...], Mask]] = {}
        skipped: Counter[str] = Counter()
        for prompt in prompts:
            try:
                given[prompt.index] = given_completion(prompt, render, limit)
            except BadRow as error:
                count_or_raise(skipped, error, prompt.index, self.render_settings)
        report(len(given), skipped, self.render_settings)
        models = {"the student": self.learner.model, "the teacher": self.teacher.model}
        rows = {whose: num_embeddings(model) for whose, model in models.items()}
        check_ids(((ids,) for ids, _ in given.values()), rows, self.tokenizer, what="completion")
        return given

    def make_policy(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: GKDConfig) -> StudentPolicy:
        """The student, and beside it the teacher."""
        device, chunk_tokens = next(model.parameters()).device, config.logprob_chunk_tokens
        self.teacher = load_teacher(config.teacher, device, chunk_tokens=chunk_tokens)
        width = shared_width(self.teacher.model, load_tokenizer(config.teacher.name), model, tokenizer)
        return StudentPolicy(model, Comparison(config.beta, config.temperature, width), chunk_tokens=chunk_tokens)

    def make_learner(self, policy: Any, config: GKDConfig, accelerator: Accelerator, **options: Any) -> StudentLearner:
        """The student's, which asks the teacher."""
        options.pop("entropy_grad")
        return StudentLearner(policy, config, accelerator, teacher=self.teacher, **options)

    def make_objective(self, config: GKDConfig, policy: Policy) -> DivergenceObjective:  # type: ignore[override]
        """The divergence."""
        return DivergenceObjective(config.temperature)

    @property
    def weigh(self) -> Weigh:
        """Every completion token of the step weighs the same."""
        return token_mean

    def generate(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        """A completion of each prompt by the student, scored; or the dataset's, which no reward is asked about."""
        draw = random.Random(seed)
        sampled = [draw.random() < self.config.student_frac for _ in prompts]
        own = [prompt for prompt, by_student in zip(prompts, sampled, strict=True) if by_student]
        rollouts = iter(super().generate(own, seed) if own else [])
        return [
            next(rollouts) if by_student else self._rollout_of_dataset(prompt)
            for prompt, by_student in zip(prompts, sampled, strict=True)
        ]

    def _rollout_of_dataset(self, prompt: Prompt) -> Rollout:
        ids, own = self._given[prompt.index]
        text, version = decode(self.tokenizer, ids), self.engine.policy_version
        completion = Completion(ids, text, (0.0,) * len(ids), None, "stop", (version,) * len(ids), own=own)
        return Rollout(prompt, (completion,), (math.nan,), {name: (None,) for name in self.rewards.names})

    def teaches(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which completions [P, G] are trained on: no reward is needed."""
        return self.whole(rollouts)

    def credit(
        self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]
    ) -> tuple[Tensor, list[list[Experience]]]:
        """No completion has an advantage: 0."""
        teaches = self.teaches(rollouts).to(self.learner.device)
        advantages = torch.zeros(teaches.shape, device=teaches.device)
        return advantages, [
            [self._judged(spread(pack, advantages[part].flatten(), teaches[part].flatten())) for pack in packs]
            for part, packs in zip(self.minibatches(len(rollouts)), minibatches, strict=True)
        ]

    def _judged(self, pack: Experience) -> Experience:
        """The part of a pack that the teacher can read."""
        return readable_part(pack, num_embeddings(self.teacher.model), with_first_unknown=True)

    def frozen(self) -> dict[str, str]:
        """The teacher."""
        return super().frozen() | {"teacher": self._teacher_fingerprint}


def given_completion(prompt: Prompt, render: PromptRenderer, limit: float) -> tuple[tuple[int, ...], Mask]:
    """The tokens with which the dataset completes a prompt, the end token among them, and which are the assistant's.

    Args:
        limit: of the tokens of both together.

    Raises:
        BadRow: it does not, or they cannot be rendered, or are too many.
    """
    text = next((prompt.columns[name] for name in COMPLETIONS if prompt.columns.get(name) is not None), None)
    if text is None:
        raise BadRow(
            "missing_column",
            f"has neither {' nor '.join(COMPLETIONS)}, and student_frac is below 1: the dataset completes the other "
            "prompts; add the column, or use student_frac 1",
        )
    completion = check_text(text if isinstance(text, list) else str(text), "the completion")
    example = completion_example(prompt.text, completion, render.of_row(prompt.columns, prompt.index))
    if example.token_ids[: len(prompt.token_ids)] != prompt.token_ids:
        raise BadRow("unstable_template", "begins otherwise with its completion than without; use student_frac 1")
    if len(example.token_ids) > limit:
        raise BadRow(
            "no_room",
            f"has {len(example.token_ids)} tokens with its completion, and the student and its teacher have {limit:g} "
            "positions; shorten it",
        )
    own = example.completion_mask[len(prompt.token_ids) :]
    return example.token_ids[len(prompt.token_ids) :], None if all(own) else own
