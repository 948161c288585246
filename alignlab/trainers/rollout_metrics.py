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
    rollouts: Sequence[Rollout],
    policy_version: int,
    reduce_sum: Callable[[Tensor], Tensor],
    *,
    trainable: Tensor | None = None,
    informative: Tensor | None = None,
) -> dict[str, float]:
    """Means over the completions of all ranks; `reduce_sum` adds over ranks, and every rank calls this together.

    - `reward`, `reward_std`: of the completions that have a reward; nan where none has.
    - `reward/<name>`: mean of a function's values, over the completions that it applied to; `applied_frac/<name>`: what
      fraction they are. A function that applied to none has no mean.
    - `accuracy`: fraction of completions to which the first reward function gave exactly 1, of those it applied to.
    - `unrewarded_frac`: fraction of completions to which no function gave a value.
    - `mixed_groups`: fraction of groups whose rewards differ; there is none where a group is one completion.
    - `staleness`: by how many versions the weights that sampled a token are behind `policy_version`.

    Without reward functions there is nothing of rewards.

    Args:
        trainable: [P, G] completions that are trained on, for `trainable_frac`.
        informative: [P] groups that can teach, for `informative_frac`; see `OnlineTrainer.informative`.
    """
    names = list(rollouts[0].reward_parts)
    sums = _sums(rollouts, policy_version) | _sums_of_parts(rollouts, names)
    for name, counted in (("trainable", trainable), ("informative", informative)):
        sums |= {} if counted is None else {name: int(counted.sum())}
    totals = reduce_sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    t = dict(zip(sums, totals, strict=True))
    completions = max(t["completions"], 1)
    metrics = (_of_rewards(t, names) if names else {}) | {
        "completion_tokens": t["num_completion_tokens"] / completions,
        "staleness": t["behind"] / max(t["num_completion_tokens"], 1),
        "truncated_frac": t["truncated"] / completions,
        "num_completion_tokens": t["num_completion_tokens"],
    }
    if trainable is not None:
        metrics["trainable_frac"] = t["trainable"] / completions
    if informative is not None:
        metrics["informative_frac"] = t["informative"] / max(t["rollouts"], 1)
    return metrics


def reward_range(rollouts: Sequence[Rollout], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """`reward_min` and `reward_max` over all ranks, which call this together; neither where no completion has a reward.

    Args:
        gather: stacks the rows of all ranks.
    """
    rewards = torch.tensor([r for rollout in rollouts for r in rollout.rewards], dtype=torch.float64)
    low, high = extremes(rewards, gather)
    return {"reward_min": low, "reward_max": high} if low <= high else {}


def extremes(rewards: Tensor, gather: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Smallest and largest reward over all ranks, which call this together; inf and -inf without any but nan.

    Args:
        gather: stacks the rows of all ranks.
    """
    known = rewards[~rewards.isnan()].flatten().double()
    ends = [float(known.min()), float(known.max())] if len(known) else [math.inf, -math.inf]
    everyone = gather(torch.tensor([ends], dtype=torch.float64))
    return float(everyone[:, 0].min()), float(everyone[:, 1].max())


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
    rewarded, completions = t["rewarded"], max(t["completions"], 1)
    mean = t["reward"] / rewarded if rewarded else math.nan  # none is not 0
    variance = t["reward_squared"] / rewarded - mean * mean if rewarded else math.nan
    metrics = {
        "reward": mean,
        "reward_std": math.sqrt(max(variance, 0.0)) if rewarded else math.nan,
        "unrewarded_frac": 1 - rewarded / completions,
    }
    if t["groups"]:
        metrics["mixed_groups"] = t["mixed"] / t["groups"]
    if t[f"count/{names[0]}"]:
        metrics["accuracy"] = t["right"] / t[f"count/{names[0]}"]
    for name in names:
        metrics[f"applied_frac/{name}"] = t[f"count/{name}"] / completions
        if t[f"count/{name}"]:
            metrics[f"reward/{name}"] = t[f"sum/{name}"] / t[f"count/{name}"]
    return metrics


def _sums(rollouts: Sequence[Rollout], policy_version: int) -> dict[str, float]:
    completions = [c for rollout in rollouts for c in rollout.completions]
    rewards = [r for rollout in rollouts for r in rollout.rewards if not math.isnan(r)]
    return {
        "completions": len(completions),
        "num_completion_tokens": sum(len(c.token_ids) for c in completions),
        "behind": sum(policy_version - version for c in completions for version in c.policy_versions),
        "truncated": sum(c.finish_reason == "length" for c in completions),
        "rollouts": len(rollouts),
        "groups": sum(len(rollout.completions) > 1 for rollout in rollouts),
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
