"""KTO: completions that are good or bad, each by itself, weighed against how far the policy has moved.

Ethayarajh et al. (2024), arXiv:2402.01306. The KL to the reference, which is the reference point, is estimated before
each update from completions of other prompts, over the whole step. The mismatched completion of an example is the same
throughout a run, so that its log-probs under the reference are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from alignlab.config.trainers import KTOConfig
from alignlab.data.unpaired import UnpairedPreference
from alignlab.evaluation.held_out_intervals import label_intervals
from alignlab.evaluation.results import LabelResult
from alignlab.functional.preference_losses import kto, kto_reference_point
from alignlab.functional.reduction import sequence_sum
from alignlab.loop.given_data import GivenData, resolve_unpaired
from alignlab.loop.loss_weights import LossWeights, whole_sequence_mean
from alignlab.loop.offline import OfflineTrainer
from alignlab.loop.offline_algorithm import OfflineAlgorithm, OfflineInputs, Share
from alignlab.loop.reference import ExampleReference
from alignlab.models.policy import PolicyOutput
from alignlab.trainers.pairs import ROUNDING
from alignlab.transfer import to_device
from alignlab.types import Experience

_KINDS = ("desirable", "undesirable")
_MATCHED, _MISMATCHED = slice(0, 1), slice(1, 2)
"""Of an example's group: its completion, and that of another prompt."""


