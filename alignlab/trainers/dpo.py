"""DPO and its family: the policy is its own reward model, and preferences train it directly.

The losses are those of `trainers.pairs`. A pair's prompt is computed once for both completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from torch import Tensor, nn

from alignlab.config.trainers import DPOConfig
from alignlab.data.packing import pack_groups
from alignlab.data.preferences import Preference
from alignlab.errors import ConfigError
from alignlab.evaluation.held_out_intervals import agreement_intervals
from alignlab.evaluation.results import PreferenceResult
from alignlab.loop.given_data import GivenData, resolve_preferences
from alignlab.loop.loss_weights import LossWeights, pair_mean
from alignlab.loop.offline import OfflineTrainer
from alignlab.loop.offline_algorithm import OfflineAlgorithm, OfflineInputs, Share
from alignlab.loop.reference import ExampleReference
from alignlab.models.policy import PolicyOutput
from alignlab.trainers.pairs import loss_of_pairs, pair_loss, pair_metrics, pairs_of, with_labels
from alignlab.types import Experience


class DPO(OfflineAlgorithm[Preference]):
    """Direct preference optimisation.

    Attributes:
        reference: None where the loss needs none.
    """

    config: DPOConfig

    def __init__(self, config: DPOConfig, inputs: OfflineInputs) -> None:
        super().__init__(config, inputs)
        budget, needed = config.memory.tokens_per_microbatch, config.needs_reference
        self.reference = ExampleReference(self.learner, budget=budget) if needed else None

    def read(self, data: GivenData) -> Sequence[Preference]:
        """Return the preferences of a dataset."""
        return resolve_preferences(data, self.tokenizer, probability_column=self.config.probability_column)

    def check_examples(self, examples: Sequence[Preference]) -> None:
        """Raise a ConfigError if a preference's probability is below 1, and the loss takes labels for certain."""
        uncertain = [pair.probability for pair in examples if pair.probability != 1.0]
        if uncertain and (self.config.loss != "sigmoid" or self.config.label_smoothing):
            raise ConfigError(
                f"some preferences have a probability below 1, such as {min(uncertain)}, which loss sigmoid alone "
                "takes, and without label_smoothing; use that, or preferences whose probability is 1"
            )

    def prepare(self, train: Sequence[Preference], held_out: Sequence[Preference]) -> None:
        """Compute the reference's log-probs of all pairs, or read what an earlier run has computed."""
        if self.reference is not None and self.config.precompute_reference:
            self.reference.precompute({"train": train, "eval": held_out})

    def packs(
        self, name: str, examples: Sequence[Preference], rows: Sequence[int], share: Share = list
    ) -> list[Experience]:
        """Return both completions of each pair in one pack, behind one prompt.

        Args:
            share: takes those of the packs that are returned; default: all.
        """
        pairs = [examples[i] for i in rows]
        if self.reference is not None:
            packs = self.reference.packs(name, examples, rows, share=share)
        else:
            groups = [pair.as_group() for pair in pairs]
            packs = list(share(pack_groups(groups, budget=self.config.memory.tokens_per_microbatch)))
            packs = [replace(pack, rollout_logprobs=None) for pack in packs]
        # Certain labels are left to `label_smoothing`, which says how likely each is wrong.
        return with_labels(packs, pairs) if any(pair.probability != 1.0 for pair in pairs) else packs

    @property
    def loss_weights(self) -> LossWeights:
        """The same weight for every pair of the step."""
        return pair_mean

    def loss(self, output: PolicyOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss [P] of each pair, and metrics [P]."""
        return loss_of_pairs(output, pack, self.config)

    def evaluate(self, held_out: Sequence[Preference]) -> PreferenceResult:
        """Return how often, and how far, the chosen completions of held-out pairs lead."""
        rows = range(len(held_out))
        parts = self.measured_packs(lambda share: self._of_pairs(self.packs("eval", held_out, rows, share)))
        agrees, margins, losses = (
            [value for part in parts for value in part[name]] for name in ("preference_accuracy", "margin", "loss")
        )
        return PreferenceResult(
            fmean(agrees), fmean(margins), fmean(losses), num_pairs=len(agrees),
            intervals=agreement_intervals(agrees, {"margin": margins, "loss": losses}),
        )

    def _of_pairs(self, packs: Sequence[Experience]) -> list[dict[str, list[float]]]:
        """Return the metrics and the loss of the pairs of each pack."""
        moved = [pack.to(self.learner.device) for pack in packs]
        pairs = [pairs_of(*of_pack) for of_pack in zip(self.learner.logprobs(moved), moved, strict=True)]
        values = [pair_metrics(of_pack, self.config) | {"loss": pair_loss(of_pack, self.config)} for of_pack in pairs]
        return [{name: of_pairs.tolist() for name, of_pairs in of_pack.items()} for of_pack in values]

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The reference, where it is a copy of the policy."""
        return [] if self.reference is None else self.reference.modules

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of the reference, where it is a copy."""
        return {} if self.reference is None else self.reference.fingerprints


class DPOTrainer(OfflineTrainer):
    """Trainer of DPO; arguments are `OfflineTrainer`'s.

    Datasets: a path, settings, rows with `chosen` and `rejected` (see `preferences_from_rows`), or preferences.

    Raises:
        ConfigError: a preference's probability is below 1, and the loss takes labels for certain.
    """

    config: DPOConfig
    algorithm_class = DPO
    size_field = "num_pairs"
