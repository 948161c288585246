"""Metrics of a step's rollouts: rewards, lengths, endings, and the fractions that can be learnt from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignlab.data.vocabulary import num_token_ids
from alignlab.functional.advantages import mixed_groups
from alignlab.loop.algorithm import Algorithm
from alignlab.loop.correction import kept_fractions
from alignlab.loop.prefetch import RolloutBatch
from alignlab.loop.reward_checks import warn_of_unrewarded
from alignlab.loop.update_metrics import mean_over_updates
from alignlab.models.decoder import num_embeddings
from alignlab.types import Rollout

logger = logging.getLogger(__name__)


class StepMetrics:
    """Metrics of a step of an online trainer.

    Args:
        algorithm: chooses the completions to train on and the groups with signal.
        tokenizer: the policy's.
    """

    def __init__(self, algorithm: Algorithm, tokenizer: PreTrainedTokenizerBase) -> None:
        self._algorithm, self._ranks = algorithm, algorithm.ranks
        self._padding = PaddingTokens(algorithm.learner.model, tokenizer)
        # No warning where a teacher judges: completions without a reward are trained on then.
        self._warned_of_unrewarded = algorithm.config.takes_rewards != "needed"

    def __call__(
        self, batch: RolloutBatch, policy_version: int, updates: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """Return the metrics of a step over all ranks, which call this together.

        Args:
            policy_version: version of the weights before the updates.
            updates: metrics of each update.
        """
        rollouts, algorithm, ranks = batch.all, self._algorithm, self._ranks
        self._warned_of_unrewarded = self._warned_of_unrewarded or warn_of_unrewarded(rollouts)
        metrics = kept_fractions(mean_over_updates(updates)) | rollout_metrics(
            rollouts, policy_version, ranks.sum, trainable=algorithm.trained_completions(rollouts),
            with_signal=algorithm.signal_groups(rollouts),
        )
        metrics |= reward_range(rollouts, ranks.gather) | self._padding.metrics(rollouts, ranks.sum)
        metrics["tokens_per_s"] = metrics.pop("num_completion_tokens") / batch.seconds
        metrics["reward_failures"] = ranks.sum_number(algorithm.rewards.num_failures)
        return metrics | algorithm.rewards.metrics()


def rollout_metrics(
    rollouts: Sequence[Rollout],
    policy_version: int,
    reduce_sum: Callable[[Tensor], Tensor],
    *,
    trainable: Tensor | None = None,
    with_signal: Tensor | None = None,
) -> dict[str, float]:
    """Return means over the completions of all ranks; every rank calls this together.

    - `reward`, `reward_std`: mean and deviation over the completions with a reward; nan where none has one.
    - `reward/<name>`: mean of a function's values over the completions that it applied to, absent where there are none;
      `applied_frac/<name>`: fraction of completions that it applied to.
    - `accuracy`: fraction of completions with exactly 1 from the first reward function, of those it applied to.
    - `unrewarded_frac`: fraction of completions to which no function gave a value.
    - `mixed_groups`: fraction of groups whose rewards differ; absent for groups of one completion.
    - `staleness`: mean number of versions by which the weights that sampled a token are behind `policy_version`.

    Without reward functions there are no metrics of rewards.

    Args:
        reduce_sum: adds a tensor over the ranks.
        trainable: [P, G] completions that are trained on, for `trainable_frac`.
        with_signal: [P] groups that can be learnt from, for `informative_frac`; see `Algorithm.signal_groups`.
    """
    names = list(rollouts[0].reward_parts)
    sums = _sums(rollouts, policy_version) | _sums_of_parts(rollouts, names)
    for name, mask in (("trainable", trainable), ("informative", with_signal)):
        sums |= {} if mask is None else {name: int(mask.sum())}
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
    if with_signal is not None:
        metrics["informative_frac"] = t["informative"] / max(t["rollouts"], 1)
    return metrics


def reward_range(rollouts: Sequence[Rollout], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Return `reward_min` and `reward_max` over all ranks, which call this together; neither without any reward.

    Args:
        gather: stacks the rows of all ranks.
    """
    rewards = torch.tensor([r for rollout in rollouts for r in rollout.rewards], dtype=torch.float64)
    low, high = extremes(rewards, gather)
    return {"reward_min": low, "reward_max": high} if low <= high else {}