class KTO(OfflineAlgorithm[UnpairedPreference]):
    """Kahneman-Tversky optimisation.

    Attributes:
        reference_point: of the training step whose packs were made last, nats.
    """

    config: KTOConfig

    def __init__(self, config: KTOConfig, inputs: OfflineInputs) -> None:
        super().__init__(config, inputs)
        self.reference = ExampleReference(self.learner, budget=config.memory.tokens_per_microbatch)
        self.reference_point = torch.zeros((), device=self.learner.device)

    def read(self, data: GivenData) -> Sequence[UnpairedPreference]:
        """Return the unpaired preferences of a dataset."""
        return resolve_unpaired(data, self.tokenizer)

    def prepare(self, train: Sequence[UnpairedPreference], held_out: Sequence[UnpairedPreference]) -> None:
        """Compute the reference's log-probs of all completions, or read what an earlier run has computed."""
        if self.config.precompute_reference:
            self.reference.precompute({"train": train, "eval": held_out})

    def packs(self, name: str, examples: Sequence[UnpairedPreference], rows: Sequence[int]) -> list[Experience]:
        """Return packs of completions with their labels, and set the step's reference point."""
        log_ratios = self._mismatched_log_ratios(name, examples, rows)
        totals = torch.stack([log_ratios.sum(), log_ratios.new_tensor(float(len(rows)))])
        self.reference_point = kto_reference_point(*self.ranks.sum(totals))
        return self._labelled_packs(name, examples, rows)

    def _labelled_packs(
        self, name: str, examples: Sequence[UnpairedPreference], rows: Sequence[int]
    ) -> list[Experience]:
        desirable = torch.tensor([examples[i].desirable for i in rows])
        packs = self.reference.packs(name, examples, rows, _MATCHED)
        return [replace(pack, desirable=desirable) for pack in packs]

    def _mismatched_log_ratios(
        self, name: str, examples: Sequence[UnpairedPreference], rows: Sequence[int]
    ) -> Tensor:
        of_packs = self._log_ratios(self.reference.packs(name, examples, rows, _MISMATCHED), len(rows))
        return torch.stack(of_packs).sum(dim=0)

    def _log_ratios(self, packs: Sequence[Experience], count: int) -> list[Tensor]:
        """Return, for each pack, the log-ratio [count] of each sequence, 0 where it is in another; no gradient."""
        moved = [pack.to(self.learner.device) for pack in packs]
        logprobs = self.learner.logprobs(moved)
        return [log_ratios(of_pack, pack, count) for of_pack, pack in zip(logprobs, moved, strict=True)]

    @property
    def loss_weights(self) -> LossWeights:
        """The same weight for every completion of the step."""
        return whole_sequence_mean

    def loss(self, output: PolicyOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss [S] of each completion, and metrics [S]."""
        assert pack.desirable is not None
        [index] = to_device([torch.tensor(pack.segments.sequences, dtype=torch.long)], pack.tokens.device)
        ratios = log_ratios(output.logprobs, pack, len(pack.desirable))[index]
        desirable = pack.desirable[index]
        rewards, point = self.config.beta * ratios, self.reference_point
        metrics = {"reference_point": point.expand_as(ratios)}
        for name, is_kind in zip(_KINDS, (desirable, ~desirable), strict=True):
            metrics |= {f"{name}_frac": is_kind.float(), f"{name}_reward": torch.where(is_kind, rewards, 0.0)}
        return self._loss(ratios, desirable, point), metrics

    def _loss(self, ratios: Tensor, desirable: Tensor, point: Tensor) -> Tensor:
        config = self.config
        return kto(
            ratios, desirable, point, beta=config.beta, desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )

    def step_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics with the rewards of either kind as means over that kind, where the step has any."""
        metrics = dict(metrics)
        if "desirable_frac" not in metrics:
            return metrics
        for name in _KINDS:
            total, share = metrics.pop(f"{name}_reward"), metrics[f"{name}_frac"]
            if share > 0:
                metrics[f"{name}_reward"] = total / share
        if all(f"{name}_reward" in metrics for name in _KINDS):
            metrics["margin"] = metrics["desirable_reward"] - metrics["undesirable_reward"]
        del metrics["undesirable_frac"]  # 1 - desirable_frac
        return metrics

    def evaluate(self, held_out: Sequence[UnpairedPreference]) -> LabelResult:
        """Return how often held-out labels are agreed with.

        A good completion should have more reward than the reference point of the held-out data, a bad one less.
        """
        total = self._held_out_log_ratios(held_out, _MISMATCHED).sum()
        point = kto_reference_point(total, total.new_tensor(float(len(held_out))))
        ratios = self._held_out_log_ratios(held_out, _MATCHED)
        desirable = torch.tensor([example.desirable for example in held_out], device=ratios.device)
        lead = torch.where(desirable, ratios - point, point - ratios)
        agrees = torch.where(lead.abs() <= ROUNDING, 0.5, (lead > 0).float())  # a tie is a guess
        rewards = self.config.beta * ratios
        losses = self._loss(ratios, desirable, point)
        return LabelResult(
            accuracy=float(agrees.mean()),
            margin=float(rewards[desirable].mean() - rewards[~desirable].mean()),
            loss=float(losses.mean()),
            num_completions=len(held_out),
            intervals=label_intervals(agrees.tolist(), rewards.tolist(), desirable.tolist(), losses.tolist()),
        )

    def _held_out_log_ratios(self, held_out: Sequence[UnpairedPreference], subset: slice) -> Tensor:
        """Return the log-ratio [count] of each held-out completion.

        Args:
            subset: of each example's group.
        """
        rows, count = range(len(held_out)), len(held_out)

        def of_packs(share: Share) -> Iterator[list[list[float]]]:
            packs = self.reference.packs("eval", held_out, rows, subset, share)
            for pack, of_pack in zip(packs, self._log_ratios(packs, count), strict=True):
                index = torch.tensor(pack.segments.sequences, dtype=torch.long)
                yield [index.tolist(), of_pack.cpu()[index].tolist()]

        ratios = torch.zeros(count)
        for index, values in self.measured_packs(of_packs):
            ratios[index] = torch.tensor(values)
        return ratios.to(self.learner.device)

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The reference, where it is a copy of the policy."""
        return self.reference.modules

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of the reference, where it is a copy."""
        return self.reference.fingerprints


class KTOTrainer(OfflineTrainer):
    """Trainer of KTO; arguments are `OfflineTrainer`'s.

    Datasets: a path, settings, rows with `completion` and `label` or with `chosen` and `rejected` (see
    `unpaired_from_rows`), or unpaired preferences.
    """

    config: KTOConfig
    algorithm_class = KTO
    size_field = "num_sequences"


def log_ratios(logprobs: Tensor, pack: Experience, count: int) -> Tensor:
    """Return log p of each sequence's trained tokens less the reference's [count]; 0 of sequences not in the pack."""
    assert pack.ref_logprobs is not None
    ratios = torch.where(pack.completion_mask, logprobs - pack.ref_logprobs, 0.0)
    return sequence_sum(ratios, pack.segments.sequence_of_token, num_sequences=count)
