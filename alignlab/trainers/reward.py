"""The reward model's trainer: the chosen completion of each pair is to have more reward (Bradley and Terry, 1952).

As in Stiennon et al. (2020), arXiv:2009.01325, and Ouyang et al. (2022), arXiv:2203.02155; with a margin as in Llama 2,
arXiv:2307.09288, and rewards centred as in Eisenstein et al. (2023), arXiv:2312.09244. A pair's prompt is computed once
for both completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignlab.config.offline import RewardConfig
from alignlab.data.packing import pack_groups
from alignlab.data.preferences import Preference
from alignlab.evaluation.held_out_intervals import agreement_intervals, probability_intervals
from alignlab.evaluation.results import PreferenceResult
from alignlab.functional.reward_losses import bradley_terry, brier_score, calibration_error, reward_centring
from alignlab.loop.forward import reward_forward
from alignlab.loop.given_data import GivenData, resolve_preferences
from alignlab.loop.loss_weights import LossWeights, pair_mean
from alignlab.loop.offline import OfflineTrainer
from alignlab.loop.offline_algorithm import OfflineAlgorithm, OfflineInputs, policy_learner
from alignlab.models.fingerprints import model_digest
from alignlab.models.finite import check_finite
from alignlab.models.hub.reward_checkpoints import classifier_of, padded_tokenizer, save_reward_model
from alignlab.models.reward_model import RewardModel, RewardOutput, last_tokens
from alignlab.models.weight_view import WeightView
from alignlab.trainers.pairs import pair_index, with_labels
from alignlab.types import Experience


class RewardPairs(NamedTuple):
    """The P pairs of a pack.

    Attributes:
        chosen, rejected: [P] rewards.
        margins: [P] by which the chosen one is to lead.
        probabilities: [P] that it is the better one.
    """

    chosen: Tensor
    rejected: Tensor
    margins: Tensor
    probabilities: Tensor


class RewardModelling(OfflineAlgorithm[Preference]):
    """Trains a new head on the model: with all weights, or with an adapter.

    Attributes:
        reward_model: in training.
    """

    config: RewardConfig

    def __init__(self, config: RewardConfig, inputs: OfflineInputs) -> None:
        self.reward_model = RewardModel(inputs.model)
        super().__init__(
            config, inputs, policy_learner(config, inputs, self.reward_model, forward=reward_forward)
        )

    def read(self, data: GivenData) -> Sequence[Preference]:
        """Return the preferences of a dataset."""
        config = self.config
        return resolve_preferences(
            data, self.tokenizer, margin_column=config.margin_column, probability_column=config.probability_column
        )

    def packs(self, name: str, examples: Sequence[Preference], rows: Sequence[int]) -> list[Experience]:
        """Return both completions of each pair in one pack, behind one prompt."""
        pairs = [examples[i] for i in rows]
        packs = pack_groups([pair.as_group() for pair in pairs], budget=self.config.memory.tokens_per_microbatch)
        return with_labels([replace(pack, rollout_logprobs=None) for pack in packs], pairs)

    @property
    def loss_weights(self) -> LossWeights:
        """The same weight for every pair of the step."""
        return pair_mean

    def loss(self, output: RewardOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss [P] of each pair, and metrics [P]."""
        pairs = reward_pairs(output.rewards, pack)
        return self.pair_loss(pairs), pair_metrics(pairs)

    def pair_loss(self, pairs: RewardPairs) -> Tensor:
        """Return Bradley-Terry's loss [P], with the margin, and the centring."""
        centring = self.config.centring_coef * reward_centring(pairs.chosen, pairs.rejected)
        likelihood = bradley_terry(
            pairs.chosen, pairs.rejected, margins=pairs.margins, probabilities=pairs.probabilities
        )
        return likelihood + centring

    def evaluate(self, held_out: Sequence[Preference]) -> PreferenceResult:
        """Return how often, how far and how surely held-out chosen completions lead.

        Raises:
            NumericsError: a reward is not finite.
        """
        packs = self.packs("eval", held_out, range(len(held_out)))
        of_packs = self.measured_packs(lambda share: self._of_pairs(share(packs)))
        columns = ([value for part in parts for value in part] for parts in zip(*of_packs, strict=True))
        pairs = RewardPairs(*(torch.tensor(column, device=self.learner.device) for column in columns))
        leads = pairs.chosen - pairs.rejected
        check_finite([("pairs", leads)], "the rewards of held-out completions")
        agrees, losses = pair_metrics(pairs)["preference_accuracy"], self.pair_loss(pairs)
        means = {"margin": leads.tolist(), "loss": losses.tolist()}
        intervals = {**agreement_intervals(agrees.tolist(), means), **probability_intervals(leads.tolist())}
        return PreferenceResult(
            accuracy=float(agrees.mean()),
            margin=float(leads.mean()),
            loss=float(losses.mean()),
            num_pairs=len(leads),
            calibration_error=float(calibration_error(leads)),
            brier=float(brier_score(leads)),
            intervals=intervals,
        )

    def _of_pairs(self, packs: Sequence[Experience]) -> list[list[list[float]]]:
        """Return the fields of `RewardPairs` of each pack."""
        moved = [pack.to(self.learner.device) for pack in packs]
        outputs = self.learner.outputs(moved)
        pairs = [reward_pairs(output.rewards, pack) for output, pack in zip(outputs, moved, strict=True)]
        return [[values.tolist() for values in of_pack] for of_pack in pairs]


