"""The loop of every trainer that learns from its own rollouts: it has an algorithm and a source of rollouts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.config.model import LoraSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import OnlineConfig
from alignlab.evaluation.learning_signal import SignalMonitor
from alignlab.evaluation.results import EvaluationResult
from alignlab.loop.algorithm import Algorithm, minibatch_slices
from alignlab.loop.arguments import NamedArguments, check_callbacks, check_config
from alignlab.loop.averaging import Use, average_for, averaged
from alignlab.loop.given_data import DatasetLike
from alignlab.loop.inputs import Model, Reward
from alignlab.loop.online_inputs import bind_reward_models, resolve_online_inputs
from alignlab.loop.prefetch import RolloutBatch
from alignlab.loop.preflight import Preflight
from alignlab.loop.reward_checks import signal_settings, stop_without_any_reward
from alignlab.loop.rollout_metrics import StepMetrics
from alignlab.loop.source import RolloutSource
from alignlab.loop.training_loop import Callback, TrainingLoop
from alignlab.loop.weight_decay import decay_lines
from alignlab.models.empty import is_empty
from alignlab.models.kv_approximation.choice import shared_bases
from alignlab.rollout.engine import make_engine
from alignlab.rollout.memory import engine_bytes, planned_device
from alignlab.runs.folder import RunFolder
from alignlab.runs.rollout_store import RolloutStore, clear_ranks_without_process
from alignlab.scoring.reward_model import fingerprints_of, modules_of
from alignlab.types import Experience


class OnlineTrainer(TrainingLoop, metaclass=NamedArguments):
    """Prompts -> rollouts -> rewards -> packs -> log-probs -> credit -> updates -> new weights, step by step.

    A trainer names its algorithm and its config's class; all else is here, in `Algorithm` and in `RolloutSource`.

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

    Attributes:
        algorithm: what is learnt, and how.
        source: of rollouts; it has the engine, the prompts and the rewards.
        held_out: problems on which accuracy is measured.
    """

    config: OnlineConfig
    algorithm_class: ClassVar[type[Algorithm]]

    def __init__(
        self,
        model: Model,
        reward_funcs: Reward | Sequence[Reward],
        config: OnlineConfig,
        train_dataset: DatasetLike,
        *,
        eval_dataset: DatasetLike | None = None,
        render_settings: RenderSettings | None = None,
        eval_render_settings: RenderSettings | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        peft_config: LoraSettings | LoraConfig | None = None,
        evaluation: EvaluationSettings | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_config(type(self), config)
        check_callbacks(callbacks)
        self.algorithm_class.check_arguments(config, has_rewards=bool(reward_funcs))
        inputs = resolve_online_inputs(
            model, reward_funcs, config, train_dataset, eval_dataset=eval_dataset, render_settings=render_settings,
            eval_render_settings=eval_render_settings, tokenizer=tokenizer, peft_config=peft_config,
            evaluation=evaluation,
        )
        config = inputs.config
        make_algorithm: Any = self.algorithm_class  # each takes (config, inputs) alone
        self.algorithm: Algorithm = make_algorithm(config, inputs)
        super().__init__(
            config=config, learner=self.algorithm.learner, tokenizer=inputs.tokenizer, callbacks=callbacks
        )
        bind_reward_models(inputs, config)
        self._kv_bases = shared_bases(inputs.model, config.rollout)
        self._measure_cache(inputs.model)
        self.source = RolloutSource(self.algorithm, make_engine(inputs.model, inputs.tokenizer, config.rollout))
        self.held_out = inputs.held_out
        self.signal = SignalMonitor(signal_settings(config, inputs.rewards))
        self.store: RolloutStore | None = None
        self._metrics = StepMetrics(self.algorithm, inputs.tokenizer)
        self._frozen = self.algorithm.frozen_fingerprints() | fingerprints_of(inputs.rewards.rewards)
        self.identity.add_held_out(self.held_out.prompts, self.held_out.settings, inputs.train, inputs.eval)
        self.identity.add_rewards(inputs.rewards.rewards)
        self.identity.add_prompts(self.source.digest, self.source.prompts)

    def train_step(self, step: int) -> dict[str, float]:
        """Learn from one batch of rollouts, and return its metrics."""
        batch = self._take(step)
        version = self.source.engine.policy_version
        with self.phase("score"):
            packs = [self.algorithm.pack(batch.rollouts[part]) for part in self._minibatches(batch)]
            scored = [self.algorithm.with_logprobs(step, minibatch) for minibatch in packs]
            credit = self.algorithm.credit(batch.rollouts, scored)
            self._keep(step, batch, credit.advantages.tolist())
        with self.phase("update"):
            updates = [self.algorithm.update(step, packs) for packs in self._shuffled(step, credit.minibatches)]
        with self.phase("sync"):
            self.source.update_weights(version + 1)
        metrics = self._metrics(batch, version, updates) | self.source.engine.metrics()
        return metrics | dict(credit.metrics) | self._timings(batch)

    def contents(self) -> Preflight:
        """Return the prompts, the scorer and the models beside the policy."""
        return Preflight(
            self.source.prompts, self.held_out.prompts, self.held_out.scorer, self.algorithm.models_beside,
            self.predicted_memory(), self.config.rollout.engine, decay_lines(self.learners),
        )

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """A reference, a teacher, reward models."""
        return [*self.algorithm.frozen_modules, *modules_of(self.source.rewards.rewards)]

    def predicted_memory(self) -> dict[str, int]:
        """Return the bytes of the training and, while it samples, of the engine; see `training_bytes`."""
        training = super().predicted_memory()
        if not training:
            return training
        longest = max(len(prompt.token_ids) for prompt in self.source.prompts)
        engine = engine_bytes(
            self.learner.model, self.config.rollout, planned_device(self.learner.device),
            num_sequences=self.config.num_prompts // self.ranks.count * self.config.group_size,
            num_tokens=longest + self.config.sampling.max_new_tokens,
        )
        return training | {"rollouts": engine}

    def check_can_go_on(self) -> None:
        """Raise a RewardError if no completion has had a reward once all prompts have been tried."""
        stop_without_any_reward(self.signal, self.config, len(self.source.prompts), self.step)

    def _measure_cache(self, model: nn.Module) -> None:
        """Measure the bases of the engine's cache on the first prompts of the run, the same on every rank."""
        if self._kv_bases is None:
            return
        tokens = [prompt.token_ids for prompt in self.algorithm.prompts]
        if is_empty(model):
            self._kv_bases.chosen_tokens(tokens)  # raises if they are too few
            return
        self._kv_bases.measure(model, tokens)
        if self.ranks.count > 1:
            self._kv_bases.load_state(json.loads(self.ranks.of_main(json.dumps(self._kv_bases.state()))))

    def _take(self, step: int) -> RolloutBatch:
        with self.phase("generate"):
            with self.agreed(f"collecting the rollouts of step {step}"):
                batch = self.source.take(step)
            self.source.check(batch)
        if self.source.max_staleness == 0:  # otherwise the engine samples ahead while the policy learns
            self.source.engine.rest()
        return batch

    def _minibatches(self, batch: RolloutBatch) -> list[slice]:
        return minibatch_slices(len(batch.rollouts), self.config.num_minibatches)

    def _keep(self, step: int, batch: RolloutBatch, advantages: Sequence[Any]) -> None:
        """Store the rollouts of a step; those that were dropped have no advantage."""
        if self.store is not None:
            with self.agreed(f"writing the rollouts of step {step}"):
                self.store.append(step, batch.all, advantages=[*advantages, *[None] * len(batch.dropped)])

    def _shuffled(self, step: int, minibatches: list[list[Experience]]) -> Iterator[list[Experience]]:
        """Yield the mini-batches of each epoch, in an order of its own."""
        for epoch in range(self.config.num_epochs):
            yield from random.Random(f"{self.config.seed}/{step}/{epoch}").sample(minibatches, len(minibatches))

    def _timings(self, batch: RolloutBatch) -> dict[str, float]:
        seconds = self.phase_seconds
        return {
            "generate_s": batch.seconds,
            "wait_s": seconds["generate"],
            "train_s": seconds["score"] + seconds["update"] + seconds["sync"],
        }

    @property
    def has_held_out(self) -> bool:
        """Return whether there are held-out prompts."""
        return bool(self.held_out)

    def evaluate(self) -> EvaluationResult | None:
        """Return greedy and sampled accuracy on the held-out prompts."""
        return self.held_out.evaluate(self.source.opened_engine(), self.ranks, seed=self.config.seed)

    @contextmanager
    def evaluated_weights(self, use: Use) -> Iterator[None]:
        """Have the engine sample from the average of the weights within this context, if that is wanted for the use."""
        if not self.has_held_out or average_for(self.learner, use) is None:
            yield
            return
        with self.source.sampling_from(averaged(self.learner, use)):
            yield

    def open(self, stack: ExitStack, folder: RunFolder, resume_step: int | None) -> None:
        """Open the store of rollouts."""
        self.store = RolloutStore(
            folder.rollouts, resume_step=resume_step, rank=self.ranks.index, run_id=folder.run_id
        )
        if self.is_main:
            clear_ranks_without_process(self.ranks.count, folder.rollouts, resume_step, folder.run_id)
        stack.callback(self._close)

    @property
    def drawn_by_rank(self) -> str:
        """Return what other random numbers change where a run goes on on another number of ranks."""
        return "rollouts are sampled with other seeds, dropout is drawn anew"

    def _close(self) -> None:
        self.source.close()
        self.store = None

    @property
    def learners(self) -> dict[str, Any]:
        """All that is trained, by the prefix of its tensors in a checkpoint."""
        return self.algorithm.learners

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of the reference, of a teacher and of reward models."""
        return super().frozen_fingerprints() | self._frozen

    def state(self) -> dict[str, Any]:
        """Return the position in the data, the policy's version, what rewards, algorithm and cache keep."""
        return super().state() | self.source.state() | {
            "policy_version": self.source.engine.policy_version,
            "algorithm": self.algorithm.state(),
            "kv_bases": None if self._kv_bases is None else self._kv_bases.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the engine takes over the restored weights.

        Raises:
            CheckpointError: a frozen model or the data are others than those that the run began with.
        """
        super().load_state(state)
        self.algorithm.load_state(state["algorithm"])
        if self._kv_bases is not None:
            self._kv_bases.load_state(state.get("kv_bases"))
        self.source.load_state(state)
        # An engine that has run already, as after an interruption in the same process, only counts upwards.
        self.source.update_weights(max(state["policy_version"], self.source.engine.policy_version + 1))
