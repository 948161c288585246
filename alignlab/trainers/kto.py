"""KTO: completions that are good or bad, each by itself, weighed against how far the policy has moved.

Ethayarajh et al. (2024), arXiv:2402.01306. The KL to the reference, which is the reference point, is estimated before
each update from completions of other prompts, over the whole step. The other prompt's completion of an example is the
same throughout a run, so that its log-probs under the reference are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignlab.config.trainers import KTOConfig
from alignlab.data.unpaired import UnpairedPreference
from alignlab.functional.preference_losses import kto, kto_reference_point
from alignlab.functional.reduction import sequence_sum
from alignlab.models.policy import PolicyOutput
from alignlab.trainers.given_data import GivenData, resolve_unpaired
from alignlab.trainers.offline import OfflineTrainer
from alignlab.trainers.pairs import ROUNDING
from alignlab.trainers.reduction import Weigh, sequence_mean
from alignlab.trainers.reference import Reference
from alignlab.training.evaluation import LabelResult
from alignlab.training.run_folder import RunFolder
from alignlab.types import Experience

_KINDS = ("desirable", "undesirable")


class KTOTrainer(OfflineTrainer):
    """Kahneman-Tversky optimisation; arguments are `OfflineTrainer`'s.

    Datasets: a path, settings, rows with `completion` and `label` or with `chosen` and `rejected` (see
    `unpaired_from_rows`), or unpaired preferences.

    Attributes:
        reference_point: of the step whose packs were made last.
    """

    config: KTOConfig
    size_field = "num_sequences"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference = Reference(self.learner, budget=self.config.tokens_per_microbatch)
        self.reference_point = torch.zeros((), device=self.learner.device)

    @property
    def weigh(self) -> Weigh:
        """Every completion of the step weighs the same; its loss stands on each of its tokens."""
        return sequence_mean

    def examples(self, data: GivenData) -> Sequence[UnpairedPreference]:
        """Unpaired preferences of a dataset."""
        return resolve_unpaired(data, self.tokenizer)

    def open(self, stack: ExitStack, folder: RunFolder, resume_step: int | None) -> None:
        """Score all completions by the reference, or read what an earlier run has scored."""
        if self.config.precompute_reference:
            self.reference.precompute({"train": self.train_examples, "eval": self.eval_examples})

    def packs(self, rows: Sequence[int]) -> list[Experience]:
        """Each completion with its label as the advantage of its tokens, 1 or -1; sets the step's reference point.

        Every rank calls it together.
        """
        packs, mismatched = self._packs("train", self.train_examples, rows)
        total = self._log_ratios(mismatched, len(rows)).sum()
        moved, count = self.learner.reduce_sum(torch.stack([total, total.new_tensor(float(len(rows)))]))
        self.reference_point = kto_reference_point(moved, count)
        return packs

    def _packs(
        self, name: str, examples: Sequence[UnpairedPreference], rows: Sequence[int]
    ) -> tuple[list[Experience], list[Experience]]:
        """Packs of the completions, with their labels; and of the mismatched ones."""
        groups = self.reference.groups(name, examples, rows)
        own, mismatched = (
            self.reference.packs(name, [replace(group, completions=group.completions[part]) for group in groups])
            for part in (slice(0, 1), slice(1, 2))
        )
        signs = torch.tensor([1.0 if examples[i].desirable else -1.0 for i in rows])
        return [_signed(pack, signs) for pack in own], mismatched

    def _log_ratios(self, packs: Sequence[Experience], count: int) -> Tensor:
        """[count] log-ratio of each sequence, without a gradient."""
        found = torch.zeros(count, device=self.learner.device)
        for pack in packs:
            moved = pack.to(self.learner.device)
            found += log_ratios(self.learner.score([moved])[0], moved, count)
        return found

    def loss(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each completion, on each token of it [N]; metrics likewise."""
        assert experience.advantages is not None
        sequences = experience.segments.sequence_of_token.clamp(min=0)
        ratios = log_ratios(output.logprobs, experience, 1 + max(experience.segments.sequence_ids))[sequences]
        desirable = experience.advantages > 0
        rewards, point = self.config.beta * ratios, self.reference_point
        metrics = {"reference_point": point.expand_as(ratios)}
        for name, kind in zip(_KINDS, (desirable, ~desirable), strict=True):
            metrics |= {f"{name}_frac": kind.float(), f"{name}_reward": torch.where(kind, rewards, 0.0)}
        return self._loss(ratios, desirable, point), metrics

    def _loss(self, ratios: Tensor, desirable: Tensor, point: Tensor) -> Tensor:
        config = self.config
        return kto(
            ratios, desirable, point, beta=config.beta, desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step; the rewards of either kind are means over those of the kind, where the step has any."""
        metrics = super().train_step(step)
        for name in _KINDS:
            total, share = metrics.pop(f"{name}_reward"), metrics[f"{name}_frac"]
            if share > 0:
                metrics[f"{name}_reward"] = total / share
        if all(f"{name}_reward" in metrics for name in _KINDS):
            metrics["margin"] = metrics["desirable_reward"] - metrics["undesirable_reward"]
        del metrics["undesirable_frac"]  # the rest
        return metrics

    def frozen(self) -> dict[str, str]:
        """The reference, where it is a copy."""
        return super().frozen() | self.reference.frozen

    def evaluate(self) -> LabelResult | None:
        """How often held-out labels are agreed with: good completions have more reward than the reference point, bad
        ones less. Each rank looks at all of them."""
        count = len(self.eval_examples)
        if not count:
            return None
        packs, mismatched = self._packs("eval", self.eval_examples, range(count))
        total = self._log_ratios(mismatched, count).sum()
        point = kto_reference_point(total, total.new_tensor(float(count)))
        ratios = self._log_ratios(packs, count)
        desirable = torch.tensor([each.desirable for each in self.eval_examples], device=ratios.device)
        lead = torch.where(desirable, ratios - point, point - ratios)
        agrees = torch.where(lead.abs() <= ROUNDING, 0.5, (lead > 0).float())  # a tie is a guess
        rewards = self.config.beta * ratios
        return LabelResult(
            accuracy=float(agrees.mean()),
            margin=float(rewards[desirable].mean() - rewards[~desirable].mean()),
            loss=float(self._loss(ratios, desirable, point).mean()),
            num_completions=count,
        )


def log_ratios(logprobs: Tensor, pack: Experience, count: int) -> Tensor:
    """[count] log p of each sequence's trained tokens less the reference's; 0 of those that are not in the pack."""
    assert pack.ref_logprobs is not None
    moved = torch.where(pack.completion_mask, logprobs - pack.ref_logprobs, 0.0)
    return sequence_sum(moved, pack.segments.sequence_of_token, num_sequences=count)


def _signed(pack: Experience, signs: Tensor) -> Experience:
    sequences = pack.segments.sequence_of_token.clamp(min=0)
    return replace(pack, advantages=torch.where(pack.completion_mask, signs.to(sequences.device)[sequences], 0.0))