class RewardTrainer(OfflineTrainer):
    """Trainer of a reward model: all weights, or an adapter and a head; arguments are `OfflineTrainer`'s.

    Datasets: as `DPOTrainer`'s, with the margin of each pair in `config.margin_column`, and the probability of its
    label in `config.probability_column`, where these are given.
    """

    config: RewardConfig
    algorithm: RewardModelling
    algorithm_class = RewardModelling
    size_field = "num_pairs"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokenizer = padded_tokenizer(self.tokenizer)
        classifier_of(self.learner.model, self.tokenizer.pad_token_id)  # refused before the first step, not at the end
        self.base_digest = model_digest(self.learner.model) if self.learner.has_adapters else None

    @property
    def reward_model(self) -> RewardModel:
        """The reward model in training."""
        return self.algorithm.reward_model

    def write_model(self, path: Path, *, weights: bool = True, view: WeightView | None = None) -> None:
        """Write a sequence-classification model of `transformers`, or PEFT's adapter for one, and the tokenizer."""
        save_reward_model(
            self.reward_model, path, self.tokenizer, base_digest=self.base_digest, weights=weights, view=view
        )

    def usage_hint(self, path: Path) -> str:
        """Return the setting by which another run uses the model as a reward."""
        return f"rewards: [{{name: reward_model, options: {{model: {path}}}}}]"


def reward_pairs(rewards: Tensor, pack: Experience) -> RewardPairs:
    """Return the pairs of a pack, from the rewards [N] on the last tokens of its sequences."""
    assert pack.pair_margins is not None and pack.pair_probabilities is not None
    chosen, rejected = rewards[last_tokens(pack.segments).view(-1, 2)].unbind(1)
    index = pair_index(pack)
    return RewardPairs(chosen, rejected, pack.pair_margins[index], pack.pair_probabilities[index])


def pair_metrics(pairs: RewardPairs) -> dict[str, Tensor]:
    """Return metrics [P]: whether the chosen completion leads, by how much, and the pair's mean reward."""
    leads = pairs.chosen - pairs.rejected
    return {
        "preference_accuracy": (leads > 0).float() + 0.5 * (leads == 0),  # a tie is a guess
        "margin": leads,
        "reward_mean": (pairs.chosen + pairs.rejected) / 2,
    }
