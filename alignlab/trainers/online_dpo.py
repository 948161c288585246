"""Online DPO: pairs of the policy's own completions, told apart by their rewards, and the losses of DPO on them.

Guo et al. (2024), arXiv:2402.04792, where the reward is an AI judge's preference; here it is any reward function's. A
prompt's best and worst completions are its pair. The loss does not depend on the weights that sampled a pair, so
rollouts may be learnt from several times, or come from older weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignlab.config.trainers import OnlineDPOConfig
from alignlab.data.packing import pack_groups
from alignlab.loop.algorithm import Algorithm, Credit, policy_learner
from alignlab.loop.forward import PolicyForward
from alignlab.loop.loss_weights import LossWeights, pair_mean
from alignlab.loop.online import OnlineTrainer
from alignlab.loop.online_inputs import OnlineInputs
from alignlab.loop.reference import Reference
from alignlab.models.kv_approximation.choice import replayed_approximation
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.trainers.pairs import loss_of_pairs
from alignlab.types import Experience, Prompt, Rollout, Segments


class OnlineDPO(Algorithm):
    """Direct preference optimisation on the policy's own rollouts. A mixture's routers choose its experts anew."""

    config: OnlineDPOConfig
    routing = "none"

    def __init__(self, config: OnlineDPOConfig, inputs: OnlineInputs) -> None:
        policy = Policy(
            inputs.model, chunk_tokens=config.memory.logprob_chunk_tokens,
            kv_approximation=replayed_approximation(config.rollout, inputs.model),
        )
        learner = policy_learner(config, inputs, policy, forward=PolicyForward(config.sampling.temperature))
        super().__init__(config, inputs, learner, reference=Reference(learner) if config.needs_reference else None)

    def needs(self, step: int) -> frozenset[str]:
        """Return "ref", unless the loss has no reference."""
        return frozenset({"ref"} if self.config.needs_reference else ())

    @property
    def loss_weights(self) -> LossWeights:
        """The same weight for every pair of the step."""
        return pair_mean

    def signal_groups(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return which groups [P] have a better and a worse completion."""
        return torch.tensor([self.pair(rollout) is not None for rollout in rollouts])

    def pair(self, rollout: Rollout) -> tuple[int, int] | None:
        """Return the places of the best and the worst completion; None where fewer than two can be told apart."""
        [is_trained] = self.trained_completions([rollout]).tolist()
        candidates = [i for i, usable in enumerate(is_trained) if usable]
        if not candidates:
            return None
        best, worst = (choose(candidates, key=rollout.rewards.__getitem__) for choose in (max, min))
        return None if rollout.rewards[best] == rollout.rewards[worst] else (best, worst)

    def pack(self, rollouts: Sequence[Rollout]) -> list[Experience]:
        """Return the pairs alone, each in one pack; without any, a pack of which nothing is trained."""
        pairs = [(rollout, self.pair(rollout)) for rollout in rollouts]
        groups = [
            replace(rollout, completions=tuple(rollout.completions[i] for i in places))
            for rollout, places in pairs
            if places is not None
        ]
        if groups:
            return pack_groups(groups, budget=self.config.memory.tokens_per_microbatch)
        return [_idle_pack(rollouts[0].prompt)]  # every rank needs a pack, so that all run the same collectives

    def credit(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]) -> Credit:
        """Return 1 for a chosen completion, -1 for a rejected one, 0 for others; the packs are of pairs already."""
        advantages = torch.zeros(len(rollouts), self.config.group_size)
        pairs = [self.pair(rollout) for rollout in rollouts]
        for row, pair in zip(advantages, pairs, strict=True):
            if pair is not None:
                row[pair[0]], row[pair[1]] = 1.0, -1.0
        return Credit(advantages, [list(packs) for packs in minibatches], self._counts(rollouts, pairs))

    def _counts(self, rollouts: Sequence[Rollout], pairs: Sequence[tuple[int, int] | None]) -> dict[str, float]:
        """Count the groups with a pair, of equal rewards, and with fewer than two completions with a reward."""
        num_unrewarded = sum(int(trainable.sum()) < 2 for trainable in self.trainable_mask(rollouts))
        num_pairs = sum(pair is not None for pair in pairs)
        num_tied = len(pairs) - num_pairs - num_unrewarded
        counts = {"num_pairs": num_pairs, "groups_tied": num_tied, "groups_unrewarded": num_unrewarded}
        totals = self.ranks.sum(torch.tensor([float(count) for count in counts.values()]))
        return dict(zip(counts, totals.tolist(), strict=True))

    def loss(self, output: PolicyOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss [P] of each pair, and metrics [P]."""
        return loss_of_pairs(output, pack, self.config)

    def update(self, step: int, packs: Sequence[Experience]) -> dict[str, float]:
        """Take one optimizer step on the pairs of a mini-batch; metrics are means over pairs."""
        return self.learner.update(packs, self.loss, self.loss_weights, metric_weights=pair_mean)


class OnlineDPOTrainer(OnlineTrainer):
    """Trainer of online DPO; arguments are `OnlineTrainer`'s."""

    config: OnlineDPOConfig
    algorithm_class = OnlineDPO


def _idle_pack(prompt: Prompt) -> Experience:
    """Return a prompt as a pack in which no sequence ends and no token is trained."""
    tokens = torch.tensor(prompt.token_ids)
    segments = Segments((len(tokens),), (-1,), (-1,), (0,))
    return Experience(tokens, segments, torch.zeros(len(tokens), dtype=torch.bool))
