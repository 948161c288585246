"""Scored rollouts, step by step: prompts are drawn, completed by an engine and rewarded, perhaps ahead of the training.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from alignlab.config.rollout import max_staleness
from alignlab.config.trainers import OnlineConfig
from alignlab.data.dataset import digest_of
from alignlab.data.sampler import IndexSampler
from alignlab.loop.accelerator import make_rank_group
from alignlab.loop.algorithm import Algorithm
from alignlab.loop.prefetch import RefillVotes, RolloutBatch, RolloutPrefetcher, check_age
from alignlab.loop.reward_checks import failures_of_rank, failures_of_ranks, stop_broken_rewards
from alignlab.rollout.engine import RolloutEngine
from alignlab.types import Prompt, Rollout


class RolloutSource:
    """Draws prompts, samples and scores completions, and knows its position in all of that.

    Args:
        algorithm: says which prompts there are, which groups have a signal, and how they are sampled.
        engine: completes prompts.

    Attributes:
        rewards: scores completions.
        digest: of the prompts' token ids.
    """

    def __init__(self, algorithm: Algorithm, engine: RolloutEngine) -> None:
        self._algorithm, self.engine = algorithm, engine
        self.config: OnlineConfig = algorithm.config
        self.ranks, self.rewards, self.prompts = algorithm.ranks, algorithm.rewards, algorithm.prompts
        self.digest = digest_of(self.prompts)
        self.sampler = IndexSampler(len(self.prompts), self.config.num_prompts, self.config.seed, digest=self.digest)
        self.max_staleness = max_staleness(self.config.rollout)
        # The prefetch thread has a process group of its own, so that its collectives cannot interleave with training's.
        group = make_rank_group() if self.max_staleness else None
        self._any_rank_is_short = RefillVotes(algorithm.num_rounds, group, self.ranks.any)
        self._sample = algorithm.sampling(self)
        self._is_closed = False
        self._position = self._position_now()
        self._prefetcher = self._make_prefetcher()

    def take(self, step: int) -> RolloutBatch:
        """Return this rank's rollouts of a step; steps are taken in order.

        Raises:
            RolloutError, RewardError: sampling or scoring failed; a token is too old; a reward fails at every call.
        """
        batch = self._prefetcher.take(step)
        self._position = batch.position
        return batch

    def check(self, batch: RolloutBatch) -> None:
        """Raise if nothing can be learnt from a batch; every rank calls this together.

        Raises:
            RewardError: a reward has failed at each of its first calls.
            RolloutError: a token was sampled from weights that are too old.
        """
        stop_broken_rewards(self.rewards, self.ranks.sum)
        check_age(batch.rollouts, self.engine.policy_version, self.max_staleness)

    def collect(self, step: int) -> RolloutBatch:
        """Sample and score this rank's rollouts of one step, in the caller's thread.

        Groups without a signal are replaced, within `num_rounds`; dropped groups still count in the metrics and in the
        rollout store.
        """
        start = time.perf_counter()
        num_groups = self.config.num_prompts // self.ranks.count
        with_signal: list[Rollout] = []
        no_signal: list[Rollout] = []
        for attempt in range(self._algorithm.num_rounds):
            rows = self.ranks.share(self.sampler.next())
            seed = random.Random(f"{self.config.seed}/{step}/{attempt}/{self.ranks.index}").getrandbits(62)
            try:
                rollouts = self._sample([self.prompts[row] for row in rows], seed)
            except BaseException:
                self._any_rank_is_short(False, failed=True)  # the other ranks wait for this vote
                raise
            for rollout in rollouts:
                (with_signal if self._algorithm.has_signal(rollout) else no_signal).append(rollout)
            if not self._any_rank_is_short(len(with_signal) < num_groups):
                break
        # Too few groups have a signal: fill up with the others, so that every rank runs the same collectives.
        groups = with_signal + no_signal
        seconds = time.perf_counter() - start
        return RolloutBatch(groups[:num_groups], groups[num_groups:], seconds, self._position_now())

    def sample(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        """Sample one group of completions for each prompt, and score it."""
        sampling = self.config.sampling.params(n=self.config.group_size, seed=seed)
        return self.rewards.score(self.opened_engine().generate(prompts, sampling))

    def update_weights(self, policy_version: int) -> None:
        """Have the engine take over the policy's present weights as version `policy_version`."""
        self.engine.update_weights(policy_version)
        self._is_closed = False

    @contextmanager
    def sampling_from(self, weights: AbstractContextManager[None]) -> Iterator[None]:
        """Have the engine sample from other weights of the policy within this context, and from the present ones after.

        If what is done within fails, the engine keeps the other weights: the run has failed, and closes the engine.

        Args:
            weights: a context in which the policy has these weights.
        """
        with weights:
            self.update_weights(self.engine.policy_version + 1)
            yield
        self.update_weights(self.engine.policy_version + 1)

    def opened_engine(self) -> RolloutEngine:
        """Return the engine; if the end of a training has closed it, it takes over the present weights first."""
        if self._is_closed:
            self.update_weights(self.engine.policy_version + 1)
        return self.engine

    def close(self) -> None:
        """Stop prefetching and release engine and rewards; what was prefetched and not taken is drawn again."""
        self._prefetcher.close()
        self.sampler.load_state_dict(self._position["sampler"])
        self.engine.close()
        self._is_closed = True
        self.rewards.close()

    def state(self) -> dict[str, Any]:
        """Return the position of every rank, as JSON: in the data, in reward failures, in what rewards keep."""
        return {
            "sampler": self._position["sampler"],
            "reward_failures": failures_of_ranks(self._position["failures"], self.rewards.names, self.ranks.gather),
            "rewards": self.ranks.gather_json(self._position["rewards"]),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            CheckpointError: the data are not those that the run began with.
        """
        self.sampler.load_state_dict(state["sampler"])
        self.rewards.failures = failures_of_rank(state["reward_failures"], self.ranks.index, self.ranks.count)
        self.rewards.load_state_of_ranks(state["rewards"], self.ranks.index, self.ranks.count)
        self._position = self._position_now()
        self._prefetcher = self._make_prefetcher()

    def _make_prefetcher(self) -> RolloutPrefetcher:
        return RolloutPrefetcher(
            self.collect, abandon=self.engine.abandon, max_staleness=self.max_staleness, last_step=self.config.num_steps
        )

    def _position_now(self) -> dict[str, Any]:
        failures = Counter(self.rewards.failures)
        return {"sampler": self.sampler.state_dict(), "failures": failures, "rewards": self.rewards.state()}
