"""The loop of every trainer that learns from a fixed set of examples."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.model import LoraSettings
from alignlab.config.render import RenderSettings
from alignlab.config.trainers import TrainerConfig
from alignlab.data.sampler import IndexSampler
from alignlab.data.sequences import digest_of, fitting
from alignlab.data.vocabulary import check_ids
from alignlab.errors import DataError
from alignlab.models.attention import num_embeddings, num_positions
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.trainers.arguments import NamedArguments, check_callbacks, check_config
from alignlab.trainers.assemble import Model, check_shares, make_accelerator, resolve_model
from alignlab.trainers.given_data import GivenData, given_data, given_held_out
from alignlab.trainers.learner import Learner
from alignlab.trainers.loop import Callback, TrainingLoop
from alignlab.trainers.reduction import Weigh
from alignlab.types import Experience


class OfflineTrainer(TrainingLoop, metaclass=NamedArguments):
    """Examples -> packs -> update, step by step.

    A trainer derives from it and decides how examples are made (`examples`) and packed (`packs`), how tokens are
    weighed and the loss.

    Args:
        model: a name or path, or a live model, with or without a PEFT adapter.
        config: the trainer's section.
        train_dataset: a path, `DataSettings`, rows, or what `examples` makes of them.
        eval_dataset: the same, held out.
        render_settings: how rows in memory become tokens; a source has these in its `DataSettings`.
        eval_render_settings: of held-out rows; default: `render_settings`, but for its `size`.
        tokenizer: default: the one beside the model.
        peft_config: a LoRA adapter to train; None trains what the model marks as trainable.
        callbacks: each is called as `callback(trainer, step, metrics)` after every step.
    """

    size_field: ClassVar[str]  # of the config: examples a step, over all ranks

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
        accelerator = make_accelerator(config.rank_timeout_s)
        size: int = getattr(config, self.size_field)
        check_shares(self.size_field, size, accelerator.num_processes)
        set_seed(config.seed)
        model, tokenizer = resolve_model(model, tokenizer, peft_config, accelerator.device)
        learner = self.make_learner(model, tokenizer, config, accelerator, total_updates=config.num_steps)
        super().__init__(config=config, learner=learner, tokenizer=tokenizer, callbacks=callbacks)
        self.train_examples: Sequence[Any] = self._fitting(train)
        if not self.train_examples:
            raise DataError("the training data holds no example that can be used; check its path and its columns")
        self.eval_examples: Sequence[Any] = () if held_out is None else self._fitting(held_out)
        digest = digest_of((example.sequences, example.labels) for example in self.train_examples)
        self.sampler = IndexSampler(len(self.train_examples), size, config.seed, digest=digest)
        self.identity.add_examples(digest, self.eval_examples, train, held_out)

    def make_learner(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, config: Any,
        accelerator: Accelerator, **schedule: Any,
    ) -> Learner:
        """What owns the policy; `schedule` is as `Learner` takes it."""
        return Learner(Policy(model, chunk_tokens=config.logprob_chunk_tokens), config, accelerator, **schedule)

    def _fitting(self, data: GivenData) -> Sequence[Any]:
        examples = self.examples(data)
        check_ids((example.sequences for example in examples), self.rows, self.tokenizer, what="example")
        advice = data.settings.setting("on_bad_row", "skip")
        return fitting(examples, self.positions, skip=data.skips, advice=advice)

    @property
    def positions(self) -> dict[str, float]:
        """Tokens that an example may have, by what has so many positions."""
        return {"the model": num_positions(self.learner.model)}

    @property
    def rows(self) -> dict[str, int]:
        """Rows of the embedding tables that an example is looked up in, by whose they are."""
        return {"the model": num_embeddings(self.learner.model)}

    @property
    @abstractmethod
    def weigh(self) -> Weigh:
        """How token losses are averaged."""

    @property
    def measure(self) -> Weigh:
        """How metrics are averaged: as the loss."""
        return self.weigh

    @property
    def has_held_out(self) -> bool:
        """Whether there are held-out examples."""
        return bool(self.eval_examples)

    @abstractmethod
    def examples(self, data: GivenData) -> Sequence[Any]:
        """Token ids of a dataset, ready to be packed; each item is a `data.sequences.HasSequences`."""

    @abstractmethod
    def packs(self, rows: Sequence[int]) -> list[Experience]:
        """The packs of some training examples, with all that the loss needs."""

    @abstractmethod
    def loss(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss [N] of each token, and metrics [N] to average."""

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step on a batch of examples, shared out over the ranks."""
        start = time.perf_counter()
        rows = self.sampler.next()[self.accelerator.process_index :: self.accelerator.num_processes]
        packs = self.packs(rows)
        num_tokens = self.learner.sum_over_ranks(sum(pack.num_tokens for pack in packs))
        with self.phase("update"):
            metrics = self.learner.update(packs, self.loss, self.weigh, measure=self.measure)
        return metrics | {"tokens_per_s": num_tokens / (time.perf_counter() - start)}

    def state(self) -> dict[str, Any]:
        """Position in the data."""
        return super().state() | {"sampler": self.sampler.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        super().load_state(state)
        self.sampler.load_state_dict(state["sampler"])
