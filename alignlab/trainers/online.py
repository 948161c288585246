"""The loop of every trainer that learns from its own rollouts.

A trainer derives from `OnlineTrainer` and decides how completions are credited (`credit`) and how tokens are averaged
(`weigh`). What is minimised, and what must be scored for it, is the objective's.
"""

from __future__ import annotations

import random
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignlab.config.model import LoraSettings
from alignlab.config.render import RenderSettings
from alignlab.config.rollout import max_staleness
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import OnlineConfig
from alignlab.data.packing import pack_rollouts
from alignlab.data.sampler import IndexSampler
from alignlab.data.sequences import digest_of
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.rollout.engines import make_engine
from alignlab.rollout.vllm.proved import ProvedEngine
from alignlab.rollout.vllm.server.engine import VLLMServerEngine
from alignlab.trainers.ahead import Collected, CollectingVotes, RolloutsAhead, check_age
from alignlab.trainers.arguments import NamedArguments, check_callbacks, check_config
from alignlab.trainers.assemble import (
    Model,
    Reward,
    check_shares,
    make_accelerator,
    make_rank_group,
    make_reference,
    resolve_model,
    resolve_rewards,
)
from alignlab.trainers.given_data import Dataset, given_held_out, given_prompts, resolve_prompts
from alignlab.trainers.held_out import held_out_problems
from alignlab.trainers.learner import Learner, mean_over_updates
from alignlab.trainers.loop import Callback, TrainingLoop
from alignlab.trainers.mismatch import kept_fractions
from alignlab.trainers.objective import Objective
from alignlab.trainers.pack_scores import score_packs
from alignlab.trainers.preflight import warn_of_truncation, with_room
from alignlab.trainers.ranks import json_of_ranks
from alignlab.trainers.reduction import Weigh
from alignlab.trainers.reference import fingerprint_of
from alignlab.trainers.reward_evidence import (
    check_rewards,
    failures_of_rank,
    failures_of_ranks,
    say_unrewarded,
    signal_settings,
    stop_broken_rewards,
    stop_without_any_reward,
)
from alignlab.trainers.rollout_metrics import PaddingTokens, reward_range, rollout_metrics
from alignlab.training.evaluation import EvaluationResult
from alignlab.training.learning_signal import SignalMonitor
from alignlab.training.model_reward import bind_rewards, check_reward_ids, fingerprints_of
from alignlab.training.reward_runner import RewardRunner
from alignlab.training.rollout_store import RolloutStore
from alignlab.training.run_folder import RunFolder
from alignlab.types import Experience, Prompt, Rollout


