"""What a batch of rollouts looks like: rewards, lengths, endings."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignlab.data.vocabulary import num_token_ids
from alignlab.functional.advantages import mixed_groups
from alignlab.models.attention import num_embeddings
from alignlab.types import Rollout

logger = logging.getLogger(__name__)


def rollout_metrics(
    rollouts: Sequence[Rollout], policy_version: int, reduce_sum: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Means over the completions of all ranks; `reduce_sum` adds over ranks, and every rank calls this together.

    `accuracy` is the fraction of completions to which the first reward function gave exactly 1, of those it applied
    to; `mixed_groups` the fraction of groups whose rewards differ, which are those that teach; `staleness` by how many
    versions the weights that sampled a token are behind `policy_version`. Without reward functions there is nothing of
    rewards.
    """
    names = list(rollouts[0].reward_parts)
    sums = _sums(rollouts, policy_version) | _sums_of_parts(rollouts, names)
    totals = reduce_sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    t = dict(zip(sums, totals, strict=True))
    completions = max(t["completions"], 1)
    return (_of_rewards(t, names) if names else {}) | {
        "completion_tokens": t["num_completion_tokens"] / completions,
        "staleness": t["behind"] / max(t["num_completion_tokens"], 1),
        "truncated_frac": t["truncated"] / completions,
        "num_completion_tokens": t["num_completion_tokens"],
    }


class PaddingTokens:
    """Counts sampled ids for which the tokenizer has no token: rows with which the model's vocabulary is padded.

    A trained model gives such rows next to no probability. They decode to nothing, and are trained on as any token is;
    distillation leaves out what a teacher cannot read.

    Args:
        model: the policy.
        tokenizer: the policy's.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self._num_ids, self._num_rows = num_token_ids(tokenizer), num_embeddings(model)
        self._said = False

    def metrics(
        self, rollouts: Sequence[Rollout], reduce_sum: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Return `padding_frac`, the fraction of sampled ids without a token, over all ranks, which call this together;
        nothing for a model without such rows. The first time that there is one is said in the log."""
        if self._num_rows <= self._num_ids:
            return {}
        ids = [index for rollout in rollouts for completion in rollout.completions for index in completion.token_ids]
        counts = torch.tensor([sum(index >= self._num_ids for index in ids), len(ids)], dtype=torch.float64)
        without_token, total = reduce_sum(counts).tolist()
        if without_token and not self._said:
            self._said = True
            logger.warning(
                "the policy sampled %d of %d ids that its tokenizer has no token for, from %d on, where its vocabulary "
                "is padded to %d rows; metric padding_frac counts them. To remove such rows, resize the model before "
                "training: model.resize_token_embeddings(%d)",
                without_token, total, self._num_ids, self._num_rows, self._num_ids,
            )  # fmt: skip
        return {"padding_frac": without_token / max(total, 1)}


def _of_rewards(t: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    rewarded = max(t["rewarded"], 1)
    mean = t["reward"] / rewarded if t["rewarded"] else math.nan  # none is not 0
    return {
        "reward": mean,
        "reward_std": math.sqrt(max(t["reward_squared"] / rewarded - mean * mean, 0.0)) if t["rewarded"] else math.nan,
        "accuracy": t["right"] / max(t[f"count/{names[0]}"], 1),
        "mixed_groups": t["mixed"] / max(t["groups"], 1),
        **{f"reward/{name}": t[f"sum/{name}"] / max(t[f"count/{name}"], 1) for name in names},
    }


def _sums(rollouts: Sequence[Rollout], policy_version: int) -> dict[str, float]:
    completions = [c for rollout in rollouts for c in rollout.completions]
    rewards = [r for rollout in rollouts for r in rollout.rewards if not math.isnan(r)]
    return {
        "completions": len(completions),
        "num_completion_tokens": sum(len(c.token_ids) for c in completions),
        "behind": sum(policy_version - version for c in completions for version in c.policy_versions),
        "truncated": sum(c.finish_reason == "length" for c in completions),
        "groups": len(rollouts),
        "mixed": int(mixed_groups(torch.tensor([rollout.rewards for rollout in rollouts])).sum()),
        "rewarded": len(rewards),
        "reward": sum(rewards),
        "reward_squared": sum(r * r for r in rewards),
    }


def _sums_of_parts(rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, float]:
    """Of each reward function's values; and how many of the first one's are right."""
    sums: dict[str, float] = {}
    for name in names:
        values = [v for rollout in rollouts for v in rollout.reward_parts[name] if v is not None]
        sums |= {f"count/{name}": len(values), f"sum/{name}": sum(values)}
        sums.setdefault("right", sum(value == 1.0 for value in values))
    return sums
