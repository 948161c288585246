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
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.trainers.reward import RewardConfig
from alignlab.data.packing import pack_groups
from alignlab.data.preferences import Preference
from alignlab.functional.reward_losses import bradley_terry, brier_score, calibration_error, reward_centring
from alignlab.models.finite import check_finite
from alignlab.models.reward_checkpoints import classifier_of, padded_tokenizer, save_reward_model
from alignlab.models.reward_model import RewardModel, RewardOutput, last_tokens
from alignlab.trainers.given_data import GivenData, resolve_preferences
from alignlab.trainers.learner import Learner
from alignlab.trainers.offline import OfflineTrainer
from alignlab.trainers.pairs import with_labels
from alignlab.trainers.reduction import Weigh, pair_mean
from alignlab.training.evaluation import PreferenceResult
from alignlab.training.reference_cache import digest_of_model
from alignlab.types import Experience


class RewardLearner(Learner):
    """Owns a reward model and its optimizer; arguments are `Learner`'s."""

    policy: RewardModel  # type: ignore[assignment]  # what is trained

    def _forward(self, policy: torch.nn.Module, pack: Experience) -> Any:
        return policy(pack.tokens, pack.segments, pack.completion_mask)


class RewardPairs(NamedTuple):
    """What is known of the P pairs of a pack.

    Attributes:
        chosen, rejected: [P] rewards.
        margins: [P] by which the chosen one is to lead.
        probabilities: [P] that it is the better one.
        places: [P] index of the token on which a pair's numbers stand.
    """

    chosen: Tensor
    rejected: Tensor
    margins: Tensor
    probabilities: Tensor
    places: Tensor


class RewardTrainer(OfflineTrainer):
    """Trains a reward model: all weights, or an adapter and a head; arguments are `OfflineTrainer`'s.

    Datasets: as `DPOTrainer`'s, with the margin of each pair in `config.margin_column`, and the
    probability of its label in `config.probability_column`, where these are given.
    """

    config: RewardConfig
    size_field = "num_pairs"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokenizer = padded_tokenizer(self.tokenizer)
        classifier_of(self.learner.model, self.tokenizer.pad_token_id)  # refused before the first step, not at the end
        self.base_digest = digest_of_model(self.learner.model) if self.learner.has_adapters else None

    def make_learner(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, config: RewardConfig,
        accelerator: Accelerator, **schedule: Any,
    ) -> Learner:
        """A new head on the model."""
        reward: Any = RewardModel(model)
        return RewardLearner(reward, config, accelerator, **schedule)

    @property
    def reward_model(self) -> RewardModel:
        """What is trained."""
        reward: RewardModel = self.learner.policy  # type: ignore[assignment]
        return reward

    @property
    def weigh(self) -> Weigh:
        """Every pair of the step weighs the same."""
        return pair_mean

    def examples(self, data: GivenData) -> Sequence[Preference]:
        """Preferences of a dataset."""
        config = self.config
        return resolve_preferences(
            data, self.tokenizer, margin_column=config.margin_column, probability_column=config.probability_column
        )

    def packs(self, rows: Sequence[int]) -> list[Experience]:
        """Both completions of a pair in one pack, behind one prompt."""
        return self._packs([self.train_examples[i] for i in rows])

    def _packs(self, pairs: Sequence[Preference]) -> list[Experience]:
        packs = pack_groups([pair.as_group() for pair in pairs], budget=self.config.tokens_per_microbatch)
        return with_labels([replace(pack, rollout_logprobs=None) for pack in packs], pairs)

    def loss(  # type: ignore[override]  # of what is trained
        self, output: RewardOutput, experience: Experience
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each pair, on one token of it [N]; metrics likewise."""
        pairs = pairs_of(output.rewards, experience)

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(experience.num_tokens).index_put((pairs.places,), values)

        return placed(self.pair_loss(pairs)), {name: placed(values) for name, values in measured(pairs).items()}

    def pair_loss(self, pairs: RewardPairs) -> Tensor:
        """[P] Bradley-Terry's, with the margin, and the centring."""
        centring = self.config.centring_coef * reward_centring(pairs.chosen, pairs.rejected)
        likelihood = bradley_terry(
            pairs.chosen, pairs.rejected, margins=pairs.margins, probabilities=pairs.probabilities
        )
        return likelihood + centring

    def evaluate(self) -> PreferenceResult | None:
        """How often, how far and how surely held-out chosen completions lead; each rank looks at all of them.

        Raises:
            NumericsError: a reward is not finite.
        """
        if not self.eval_examples:
            return None
        packs = [pack.to(self.learner.device) for pack in self._packs(self.eval_examples)]
        found = [
            pairs_of(output.rewards, pack)  # type: ignore[attr-defined]  # of a reward model
            for output, pack in zip(self.learner.outputs(packs), packs, strict=True)
        ]
        pairs = RewardPairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        leads = pairs.chosen - pairs.rejected
        check_finite([("pairs", leads)], "the rewards of held-out completions")
        return PreferenceResult(
            accuracy=float(measured(pairs)["preference_accuracy"].mean()),
            margin=float(leads.mean()),
            loss=float(self.pair_loss(pairs).mean()),
            num_pairs=len(leads),
            calibration_error=float(calibration_error(leads)),
            brier=float(brier_score(leads)),
        )

    def write_model(self, path: Path, *, weights: bool = True) -> None:
        """A sequence-classification model of `transformers`, or PEFT's adapter for one, and the tokenizer."""
        save_reward_model(
            self.reward_model, path, self.tokenizer, base_digest=self.base_digest, weights=weights
        )

    def use_of(self, path: Path) -> str:
        """As a reward of another run."""
        return f"rewards: [{{name: reward_model, options: {{model: {path}}}}}]"


def pairs_of(rewards: Tensor, pack: Experience) -> RewardPairs:
    """The pairs of a pack, from the rewards [N] on the last tokens: sequences 2 i and 2 i + 1 are pair i."""
    assert pack.margins is not None and pack.probabilities is not None
    ends = last_tokens(pack.segments).view(-1, 2)
    chosen, rejected = rewards[ends[:, 0]], rewards[ends[:, 1]]
    first = ends[:, 0]
    return RewardPairs(chosen, rejected, pack.margins[first], pack.probabilities[first], first)


def measured(pairs: RewardPairs) -> dict[str, Tensor]:
    """[P] of each metric: whether the chosen completion leads, by how much, and the pair's mean reward."""
    leads = pairs.chosen - pairs.rejected
    return {
        "preference_accuracy": (leads > 0).float() + 0.5 * (leads == 0),  # a tie is a guess
        "margin": leads,
        "reward_mean": (pairs.chosen + pairs.rejected) / 2,
    }
