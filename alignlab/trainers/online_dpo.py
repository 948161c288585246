"""Online DPO: pairs of the policy's own completions, told apart by their rewards, and the losses of DPO on them.

Guo et al. (2024), arXiv:2402.04792, where the reward is an AI judge's preference; here it is any reward function's. A
prompt's best and worst completions are its pair. The loss does not ask which weights sampled a pair, so rollouts may be
learnt from several times, or come from older weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignlab.config.trainers import OnlineDPOConfig
from alignlab.data.packing import pack_groups, pack_rollouts
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.trainers.objective import Objective
from alignlab.trainers.online import OnlineTrainer
from alignlab.trainers.pairs import pair_token_loss
from alignlab.trainers.reduction import Weigh, pair_mean
from alignlab.types import Experience, Rollout


class PairObjective:
    """The loss of pairs; an `Objective`. A mixture's experts are those that its routers choose now.

    Args:
        config: the trainer's section.
    """

    def __init__(self, config: OnlineDPOConfig) -> None:
        self.config = config
        self.uses_reference = config.needs_reference
        self.entropy_grad = False
        self.routing: Literal["rollout", "trainer", "none"] = "none"

    def needs(self, step: int) -> frozenset[str]:
        """The reference's log-probs, unless the loss is of none."""
        return frozenset({"ref"} if self.uses_reference else ())

    def __call__(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each pair, on one token of it [N]; metrics likewise."""
        return pair_token_loss(output, experience, self.config)

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""


class OnlineDPOTrainer(OnlineTrainer):
    """Direct preference optimisation on its own rollouts; arguments are `OnlineTrainer`'s."""

    config: OnlineDPOConfig

    def make_objective(self, config: OnlineDPOConfig, policy: Policy) -> Objective:
        """The loss of pairs."""
        return PairObjective(config)

    @property
    def weigh(self) -> Weigh:
        """Every pair of the step weighs the same."""
        return pair_mean

    def informative(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which groups [P] have a better and a worse completion."""
        return torch.tensor([self.pair(rollout) is not None for rollout in rollouts])

    def pair(self, rollout: Rollout) -> tuple[int, int] | None:
        """Places of the best and the worst completion; None where fewer than two can be told apart."""
        [teaches] = self.teaches([rollout]).tolist()
        able = [i for i, known in enumerate(teaches) if known and rollout.completions[i].token_ids]
        if not able:
            return None
        best, worst = (choose(able, key=rollout.rewards.__getitem__) for choose in (max, min))
        return None if rollout.rewards[best] == rollout.rewards[worst] else (best, worst)

    def pack(self, rollouts: Sequence[Rollout]) -> list[Experience]:
        """The pairs alone, each in one pack; without any, a pack of which nothing is trained, as every rank needs one.
        """
        budget = self.config.tokens_per_microbatch
        found = [(rollout, self.pair(rollout)) for rollout in rollouts]
        pairs = [replace(r, completions=tuple(r.completions[i] for i in pair)) for r, pair in found if pair is not None]
        if pairs:
            return pack_groups(pairs, budget=budget)
        idle = pack_rollouts(rollouts[:1], budget=budget)
        return [replace(pack, completion_mask=torch.zeros_like(pack.completion_mask)) for pack in idle]

    def credit(
        self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]
    ) -> tuple[Tensor, list[list[Experience]]]:
        """1 for a chosen completion, -1 for a rejected one, 0 for the others; the packs are of pairs already."""
        advantages = torch.zeros(len(rollouts), self.config.group_size)
        pairs = [self.pair(rollout) for rollout in rollouts]
        for row, pair in zip(advantages, pairs, strict=True):
            if pair is not None:
                row[pair[0]], row[pair[1]] = 1.0, -1.0
        self._count(rollouts, pairs)
        return advantages, [list(packs) for packs in minibatches]

    def _count(self, rollouts: Sequence[Rollout], pairs: Sequence[tuple[int, int] | None]) -> None:
        """How many groups have a pair, are of equal rewards, or have fewer than two completions with a reward."""
        few = sum(int(known.sum()) < 2 for known in self.teaches(rollouts))
        with_pair = sum(pair is not None for pair in pairs)
        counts = {"num_pairs": with_pair, "groups_tied": len(pairs) - with_pair - few, "groups_unrewarded": few}
        totals = self.learner.reduce_sum(torch.tensor([float(count) for count in counts.values()]))
        self.credit_metrics = dict(zip(counts, totals.tolist(), strict=True))

    def learn(self, step: int, packs: Sequence[Experience]) -> dict[str, float]:
        """One optimizer step on the pairs of a mini-batch, whose metrics are means over pairs."""
        return self.learner.update(packs, self.loss, self.weigh, measure=pair_mean)
