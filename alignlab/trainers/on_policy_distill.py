"""On-policy distillation: the student samples, and its teacher's log-probs are its reward, token by token.

The policy gradient of the reverse KL, on the path of GRPO: Agarwal et al. (2023), GKD, arXiv:2306.13649; Gu et al.
(2023), MiniLLM, arXiv:2306.08543; Lu (2025), "On-Policy Distillation", Thinking Machines. Only log-probs of sampled
tokens are needed, never a distribution over the vocabulary, so the teacher may be of any architecture and, with
`alignment: text`, of any tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.config.trainers import OnPolicyDistillConfig
from alignlab.data.token_alignment import TextAligner
from alignlab.data.vocabulary import num_token_ids
from alignlab.errors import ConfigError
from alignlab.functional.advantages import group_normalized
from alignlab.functional.kl import kl_k1
from alignlab.functional.reverse_kl import reverse_kl_advantages
from alignlab.loop.algorithm import Credit, minibatch_slices, rewards_of
from alignlab.loop.credit import sequence_means, spread
from alignlab.loop.online import OnlineTrainer
from alignlab.loop.online_inputs import OnlineInputs
from alignlab.loop.teacher import (
    check_same_tokens,
    check_width,
    load_teacher,
    load_teacher_tokenizer,
    prompts_with_room,
    readable_part,
)
from alignlab.loop.teacher_scores import TeacherScores, TextScores, TokenScores
from alignlab.models.decoder import causal_lm, num_embeddings
from alignlab.models.fingerprints import model_fingerprint
from alignlab.trainers.policy_gradient import PolicyGradientAlgorithm
from alignlab.types import Experience, Rollout


class OnPolicyDistill(PolicyGradientAlgorithm):
    """A policy gradient whose advantages are the student's log-probs less its teacher's.

    Attributes:
        teacher: frozen, of `config.teacher`.
        scores: the teacher's log-probs on the student's tokens.
    """

    config: OnPolicyDistillConfig

    def __init__(self, config: OnPolicyDistillConfig, inputs: OnlineInputs) -> None:
        tokenizer = load_teacher_tokenizer(config.teacher)
        by_text = config.alignment == "text"
        if not by_text:
            check_same_tokens(tokenizer, inputs.tokenizer)
        self.teacher = load_teacher(
            config.teacher, inputs.accelerator.device, chunk_tokens=config.memory.logprob_chunk_tokens,
            num_ids=num_token_ids(tokenizer if by_text else inputs.tokenizer),
        )
        self._fingerprint = model_fingerprint(self.teacher.model)
        self._num_readable_ids = None if by_text else num_token_ids(inputs.tokenizer)
        aligner = TextAligner(inputs.tokenizer, tokenizer, inputs.render_settings) if by_text else None
        if aligner is None:
            check_width(causal_lm(self.teacher.model), inputs.tokenizer, rows=num_embeddings(inputs.model))
            read_as = None
        else:
            check_width(causal_lm(self.teacher.model), tokenizer)
            read_as = aligner.prompt_ids(inputs.prompts)  # a refusal of the teacher's template is raised here
        prompts = prompts_with_room(inputs, self.teacher, config, tokenizer=tokenizer, read_as=read_as)
        super().__init__(config, inputs, prompts=prompts)
        budget = config.memory.tokens_per_microbatch
        self.scores: TeacherScores = (
            TokenScores(self.learner, self.teacher)
            if aligner is None
            else TextScores(self.learner, self.teacher, aligner, budget=budget)
        )

    @classmethod
    def check_arguments(cls, config: Any, *, has_rewards: bool) -> None:
        """Raise a ConfigError if a task's reward is weighed, and there is none."""
        if config.task_weight > 0 and not has_rewards:
            raise ConfigError(f"task_weight is {config.task_weight}, and there are no reward_funcs; give one, or use 0")

    def needs(self, step: int) -> frozenset[str]:
        """Return "old" at every step, and what the objective needs."""
        return super().needs(step) | {"old"}

    def trainable_mask(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return which completions [P, G] are trained on: the teacher judges those without a reward too."""
        return self.not_truncated(rollouts)

    def credit(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Credit:
        """Return the reverse KL's advantage of each token plus the task's; a completion's is its tokens' mean."""
        device = self.learner.device
        trainable, task = self.trainable_mask(rollouts).to(device), self.task_advantages(rollouts).to(device)
        credited: list[list[Experience]] = []
        means: list[Tensor] = []
        totals = torch.zeros(4, device=device)
        parts = minibatch_slices(len(rollouts), self.config.num_minibatches)
        for part, packs in zip(parts, minibatches, strict=True):
            readable = [self._readable_part(pack) for pack in packs]
            scores, is_judged = self.scores.of(rollouts[part], readable)
            trained = trainable[part].flatten() & is_judged
            spread_packs = [spread(pack, task[part].flatten(), trained) for pack in readable]
            totals += _totals(spread_packs, scores, is_judged)
            credited.append(
                [self._credit_pack(pack, score, len(trained)) for pack, score in zip(spread_packs, scores, strict=True)]
            )
            means.append(sequence_means(credited[-1], len(trained)))
        return Credit(torch.cat(means).view_as(task), credited, self._measure(totals))

    def _readable_part(self, pack: Experience) -> Experience:
        """Return the part of a pack that the teacher can judge: a padded student may draw ids without a token."""
        if self._num_readable_ids is None:
            return pack
        return readable_part(pack, self._num_readable_ids, with_first_unknown=False)

    def task_advantages(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return the weighted advantage [P, G] of each completion's reward in its group; 0 where it has none."""
        if self.config.task_weight == 0:
            return torch.zeros(len(rollouts), self.config.group_size)
        return self.config.task_weight * group_normalized(rewards_of(rollouts))

    def _credit_pack(self, pack: Experience, teacher_logprobs: Tensor, num_sequences: int) -> Experience:
        """Return the pack, whose tokens have the task's advantage, with the teacher's added."""
        assert pack.old_logprobs is not None and pack.advantages is not None
        advantages = reverse_kl_advantages(
            teacher_logprobs, pack.old_logprobs, mask=pack.completion_mask,
            sequence_ids=pack.segments.sequence_of_token, num_sequences=num_sequences, discount=self.config.discount,
            normalize_length=self.config.normalize_length,
        )
        return replace(pack, advantages=pack.advantages + advantages)

    def _measure(self, totals: Tensor) -> dict[str, float]:
        """Return the distance of the student from its teacher before this step, over all ranks."""
        kl, tokens, unaligned, completions = self.ranks.sum(totals).tolist()
        metrics = {"reverse_kl": kl / max(tokens, 1.0)}
        if self.config.alignment == "text":
            metrics["unaligned_frac"] = unaligned / max(completions, 1.0)
        return metrics

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The teacher, and a copy of the policy as the reference."""
        return [*super().frozen_modules, self.teacher]

    @property
    def models_beside(self) -> dict[str, str]:
        """Description of the teacher."""
        return {"teacher": f"{self.config.teacher.name}, judges by {self.config.alignment}"}

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of the reference and the teacher."""
        return super().frozen_fingerprints() | {"teacher": self._fingerprint}


class OnPolicyDistillTrainer(OnlineTrainer):
    """Trainer of on-policy distillation; arguments are `OnlineTrainer`'s, and reward functions may be left out."""

    config: OnPolicyDistillConfig
    algorithm_class = OnPolicyDistill


def _totals(packs: Sequence[Experience], scores: Sequence[Tensor], is_judged: Tensor) -> Tensor:
    """Return the sum of the reverse KL (k1) over trained tokens, their number, and completions not judged and in all.
    """
    kl = is_judged.new_zeros((), dtype=torch.float32)
    for pack, score in zip(packs, scores, strict=True):
        assert pack.old_logprobs is not None
        kl = kl + kl_k1(pack.old_logprobs, score)[pack.completion_mask].sum()
    tokens = sum(int(pack.completion_mask.sum()) for pack in packs)
    counts = (tokens, int((~is_judged).sum()), len(is_judged))
    return torch.stack([kl, *(kl.new_tensor(float(count)) for count in counts)])
