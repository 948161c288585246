"""One method of learning from fixed examples, as an object that the offline loop has.

The loop asks it, once, to `read` datasets and to `prepare`; at each step for the `packs` of some examples, and trains
on them by `loss` and `loss_weights`. To add a method, derive from `OfflineAlgorithm`; `trainers/sft.py` is the
shortest example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignlab.config.trainers import TrainerConfig
from alignlab.data.dataset import HasSequences
from alignlab.evaluation.results import Evaluation
from alignlab.loop.given_data import GivenData
from alignlab.loop.learner import Learner
from alignlab.loop.loss_weights import LossWeights, token_mean
from alignlab.models.decoder import num_embeddings, num_positions
from alignlab.models.mtp import check_trains
from alignlab.models.policy import Policy
from alignlab.models.routers.uses import compare_logprobs, let_explore
from alignlab.types import Experience

Item = TypeVar("Item", bound=HasSequences)
Share = Callable[[Sequence[Experience]], Sequence[Experience]]
"""Takes some of a list of packs."""


@dataclass(frozen=True)
class OfflineInputs:
    """The resolved arguments of a trainer that learns from examples, its datasets aside."""

    accelerator: Accelerator
    model: Any
    tokenizer: PreTrainedTokenizerBase


class OfflineAlgorithm(ABC, Generic[Item]):
    """A method of learning from examples, with what it trains.

    Args:
        config: the trainer's section.
        inputs: model and tokenizer of the run.
        learner: default: one of a `Policy` of the model.

    Attributes:
        compares_logprobs: whether log-probs or rewards of several passes are compared, so that a mixture has to choose
            the same experts in each, and nothing is dropped from the residual stream.
        trains_mtp: whether a layer for multi-token prediction is trained.
    """

    compares_logprobs: ClassVar[bool] = True
    trains_mtp: ClassVar[bool] = False

    def __init__(self, config: Any, inputs: OfflineInputs, learner: Learner | None = None) -> None:
        self.config, self.tokenizer = config, inputs.tokenizer
        check_trains(inputs.model, type(self).__name__, trains_mtp=self.trains_mtp)
        if self.compares_logprobs:
            compare_logprobs(inputs.model, type(self).__name__, replays=False, per_token=False)
        else:
            let_explore(inputs.model)
        self.learner = learner or policy_learner(config, inputs)
        self.ranks = self.learner.ranks

    @property
    def positions(self) -> dict[str, float]:
        """The most tokens of an example, by the model that has so many positions."""
        return {"the model": num_positions(self.learner.model)}

    @property
    def embedding_rows(self) -> dict[str, int]:
        """The rows of the embedding tables that examples are looked up in, by the model."""
        return {"the model": num_embeddings(self.learner.model)}

    @abstractmethod
    def read(self, data: GivenData) -> Sequence[Item]:
        """Return the examples of a dataset: its token ids, ready to be packed."""

    def check_examples(self, examples: Sequence[Item]) -> None:
        """Raise a ConfigError if the settings do not fit the examples; nothing by default."""

    def prepare(self, train: Sequence[Item], held_out: Sequence[Item]) -> None:
        """Compute once what all steps need of the examples; nothing by default. Called when a training begins."""

    @abstractmethod
    def packs(self, name: str, examples: Sequence[Item], rows: Sequence[int]) -> list[Experience]:
        """Return the packs of some examples, with all that the loss needs; every rank calls this together.

        Args:
            name: "train" or "eval", for what `prepare` computed.
            examples: all of that name.
            rows: indices of those to pack.
        """

    @property
    def loss_weights(self) -> LossWeights:
        """Weight of each loss in the step: by default the same for every trained token."""
        return token_mean

    @abstractmethod
    def loss(self, output: Any, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the losses of a pack's tokens [N], sequences [S] or pairs [P]; and metrics of the same shape."""

    def step_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics of a step as they are shown."""
        return metrics

    def evaluate(self, held_out: Sequence[Item]) -> Evaluation | None:
        """Return a measure of the policy on held-out examples, at least one; every rank calls this together."""
        return None

    def measured_packs(self, measure: Callable[[Share], Iterable[Any]]) -> list[Any]:
        """Return what is measured of each pack of held-out examples, in the order of the packs.

        Each rank measures its share of the packs that one rank alone would make, so that the values are the same.

        Args:
            measure: returns a JSON value for each pack of a share of them; its argument takes the share.
        """
        parts = self.ranks.gather_done("measuring held-out examples", lambda: list(measure(self.ranks.share)))
        return [parts[number % len(parts)][number // len(parts)] for number in range(sum(map(len, parts)))]

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """Modules beside those in training: a copy of the policy as the reference, a teacher."""
        return []

    @property
    def models_beside(self) -> dict[str, str]:
        """Description of each model beside the policy that a user has named, by its part, such as "teacher"."""
        return {}

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each frozen model beside the policy, by name."""
        return {}


def policy_learner(config: TrainerConfig, inputs: OfflineInputs, module: Any = None, **options: Any) -> Learner:
    """Return the learner of a module that is updated once a step.

    Args:
        module: default: a `Policy` of the model.
        options: see `Learner`.
    """
    module = module or Policy(inputs.model, chunk_tokens=config.memory.logprob_chunk_tokens)
    return Learner(module, config, inputs.accelerator, total_updates=config.num_steps, **options)