class OnlineTrainer(TrainingLoop, metaclass=NamedArguments):
    """Prompts -> rollouts -> rewards -> packs -> scores -> experience -> update -> sync, step by step.

    Args:
        model: a name or path, or a live model, with or without a PEFT adapter.
        reward_funcs: plug-in names, folders of reward models, settings, callables, or pairs (name or callable, weight);
            the first one's value 1 means a right answer.
        config: the trainer's section.
        train_dataset: a path, settings, rows with a `prompt` or `messages` column, or prompts.
        eval_dataset: the same, held out.
        render_settings: how rows in memory become prompts; a source has these in its `DataSettings`.
        eval_render_settings: of held-out rows; default: `render_settings`, but for its `size`.
        tokenizer: default: the one beside the model.
        peft_config: a LoRA adapter to train; None trains what the model marks as trainable.
        evaluation: how held-out accuracy is measured.
        callbacks: each is called as `callback(trainer, step, metrics)` after every step.
    """

    config: OnlineConfig

    def __init__(
        self,
        model: Model,
        reward_funcs: Reward | Sequence[Reward],
        config: OnlineConfig,
        train_dataset: Dataset,
        *,
        eval_dataset: Dataset | None = None,
        render_settings: RenderSettings | None = None,
        eval_render_settings: RenderSettings | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        peft_config: LoraSettings | LoraConfig | None = None,
        evaluation: EvaluationSettings | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_config(type(self), config)
        check_callbacks(callbacks)
        train = given_prompts(train_dataset, render_settings)
        held_out = given_held_out(eval_dataset, eval_render_settings, train)
        accelerator = make_accelerator(config.rank_timeout_s)
        check_shares("num_prompts", config.num_prompts, accelerator.num_processes, config.num_minibatches)
        set_seed(config.seed)
        warn_of_truncation(config.sampling)
        needed = config.takes_rewards == "needed" or bool(reward_funcs)
        rewards = RewardRunner(resolve_rewards(reward_funcs) if needed else [], config.reward_limits)
        model, tokenizer = resolve_model(model, tokenizer, peft_config, accelerator.device)
        self.render_settings = train.settings
        prompts = with_room(resolve_prompts(train, tokenizer), model, config, train.settings, tokenizer=tokenizer)
        check_rewards(rewards, prompts, config)
        self.held_out = held_out_problems(
            evaluation, rewards.rewards, config.sampling, config.rollout, needed=held_out is not None
        ).read(held_out, model, tokenizer)
        policy = self.make_policy(model, tokenizer, config)
        self.objective = self.make_objective(config, policy)
        self.reference = make_reference(policy) if self.objective.uses_reference else None
        learner = self.make_learner(
            policy, config, accelerator,
            total_updates=self.num_policy_steps(config) * config.num_epochs * config.num_minibatches,
            updates_per_step=config.num_epochs * config.num_minibatches,
            temperature=config.sampling.temperature,
            entropy_grad=self.objective.entropy_grad,
        )
        super().__init__(config=config, learner=learner, tokenizer=tokenizer, callbacks=callbacks)
        self.rewards = rewards
        self.signal = SignalMonitor(signal_settings(config, rewards))
        self._said_unrewarded = config.takes_rewards != "needed"  # a teacher judges those without a reward too
        bind_rewards(rewards.rewards, model, tokenizer, share=max_staleness(config.rollout) == 0)
        check_reward_ids(rewards.rewards, prompts, tokenizer)
        self._padding = PaddingTokens(model, tokenizer)
        self._frozen = fingerprint_of(self.reference) | fingerprints_of(rewards.rewards)
        self.engine = make_engine(model, tokenizer, config.rollout)
        self.identity.add_held_out(self.held_out.prompts, self.held_out.settings, train, held_out)
        self.identity.add_rewards(rewards.rewards)
        self.store: RolloutStore | None = None
        self.credit_metrics: dict[str, float] = {}
        self.max_staleness = max_staleness(config.rollout)
        group = make_rank_group() if self.max_staleness else None
        self._any_rank_is_short = CollectingVotes(self.num_rounds, group, self._any_rank)
        self.keep_prompts(prompts)
        self.ahead = self._make_ahead()

    def keep_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Sample completions of these prompts, from the first on."""
        self.prompts = prompts
        digest = digest_of(((prompt.token_ids,), ()) for prompt in prompts)
        self.sampler = IndexSampler(len(prompts), self.config.num_prompts, self.config.seed, digest=digest)
        self.identity.add_prompts(digest, prompts)
        self._position = self._position_now()

    def make_policy(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: Any) -> Policy:
        """What is trained of a model."""
        return Policy(model, chunk_tokens=config.logprob_chunk_tokens)

    def make_learner(self, policy: Any, config: Any, accelerator: Accelerator, **options: Any) -> Learner:
        """What owns the policy; `options` are as `Learner` takes them."""
        return Learner(policy, config, accelerator, **options)

    @abstractmethod
    def make_objective(self, config: Any, policy: Policy) -> Objective:
        """What is minimised."""

    @property
    @abstractmethod
    def weigh(self) -> Weigh:
        """How token losses are averaged."""

    @abstractmethod
    def credit(
        self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Experience]]
    ) -> tuple[Tensor, list[list[Experience]]]:
        """Advantage [P, G] of each completion, to be kept; and the packs with the advantage of each token.

        What there is to see of it goes into `credit_metrics`.
        """

    @staticmethod
    def num_policy_steps(config: Any) -> int:
        """Steps in which the policy is updated."""
        return config.num_steps

    @property
    def num_rounds(self) -> int:
        """How often prompts are drawn in a step until enough rollouts are kept."""
        return 1

    def keeps(self, rollout: Rollout) -> bool:
        """Whether a rollout is learnt from, if there are others."""
        return True

    def informative(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which groups [P] can move the policy. Every rank calls this together.

        Here those with a completion to train on, for a teacher judges each; to learn from rewards, they must differ.
        """
        return self.trainable(rollouts).any(dim=1)

    def trainable(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which completions [P, G] are trained on: those that teach and have a token."""
        lengths = [[len(completion.token_ids) for completion in rollout.completions] for rollout in rollouts]
        return self.teaches(rollouts) & (torch.tensor(lengths) > 0)

    def loss(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss [N] of each token, and metrics [N] to average over trained tokens."""
        return self.objective(output, experience)

    def train_step(self, step: int) -> dict[str, float]:
        """One batch of rollouts, learnt from."""
        start = time.perf_counter()
        stop_without_any_reward(self.signal, self.config, len(self.prompts), step - 1)
        with self.phase("generate"):
            with self.agreed(f"collecting the rollouts of step {step}"):
                batch = self.ahead.take(step)
            stop_broken_rewards(self.rewards, self.learner.reduce_sum)
            rollouts, left_out, self._position = batch.rollouts, batch.left_out, batch.position
            check_age(rollouts, self.engine.policy_version, self.max_staleness)
        if isinstance(self.engine, ProvedEngine):
            self.engine.rest()
        version = self.engine.policy_version
        generated = time.perf_counter()
        with self.phase("score"):
            minibatches = self.make_experience(step, rollouts, left_out)
        with self.phase("update"):
            updates = [
                self.learn(step, packs)
                for epoch in range(self.config.num_epochs)
                for packs in random.Random(f"{self.config.seed}/{step}/{epoch}").sample(minibatches, len(minibatches))
            ]
        with self.phase("sync"):
            self.engine.update_weights(self.engine.policy_version + 1)
        finished = time.perf_counter()
        metrics = kept_fractions(mean_over_updates(updates)) | self._measure_rollouts([*rollouts, *left_out], version)
        metrics |= self._padding.metrics([*rollouts, *left_out], self.learner.reduce_sum)
        return metrics | self.credit_metrics | self.engine.metrics() | self.rewards.metrics() | {
            "tokens_per_s": metrics.pop("num_completion_tokens") / batch.seconds,
            "generate_s": batch.seconds,
            "wait_s": generated - start,
            "train_s": finished - generated,
            "reward_failures": self.learner.sum_over_ranks(self.rewards.num_failures),
        }

    def _measure_rollouts(self, sampled: Sequence[Rollout], version: int) -> dict[str, float]:
        """What all ranks have sampled, and how much of it can teach; every rank calls this together."""
        self._said_unrewarded = self._said_unrewarded or say_unrewarded(sampled)
        return rollout_metrics(
            sampled, version, self.learner.reduce_sum,
            trainable=self.trainable(sampled), informative=self.informative(sampled),
        ) | reward_range(sampled, self.gather)

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all ranks, on the host; every rank calls this together."""
        everyone: Tensor = self.accelerator.gather(own.to(self.learner.device))
        return everyone.cpu()

    def learn(self, step: int, packs: Sequence[Experience]) -> dict[str, float]:
        """One optimizer step on a mini-batch; returns its metrics."""
        return self.learner.update(packs, self.loss, self.weigh)

    def collect(self, step: int) -> Collected:
        """This rank's scored rollouts of one step: those to learn from, and those left out.

        With `rollout.max_staleness` it runs in a thread of its own. What is not kept is replaced, within `num_rounds`.
        What was left out is still what the policy does: metrics and the store of rollouts hold it too.
        """
        start = time.perf_counter()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        wanted = self.config.num_prompts // ranks
        kept: list[Rollout] = []
        dull: list[Rollout] = []
        for attempt in range(self.num_rounds):
            rows = self.sampler.next()[rank::ranks]
            seed = random.Random(f"{self.config.seed}/{step}/{attempt}/{rank}").getrandbits(62)
            try:
                found = self.generate([self.prompts[row] for row in rows], seed)
            except BaseException:
                self._any_rank_is_short(False, failed=True)  # the others wait for this rank
                raise
            for rollout in found:
                (kept if self.keeps(rollout) else dull).append(rollout)
            if not self._any_rank_is_short(len(kept) < wanted):
                break
        # A group of equal rewards has no gradient: it stands in, so that every rank has something to compute.
        sampled = kept + dull
        seconds = time.perf_counter() - start
        return Collected(sampled[:wanted], sampled[wanted:], seconds, self._position_now())

    def _make_ahead(self) -> RolloutsAhead:
        abandon = self.engine.abandon if isinstance(self.engine, VLLMServerEngine) else lambda: None
        return RolloutsAhead(
            self.collect, abandon=abandon, max_staleness=self.max_staleness, last_step=self.config.num_steps
        )

    def _position_now(self) -> dict[str, Any]:
        """Where this rank is in the data, what its rewards have failed at, and what they need to go on."""
        failures, states = Counter(self.rewards.failures), self.rewards.state()
        return {"sampler": self.sampler.state_dict(), "failures": failures, "rewards": states}

    def generate(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        """Sample and score one group for each prompt."""
        sampling = self.config.sampling.params(n=self.config.group_size, seed=seed)
        return self.rewards.score(self.engine.generate(prompts, sampling))

    def make_experience(
        self, step: int, rollouts: Sequence[Rollout], left_out: Sequence[Rollout] = ()
    ) -> list[list[Experience]]:
        """The packs of each mini-batch, with all that the loss needs. Mini-batches are cut between groups.

        Stores the rollouts, and those left out without an advantage.
        """
        parts = [rollouts[part] for part in self.minibatches(len(rollouts))]
        needs = self.objective.needs(step)
        scored = [self._score(self.pack(part), needs) for part in parts]
        advantages, credited = self.credit(rollouts, scored)
        if self.store is not None:
            known = [*advantages.tolist(), *[None] * len(left_out)]
            with self.agreed(f"writing the rollouts of step {step}"):
                self.store.append(step, [*rollouts, *left_out], advantages=known)
        return credited

    def pack(self, rollouts: Sequence[Rollout]) -> list[Experience]:
        """The packs of a mini-batch: all its completions."""
        return pack_rollouts(rollouts, budget=self.config.tokens_per_microbatch)

    def minibatches(self, num_rollouts: int) -> list[slice]:
        """Which rollouts of a step are in each mini-batch."""
        size = -(-num_rollouts // self.config.num_minibatches)
        return [slice(start, start + size) for start in range(0, num_rollouts, size)]

    def teaches(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which completions [P, G] are trained on: those with a reward and, under `mask_truncated`, an end."""
        return self.whole(rollouts) & ~torch.tensor([rollout.rewards for rollout in rollouts]).isnan()

    def whole(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Which completions [P, G] have an end, or need none."""
        cut = [[completion.finish_reason == "length" for completion in rollout.completions] for rollout in rollouts]
        return ~(torch.tensor(cut) & self.config.mask_truncated)

    def _score(self, packs: Sequence[Experience], needs: frozenset[str]) -> list[Experience]:
        return score_packs(packs, needs, self.learner, self.objective, self.reference)

    @property
    def has_held_out(self) -> bool:
        """Whether there are held-out prompts."""
        return bool(self.held_out)

    def evaluate(self) -> EvaluationResult | None:
        """Greedy and sampled accuracy on the held-out prompts."""
        return self.held_out.evaluate(self.engine, seed=self.config.seed)

    def open(self, stack: ExitStack, folder: RunFolder, resume_step: int | None) -> None:
        """Open the store of rollouts."""
        rank = self.accelerator.process_index
        self.store = RolloutStore(folder.rollouts, resume_step=resume_step, rank=rank, run_id=folder.run_id)
        stack.callback(self._close)

    def _close(self) -> None:
        self.ahead.close()
        self.sampler.load_state_dict(self._position["sampler"])  # what was drawn ahead and not taken is drawn again
        if isinstance(self.engine, VLLMServerEngine) and self.is_main:
            self.engine.release()
        self.store = None
        self.rewards.close()

    def frozen(self) -> dict[str, str]:
        """The copy that the KL is measured to, where there is one, and the reward models."""
        return super().frozen() | self._frozen

    def state(self) -> dict[str, Any]:
        """Position in the data, version of the policy, failures of rewards so far, which reference."""
        return super().state() | {
            "sampler": self._position["sampler"],
            "policy_version": self.engine.policy_version,
            "reward_failures": failures_of_ranks(self._position["failures"], self.rewards.names, self.gather),
            "rewards": json_of_ranks(self.accelerator, self._position["rewards"]),
            "objective": self.objective.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the engine takes over the restored weights.

        Raises:
            CheckpointError: a frozen model or the data are others than those that the run began with.
        """
        super().load_state(state)
        self.objective.load_state(state["objective"])
        self.sampler.load_state_dict(state["sampler"])
        self.rewards.failures = failures_of_rank(state["reward_failures"], self.accelerator.process_index)
        if "rewards" in state:  # earlier versions did not keep it
            self.rewards.load_state(state["rewards"][self.accelerator.process_index])
        self._position = self._position_now()
        self.ahead = self._make_ahead()
        # An engine that has run already, as after an interruption in the same process, only counts upwards.
        self.engine.update_weights(max(state["policy_version"], self.engine.policy_version + 1))
