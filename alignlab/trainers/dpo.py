"""DPO and its family: the policy is its own reward model, and preferences train it directly.

The losses are those of `trainers.pairs`. A pair's prompt is computed once for both completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor

from alignlab.config.trainers import DPOConfig
from alignlab.data.packing import pack_groups
from alignlab.data.preferences import Preference
from alignlab.errors import ConfigError
from alignlab.models.policy import PolicyOutput
from alignlab.trainers.given_data import GivenData, resolve_preferences
from alignlab.trainers.offline import OfflineTrainer
from alignlab.trainers.pairs import pair_loss, pair_metrics, pair_token_loss, pairs_of, with_labels
from alignlab.trainers.reduction import Weigh, pair_mean
from alignlab.trainers.reference import Reference
from alignlab.training.evaluation import PreferenceResult
from alignlab.training.run_folder import RunFolder
from alignlab.types import Experience


class DPOTrainer(OfflineTrainer):
    """Direct preference optimisation; arguments are `OfflineTrainer`'s.

    Datasets: a path, settings, rows with `chosen` and `rejected` (see `preferences_from_rows`), or preferences.

    Raises:
        ConfigError: a preference's probability is below 1, and the loss takes labels for certain.
    """

    config: DPOConfig
    size_field = "num_pairs"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        labels = {pair.probability for pair in (*self.train_examples, *self.eval_examples)}
        self.has_soft_labels = labels != {1.0}
        if self.has_soft_labels and (self.config.loss != "sigmoid" or self.config.label_smoothing):
            raise ConfigError(
                f"some preferences have a probability below 1, such as {min(labels)}, which loss sigmoid alone takes, "
                "and without label_smoothing; use that, or preferences whose probability is 1"
            )
        budget, needed = self.config.tokens_per_microbatch, self.config.needs_reference
        self.reference = Reference(self.learner, budget=budget) if needed else None

    @property
    def weigh(self) -> Weigh:
        """Every pair of the step weighs the same."""
        return pair_mean

    def examples(self, data: GivenData) -> Sequence[Preference]:
        """Preferences of a dataset."""
        return resolve_preferences(data, self.tokenizer, probability_column=self.config.probability_column)

    def open(self, stack: ExitStack, folder: RunFolder, resume_step: int | None) -> None:
        """Score all pairs by the reference, or read what an earlier run has scored."""
        if self.reference is not None and self.config.precompute_reference:
            self.reference.precompute({"train": self.train_examples, "eval": self.eval_examples})

    def packs(self, rows: Sequence[int]) -> list[Experience]:
        """Both completions of a pair in one pack, behind one prompt."""
        return self._packs("train", self.train_examples, rows)

    def _packs(self, name: str, examples: Sequence[Preference], rows: Sequence[int]) -> list[Experience]:
        if self.reference is not None:
            packs = self.reference.packs(name, self.reference.groups(name, examples, rows))
        else:
            plain = pack_groups([examples[i].as_group() for i in rows], budget=self.config.tokens_per_microbatch)
            packs = [replace(pack, rollout_logprobs=None) for pack in plain]
        return with_labels(packs, [examples[i] for i in rows]) if self.has_soft_labels else packs

    def loss(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each pair, on one token of it [N]; metrics likewise."""
        return pair_token_loss(output, experience, self.config)

    def frozen(self) -> dict[str, str]:
        """The reference, where it is a copy."""
        return super().frozen() | (self.reference.frozen if self.reference is not None else {})

    def evaluate(self) -> PreferenceResult | None:
        """How often the chosen completion of held-out pairs leads; each rank looks at all of them."""
        if not self.eval_examples:
            return None
        totals: dict[str, float] = {}
        for pack in self._packs("eval", self.eval_examples, range(len(self.eval_examples))):
            moved = pack.to(self.learner.device)
            pairs = pairs_of(self.learner.score([moved])[0], moved)
            for name, values in (pair_metrics(pairs, self.config) | {"loss": pair_loss(pairs, self.config)}).items():
                totals[name] = totals.get(name, 0.0) + float(values.sum())
        means = {name: total / len(self.eval_examples) for name, total in totals.items()}
        return PreferenceResult(
            means["preference_accuracy"], means["margin"], means["loss"], num_pairs=len(self.eval_examples)
        )
