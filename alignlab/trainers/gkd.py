"""Generalised knowledge distillation: the student samples, and learns its teacher's distribution at each token of that.

Agarwal et al. (2023), GKD, arXiv:2306.13649, Algorithm 1. No gradient goes through the sampling. A fraction of the
prompts may be completed by the dataset instead.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from alignlab.config.trainers import GKDConfig
from alignlab.data.bad_row import BadRow
from alignlab.data.dataset import BadRows, keep
from alignlab.data.examples import completion_example
from alignlab.data.messages import check_text
from alignlab.data.preferences import writers_of
from alignlab.data.rendering import PromptRenderer
from alignlab.data.vocabulary import check_ids
from alignlab.errors import DataError
from alignlab.loop.algorithm import Algorithm, Credit, SampleGroups, minibatch_slices, policy_learner
from alignlab.loop.credit import spread
from alignlab.loop.online import OnlineTrainer
from alignlab.loop.online_inputs import OnlineInputs
from alignlab.loop.source import RolloutSource
from alignlab.loop.student import Comparison, Student, StudentForward, StudentOutput, shared_width
from alignlab.loop.teacher import load_teacher, load_teacher_tokenizer, prompts_with_room, readable_part
from alignlab.models.decoder import num_embeddings, num_positions
from alignlab.models.fingerprints import model_fingerprint
from alignlab.models.kv_approximation.choice import replayed_approximation
from alignlab.rollout.detokenizer import decode
from alignlab.types import Completion, Experience, Prompt, Rollout

COMPLETIONS = ("completion", "answer")


class GKD(Algorithm):
    """On-policy distillation by divergences.

    Attributes:
        teacher: frozen, of `config.teacher`.

    Raises:
        ConfigError: the teacher has other tokens than the student, or fewer logits.
        DataError: with `student_frac` below 1, a row has no completion.
    """

    config: GKDConfig

    def __init__(self, config: GKDConfig, inputs: OnlineInputs) -> None:
        chunk_tokens = config.memory.logprob_chunk_tokens
        tokenizer = load_teacher_tokenizer(config.teacher)
        self.teacher = load_teacher(config.teacher, inputs.accelerator.device, chunk_tokens=chunk_tokens)
        self._fingerprint = model_fingerprint(self.teacher.model)
        width = shared_width(self.teacher.model, tokenizer, inputs.model, inputs.tokenizer)
        student = Student(
            inputs.model, Comparison(config.beta, config.temperature, width), chunk_tokens=chunk_tokens,
            kv_approximation=replayed_approximation(config.rollout, inputs.model),
        )
        forward = StudentForward(config.sampling.temperature, self.teacher)
        prompts = prompts_with_room(inputs, self.teacher, config, tokenizer=inputs.tokenizer)
        self._dataset_completions: dict[int, Completion] = {}
        if config.student_frac < 1:
            self._dataset_completions = dataset_completions(prompts, inputs, self.teacher.model)
            has_completion = [prompt.index in self._dataset_completions for prompt in prompts]
            prompts = keep(prompts, has_completion, "no_completion")
        super().__init__(config, inputs, policy_learner(config, inputs, student, forward=forward), prompts=prompts)

    def sampling(self, source: RolloutSource) -> SampleGroups:
        """Return how groups are sampled: a fraction of the prompts by the student, the others by the dataset."""
        return MixedSampling(source, self.config.student_frac, self._dataset_completions)

    def trainable_mask(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return which completions [P, G] are trained on: no reward is needed."""
        return self.not_truncated(rollouts)

    def credit(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Credit:
        """Return an advantage of 0 for each completion: the loss has none."""
        trainable = self.trainable_mask(rollouts).to(self.learner.device)
        advantages = torch.zeros(trainable.shape, device=trainable.device)
        parts = minibatch_slices(len(rollouts), self.config.num_minibatches)
        num_ids = num_embeddings(self.teacher.model)
        return Credit(
            advantages,
            [
                [
                    readable_part(spread(pack, advantages[part].flatten(), trainable[part].flatten()), num_ids,
                                  with_first_unknown=True)
                    for pack in packs
                ]
                for part, packs in zip(parts, minibatches, strict=True)
            ],
        )

    def loss(self, output: StudentOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return T^2 divergence of each token [N]; see Hinton et al. (2015), arXiv:1503.02531, Sec. 2."""
        scale = self.config.temperature**2
        return scale * output.divergence, {"divergence": output.divergence, "entropy": output.entropy}

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The teacher, and a copy of the policy as the reference."""
        return [*super().frozen_modules, self.teacher]

    @property
    def models_beside(self) -> dict[str, str]:
        """Description of the teacher."""
        return {"teacher": f"{self.config.teacher.name}, judges by tokens"}

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of the teacher."""
        return super().frozen_fingerprints() | {"teacher": self._fingerprint}


class GKDTrainer(OnlineTrainer):
    """Trainer of GKD; arguments are `OnlineTrainer`'s, and reward functions may be left out."""

    config: GKDConfig
    algorithm_class = GKD


class MixedSampling:
    """Completes a fraction of the prompts by the student, and the others by the dataset; a `SampleGroups`.

    Args:
        source: samples and scores the student's completions.
        student_frac: fraction of the prompts that the student completes, in [0, 1].
        completions: the dataset's, by the index of their prompt; no reward scores them.
    """

    def __init__(self, source: RolloutSource, student_frac: float, completions: Mapping[int, Completion]) -> None:
        self._source, self._student_frac, self._completions = source, student_frac, completions

    def __call__(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        """Return one group for each prompt, in order."""
        draw = random.Random(seed)
        by_student = [draw.random() < self._student_frac for _ in prompts]
        sampled = [prompt for prompt, is_sampled in zip(prompts, by_student, strict=True) if is_sampled]
        rollouts = iter(self._source.sample(sampled, seed))  # also of none: ranks that share a vLLM sample together
        return [
            next(rollouts) if is_sampled else self._of_dataset(prompt)
            for prompt, is_sampled in zip(prompts, by_student, strict=True)
        ]

    def _of_dataset(self, prompt: Prompt) -> Rollout:
        completion = self._completions[prompt.index]
        versions = (self._source.engine.policy_version,) * len(completion.token_ids)
        parts = {name: (None,) for name in self._source.rewards.names}
        return Rollout(prompt, (replace(completion, policy_versions=versions),), (math.nan,), parts)


def dataset_completions(
    prompts: Sequence[Prompt], inputs: OnlineInputs, teacher: torch.nn.Module
) -> dict[int, Completion]:
    """Return the dataset's completions by the index of their prompt.

    Args:
        teacher: must have room for them, as the student must.

    Raises:
        DataError: a completion cannot be used and is not to be left out; or none can be used.
    """
    numbers = {prompt.index for prompt in prompts}
    if len(numbers) < len(prompts):
        raise DataError(
            f"{len(prompts)} prompts have {len(numbers)} different indices, and the dataset's completions are "
            "found by them; number the prompts (Prompt.index)"
        )
    settings = inputs.render_settings
    render = PromptRenderer(settings, inputs.tokenizer)
    limit = min(num_positions(model) for model in (inputs.model, teacher))
    completions: dict[int, Completion] = {}
    bad_rows = BadRows(settings)
    for prompt in prompts:
        with bad_rows.at(prompt.index):
            completions[prompt.index] = dataset_completion(prompt, render, limit)
    bad_rows.report(len(completions))
    rows = {"the student": num_embeddings(inputs.model), "the teacher": num_embeddings(teacher)}
    check_ids(((c.token_ids,) for c in completions.values()), rows, inputs.tokenizer, what="completion")
    return completions


def dataset_completion(prompt: Prompt, render: PromptRenderer, limit: float) -> Completion:
    """Return the dataset's completion of a prompt, with its end token; the assistant's tokens are those of the policy.

    Args:
        limit: of the tokens of prompt and completion together.

    Raises:
        BadRow: there is none, or it cannot be rendered, or is too long.
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
    ids = example.token_ids[len(prompt.token_ids) :]
    is_taught = example.completion_mask[len(prompt.token_ids) :]
    writers = writers_of(None if all(is_taught) else is_taught)
    return Completion.of(ids, decode(render.tokenizer, ids), writers=writers)
