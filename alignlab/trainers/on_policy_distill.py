"""On-policy distillation: the student samples, and its teacher's log-probs are its reward, token by token.

The policy gradient of the reverse KL, on the path of GRPO: Agarwal et al. (2023), GKD, arXiv:2306.13649; Gu et al.
(2023), MiniLLM, arXiv:2306.08543; Lu (2025), "On-Policy Distillation", Thinking Machines. Only the log-probs of sampled
tokens are asked for, so that neither model's distribution over the vocabulary is ever compared, and the teacher may be
of any architecture and, with `alignment: text`, of any tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignlab.config.trainers import OnPolicyDistillConfig
from alignlab.data.alignment import TextAligner
from alignlab.data.vocabulary import num_token_ids
from alignlab.errors import ConfigError
from alignlab.functional.advantages import group_normalized
from alignlab.functional.kl import kl_k1
from alignlab.functional.reverse_kl import reverse_kl_advantages
from alignlab.models.attention import causal_lm, num_embeddings
from alignlab.models.checkpoints import load_tokenizer
from alignlab.models.policy import Policy
from alignlab.trainers.assemble import Model, Reward
from alignlab.trainers.given_data import Dataset
from alignlab.trainers.grpo import spread
from alignlab.trainers.objective import PolicyObjective
from alignlab.trainers.online import OnlineTrainer
from alignlab.trainers.preflight import with_room
from alignlab.trainers.reduction import Weigh, sequence_means, token_mean
from alignlab.trainers.teacher import check_same_tokens, check_width, load_teacher, readable_part
from alignlab.trainers.teacher_scores import TeacherScores, TextScores, TokenScores
from alignlab.training.checkpoint import fingerprint_of_model
from alignlab.types import Experience, Rollout


class DistillObjective(PolicyObjective):
    """A policy gradient whose advantages are made of the student's own log-probs."""

    def needs(self, step: int) -> frozenset[str]:
        """Old log-probs at every step."""
        return super().needs(step) | {"old"}


