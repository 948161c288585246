"""The loop of every trainer that learns from a fixed set of examples: it has an algorithm and a sampler."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

from accelerate.utils import set_seed
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.config.model import LoraSettings
from alignlab.config.trainers import TrainerConfig
from alignlab.data.dataset import digest_of, fitting
from alignlab.data.sampler import IndexSampler
from alignlab.data.vocabulary import check_ids
from alignlab.errors import DataError
from alignlab.evaluation.results import Evaluation
from alignlab.loop.accelerator import make_accelerator
from alignlab.loop.arguments import NamedArguments, check_callbacks, check_config
from alignlab.loop.given_data import GivenData, given_data, given_held_out
from alignlab.loop.host_ranks import loading_for_training
from alignlab.loop.inputs import Model, check_shares, resolve_model
from alignlab.loop.offline_algorithm import OfflineAlgorithm, OfflineInputs
from alignlab.loop.preflight import Preflight
from alignlab.loop.training_loop import Callback, TrainingLoop
from alignlab.loop.weight_decay import decay_lines
from alignlab.runs.folder import RunFolder


class OfflineTrainer(TrainingLoop, metaclass=NamedArguments):
    """Examples -> packs -> update, step by step.

    A trainer names its algorithm and its config's class; all else is here and in `OfflineAlgorithm`.

    Args:
        model: a name or path, or a live model, with or without a PEFT adapter.
        config: the trainer's section.
        train_dataset: a path, `DataSettings`, rows, or the examples that the algorithm reads from them.
        eval_dataset: the same, held out.
        render_settings: how rows in memory become tokens; a source has these in its `DataSettings`.
        eval_render_settings: of held-out rows; default: `render_settings`, but for its `size`.
        tokenizer: default: the one beside the model.
        peft_config: a LoRA adapter to train; None trains what the model marks as trainable.
        callbacks: each is called as `callback(trainer, step, metrics)` after every step.

    Attributes:
        algorithm: what is learnt, and how.
        train_examples, eval_examples: what the algorithm read of the datasets.
    """

    algorithm_class: ClassVar[type[OfflineAlgorithm[Any]]]
    size_field: ClassVar[str]
    """The field of the config that says how many examples a step has, over all ranks."""

    def __init__(
        self,
        model: Model,
        config: TrainerConfig,
        train_dataset: Any,
        *,
        eval_dataset: Any = None,
        render_settings: RenderSettings | None = None,
        eval_render_settings: RenderSettings | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        peft_config: LoraSettings | LoraConfig | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_config(type(self), config)
        check_callbacks(callbacks)
        train = given_data(train_dataset, render_settings)
        held_out = given_held_out(eval_dataset, eval_render_settings, train)
        accelerator = make_accelerator(config.rank_timeout_s, config.numerics)
        size: int = getattr(config, self.size_field)
        check_shares(self.size_field, size, accelerator.num_processes)
        set_seed(config.seed)
        with loading_for_training(config.sharding, accelerator) as device:
            model, tokenizer = resolve_model(model, tokenizer, peft_config, device, computes_on=accelerator.device)
        self.algorithm = self.algorithm_class(config, OfflineInputs(accelerator, model, tokenizer))
        super().__init__(config=config, learner=self.algorithm.learner, tokenizer=tokenizer, callbacks=callbacks)
        self.train_examples: Sequence[Any] = self._read(train)
        if not self.train_examples:
            raise DataError("the training data holds no example that can be used; check its path and its columns")
        self.eval_examples: Sequence[Any] = () if held_out is None else self._read(held_out)
        self.algorithm.check_examples((*self.train_examples, *self.eval_examples))
        digest = digest_of(self.train_examples)
        self.sampler = IndexSampler(len(self.train_examples), size, config.seed, digest=digest)
        self.identity.add_examples(digest, self.eval_examples, train, held_out)

    def _read(self, data: GivenData) -> Sequence[Any]:
        """Return the examples of a dataset that all models have tokens and positions for."""
        examples = self.algorithm.read(data)
        rows = self.algorithm.embedding_rows
        check_ids((example.sequences for example in examples), rows, self.tokenizer, what="example")
        advice = data.settings.setting("on_bad_row", "skip")
        return fitting(examples, self.algorithm.positions, skip=data.skips, advice=advice)

    def train_step(self, step: int) -> dict[str, float]:
        """Take one optimizer step on a batch of examples, shared out over the ranks."""
        start = time.perf_counter()
        packs = self.algorithm.packs("train", self.train_examples, self.ranks.share(self.sampler.next()))
        num_tokens = self.ranks.sum_number(sum(pack.num_tokens for pack in packs))
        weights = self.algorithm.loss_weights
        with self.phase("update"):
            metrics = self.learner.update(packs, self.algorithm.loss, weights, metric_weights=weights)
        metrics = self.algorithm.step_metrics(metrics)
        return metrics | {"tokens_per_s": num_tokens / (time.perf_counter() - start)}

    def contents(self) -> Preflight:
        """Return the examples and the models beside the policy."""
        return Preflight(
            self.train_examples, self.eval_examples, beside=self.algorithm.models_beside,
            memory=self.predicted_memory(), weight_decay=decay_lines(self.learners),
        )

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """A reference, a teacher."""
        return self.algorithm.frozen_modules

    @property
    def has_held_out(self) -> bool:
        """Return whether there are held-out examples."""
        return bool(self.eval_examples)

    def evaluate(self) -> Evaluation | None:
        """Return the algorithm's measure on held-out examples; None without any."""
        return self.algorithm.evaluate(self.eval_examples) if self.eval_examples else None

    def open(self, stack: ExitStack, folder: RunFolder, resume_step: int | None) -> None:
        """Compute once what all steps need of the examples, or read what an earlier run has computed."""
        self.algorithm.prepare(self.train_examples, self.eval_examples)

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of the algorithm's frozen models."""
        return super().frozen_fingerprints() | self.algorithm.frozen_fingerprints()

    def state(self) -> dict[str, Any]:
        """Return the position in the data, as JSON."""
        return super().state() | {"sampler": self.sampler.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        super().load_state(state)
        self.sampler.load_state_dict(state["sampler"])