def extremes(rewards: Tensor, gather: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Return the smallest and largest reward over all ranks, which call this together; inf and -inf if all are nan.

    Args:
        gather: stacks the rows of all ranks.
    """
    numbers = rewards[~rewards.isnan()].flatten().double()
    ends = [float(numbers.min()), float(numbers.max())] if len(numbers) else [math.inf, -math.inf]
    everyone = gather(torch.tensor([ends], dtype=torch.float64))
    return float(everyone[:, 0].min()), float(everyone[:, 1].max())


class PaddingTokens:
    """Counts sampled ids without a token in the tokenizer: rows with which the model's vocabulary is padded.

    A trained model gives such rows next to no probability. They decode to nothing, and are trained on like any token;
    distillation leaves out the ids that a teacher cannot read.

    Args:
        model: the policy.
        tokenizer: the policy's.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self._num_ids, self._num_rows = num_token_ids(tokenizer), num_embeddings(model)
        self._has_warned = False

    def metrics(
        self, rollouts: Sequence[Rollout], reduce_sum: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Return `padding_frac`, the fraction of sampled ids without a token, over all ranks, which call this together;
        nothing for a model without such rows. Warn at the first such id."""
        if self._num_rows <= self._num_ids:
            return {}
        ids = [index for rollout in rollouts for completion in rollout.completions for index in completion.token_ids]
        counts = torch.tensor([sum(index >= self._num_ids for index in ids), len(ids)], dtype=torch.float64)
        without_token, total = reduce_sum(counts).tolist()
        if without_token and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the policy sampled %d of %d ids that its tokenizer has no token for, from %d on, where its vocabulary "
                "is padded to %d rows; metric padding_frac counts them. To remove such rows, resize the model before "
                "training: model.resize_token_embeddings(%d)",
                without_token, total, self._num_ids, self._num_rows, self._num_ids,
            )  # fmt: skip
        return {"padding_frac": without_token / max(total, 1)}


def _of_rewards(t: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    rewarded, completions = t["rewarded"], max(t["completions"], 1)
    mean = t["reward"] / rewarded if rewarded else math.nan  # without rewards there is no mean; 0 would be one
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
    """Return the counts and sums of this rank's rollouts."""
    completions = [c for rollout in rollouts for c in rollout.completions]
    versions = [version for c in completions for version in c.policy_versions]
    return {
        "completions": len(completions),
        "num_completion_tokens": sum(len(c.token_ids) for c in completions),
        "behind": policy_version * len(versions) - sum(versions),
        "truncated": sum(c.finish_reason == "length" for c in completions),
        "rollouts": len(rollouts),
        "groups": sum(len(rollout.completions) > 1 for rollout in rollouts),
        "mixed": int(mixed_groups(torch.tensor([rollout.rewards for rollout in rollouts])).sum()),
        **_sums_of_rewards(rollouts),
    }


def _sums_of_rewards(rollouts: Sequence[Rollout]) -> dict[str, float]:
    rewards = [r for rollout in rollouts for r in rollout.rewards if not math.isnan(r)]
    return {"rewarded": len(rewards), "reward": sum(rewards), "reward_squared": sum(r * r for r in rewards)}


def _sums_of_parts(rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, float]:
    """Return count and sum of each reward function's values, and the number of right answers by the first one."""
    sums: dict[str, float] = {}
    for name in names:
        values = [v for rollout in rollouts for v in rollout.reward_parts[name] if v is not None]
        sums |= {f"count/{name}": len(values), f"sum/{name}": sum(values)}
        sums.setdefault("right", sum(value == 1.0 for value in values))
    return sums