class OnPolicyDistillTrainer(OnlineTrainer):
    """On-policy distillation; arguments are `OnlineTrainer`'s, and reward functions may be left out.

    Attributes:
        teacher: frozen, of `config.teacher`.
    """

    config: OnPolicyDistillConfig

    def __init__(
        self,
        model: Model,
        reward_funcs: Reward | Sequence[Reward],
        config: OnPolicyDistillConfig,
        train_dataset: Dataset,
        **options: Any,
    ) -> None:
        if config.task_weight > 0 and not reward_funcs:
            raise ConfigError(f"task_weight is {config.task_weight}, and there are no reward_funcs; give one, or use 0")
        tokenizer = load_tokenizer(config.teacher.name)
        super().__init__(model, reward_funcs, config, train_dataset, **options)
        ids = num_token_ids(self.tokenizer if config.alignment == "tokens" else tokenizer)
        self.teacher = load_teacher(
            config.teacher, self.learner.device, chunk_tokens=config.logprob_chunk_tokens, num_ids=ids
        )
        self._teacher_fingerprint = fingerprint_of_model(self.teacher.model)
        self.scores = self._make_scores(tokenizer)

    def _make_scores(self, tokenizer: Any) -> TeacherScores:
        if self.config.alignment == "tokens":
            check_same_tokens(tokenizer, self.tokenizer)
            check_width(causal_lm(self.teacher.model), self.tokenizer, rows=num_embeddings(self.learner.model))
            self._keep_prompts_with_room(tokenizer, [prompt.token_ids for prompt in self.prompts])
            return TokenScores(self.learner, self.teacher)
        aligner = TextAligner(self.tokenizer, tokenizer, self.render_settings)
        check_width(causal_lm(self.teacher.model), tokenizer)
        # What its template refuses, or is too long for it, is said before anything is sampled.
        self._keep_prompts_with_room(tokenizer, aligner.prompt_ids(self.prompts))
        return TextScores(self.learner, self.teacher, aligner, budget=self.config.tokens_per_microbatch)

    def _keep_prompts_with_room(self, tokenizer: PreTrainedTokenizerBase, read_as: Sequence[Sequence[int]]) -> None:
        """Leave out prompts that the teacher, which reads them as `read_as`, has no room for."""
        self.keep_prompts(
            with_room(
                self.prompts, self.teacher.model, self.config, self.render_settings,
                whose="the teacher", tokenizer=tokenizer, read_as=read_as,
            )
        )

    def make_objective(self, config: OnPolicyDistillConfig, policy: Policy) -> DistillObjective:
        """The policy gradient."""
        return DistillObjective(config, policy)

    @property
    def weigh(self) -> Weigh:
        """Every token of the step weighs the same."""
        return token_mean

    def teaches(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which completions [P, G] are trained on: the teacher judges those without a reward too."""
        return self.whole(rollouts)

    def credit(
        self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]
    ) -> tuple[Tensor, list[list[Experience]]]:
        """The reverse KL's advantage of each token, and the task's; a completion's is the mean of its tokens'."""
        device = self.learner.device
        teaches, task = self.teaches(rollouts).to(device), self.task_advantages(rollouts).to(device)
        credited: list[list[Experience]] = []
        means: list[Tensor] = []
        totals = torch.zeros(4, device=device)
        for part, whole_packs in zip(self.minibatches(len(rollouts)), minibatches, strict=True):
            packs = [self._judged(pack) for pack in whole_packs]
            scores, judged = self.scores.of(rollouts[part], packs)
            taught = teaches[part].flatten() & judged
            spread_packs = [spread(pack, task[part].flatten(), taught) for pack in packs]
            totals += self._totals(spread_packs, scores, judged)
            credited.append(
                [self._credit_pack(pack, score, len(taught)) for pack, score in zip(spread_packs, scores, strict=True)]
            )
            means.append(sequence_means(credited[-1], len(taught)))
        self._measure(totals)
        return torch.cat(means).view_as(task), credited

    def _judged(self, pack: Experience) -> Experience:
        """The part of a pack that a teacher of the student's tokens can judge: tokens of the tokenizer."""
        if self.config.alignment == "text":
            return pack
        return readable_part(pack, num_token_ids(self.tokenizer), with_first_unknown=False)

    def task_advantages(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Weighted advantage [P, G] of each completion's reward in its group; 0 where it has none."""
        if self.config.task_weight == 0:
            return torch.zeros(len(rollouts), self.config.group_size)
        return self.config.task_weight * group_normalized(torch.tensor([rollout.rewards for rollout in rollouts]))

    def _credit_pack(self, pack: Experience, teacher_logprobs: Tensor, num_sequences: int) -> Experience:
        """The pack, whose tokens have the task's advantage, with the teacher's added."""
        assert pack.old_logprobs is not None and pack.advantages is not None
        advantages = reverse_kl_advantages(
            teacher_logprobs, pack.old_logprobs, mask=pack.completion_mask,
            sequence_ids=pack.segments.sequence_of_token, num_sequences=num_sequences, discount=self.config.discount,
            normalize_length=self.config.normalize_length,
        )
        return replace(pack, advantages=pack.advantages + advantages)

    def _totals(self, packs: Sequence[Experience], scores: Sequence[Tensor], judged: Tensor) -> Tensor:
        """Sum of the reverse KL (k1) over trained tokens, how many they are; completions not judged, and all."""
        kl = judged.new_zeros((), dtype=torch.float32)
        for pack, score in zip(packs, scores, strict=True):
            assert pack.old_logprobs is not None
            kl = kl + kl_k1(pack.old_logprobs, score)[pack.completion_mask].sum()
        tokens = sum(int(pack.completion_mask.sum()) for pack in packs)
        return torch.stack([kl, *(kl.new_tensor(float(n)) for n in (tokens, int((~judged).sum()), len(judged)))])

    def _measure(self, totals: Tensor) -> None:
        """How far the student was from its teacher before this step, over all ranks."""
        kl, tokens, unaligned, completions = self.learner.reduce_sum(totals).tolist()
        self.credit_metrics = {"reverse_kl": kl / max(tokens, 1.0)}
        if self.config.alignment == "text":
            self.credit_metrics["unaligned_frac"] = unaligned / max(completions, 1.0)

    def frozen(self) -> dict[str, str]:
        """The teacher."""
        return super().frozen() | {"teacher": self._teacher_fingerprint}
