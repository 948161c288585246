"""DPO and its family: the policy is its own reward model, and preferences train it directly.

DPO (arXiv:2305.18290), cDPO, robust DPO (arXiv:2403.00409), IPO (arXiv:2310.12036), hinge (arXiv:2305.10425), SimPO
(arXiv:2405.14734), ORPO (arXiv:2403.07691), by `DPOConfig.loss`. A pair's prompt is computed once for both completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignlab.config.trainers.dpo import REFERENCE_FREE, DPOConfig
from alignlab.data.packing import pack_groups
from alignlab.data.preferences import Preference
from alignlab.errors import CheckpointError
from alignlab.functional import preference_losses as losses
from alignlab.functional.reduction import sequence_sum
from alignlab.models.policy import PolicyOutput
from alignlab.trainers.assemble import make_reference, resolve_preferences
from alignlab.trainers.offline import OfflineTrainer
from alignlab.trainers.reduction import Weigh, pair_mean
from alignlab.training.checkpoint import fingerprint
from alignlab.training.evaluation import PreferenceResult
from alignlab.training.reference_cache import ReferenceCache
from alignlab.training.run_folder import RunFolder
from alignlab.types import Experience

_SCORED_TOGETHER = 512
_OF_MEANS = ("ipo_mean", "simpo", "orpo")


@dataclass(frozen=True)
class Pairs:
    """What is known of the P pairs of a pack.

    Attributes:
        chosen, rejected: [P] summed log-probs under the policy.
        chosen_ratio, rejected_ratio: [P] the same less the reference's; without a reference, the same.
        chosen_tokens, rejected_tokens: [P] lengths.
        places: [P] index of the token on which a pair's numbers stand.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    places: Tensor

    @property
    def margins(self) -> Tensor:
        """[P] log-ratio of the chosen completion less that of the rejected one, nats."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_margins(self) -> Tensor:
        """[P] the same of means over each completion's tokens."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens


class DPOTrainer(OfflineTrainer):
    """Direct preference optimisation; arguments are `OfflineTrainer`'s.

    Datasets: a path, settings, rows with `chosen` and `rejected` (see `preferences_from_rows`), or preferences.
    """

    config: DPOConfig
    size_field = "num_pairs"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.needs_reference = self.config.loss not in REFERENCE_FREE
        self.reference = make_reference(self.learner.policy) if self.needs_reference else None
        self._known: dict[str, list[tuple[float, ...]]] = {}

    @property
    def weigh(self) -> Weigh:
        """Every pair of the step weighs the same."""
        return pair_mean

    @property
    def measure(self) -> Weigh:
        """As the loss."""
        return pair_mean

    def examples(self, dataset: Any) -> Sequence[Preference]:
        """Preferences of a dataset."""
        return resolve_preferences(dataset, self.tokenizer)

    def open(self, stack: ExitStack, folder: RunFolder, resume_step: int | None) -> None:
        """Score all pairs by the reference, or read what an earlier run has scored."""
        if not self.needs_reference or not self.config.precompute_reference:
            return
        cache = ReferenceCache((self.reference or self.learner.policy).model)
        for name, examples in (("train", self.train_examples), ("eval", self.eval_examples)):
            if examples:
                self._known[name] = cache.get_or_make(examples, self._score_by_reference)

    def _score_by_reference(self, examples: Sequence[Preference]) -> list[tuple[float, ...]]:
        """Log-probs of both completions, end to end, of each pair."""
        found: list[tuple[float, ...]] = []
        for start in range(0, len(examples), _SCORED_TOGETHER):
            groups = [pair.as_group() for pair in examples[start : start + _SCORED_TOGETHER]]
            scores: list[tuple[float, ...]] = [()] * len(groups)
            for pack in self._with_reference(pack_groups(groups, budget=self.config.tokens_per_microbatch)):
                assert pack.ref_logprobs is not None
                segments, parts = pack.segments, pack.ref_logprobs.cpu().split(pack.segments.lengths)
                for part, sequence, group in zip(parts, segments.sequence_ids, segments.group_ids, strict=True):
                    if sequence >= 0:  # chosen comes before rejected
                        scores[group] += tuple(part.tolist())
            found += scores
        return found

    def _with_reference(self, packs: Sequence[Experience]) -> list[Experience]:
        moved = [replace(pack, rollout_logprobs=None).to(self.learner.device) for pack in packs]
        scores = self.learner.score_reference(moved, self.reference)
        return [replace(pack, ref_logprobs=score) for pack, score in zip(moved, scores, strict=True)]

    def packs(self, rows: Sequence[int]) -> list[Experience]:
        """Both completions of a pair in one pack, behind one prompt."""
        return self._packs("train", self.train_examples, rows)

    def _packs(self, name: str, examples: Sequence[Preference], rows: Sequence[int]) -> list[Experience]:
        known = self._known.get(name)
        groups = [examples[i].as_group(None if known is None else known[i]) for i in rows]
        packs = pack_groups(groups, budget=self.config.tokens_per_microbatch)
        if not self.needs_reference:
            return [replace(pack, rollout_logprobs=None) for pack in packs]
        if known is None:
            return self._with_reference(packs)
        return [replace(pack, ref_logprobs=pack.rollout_logprobs, rollout_logprobs=None) for pack in packs]

    def loss(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each pair, on one token of it [N]; metrics likewise."""
        pairs = pairs_of(output.logprobs, experience)
        spread = {name: self._placed(values, pairs, experience) for name, values in self.measured(pairs).items()}
        return self._placed(self.pair_loss(pairs), pairs, experience), spread

    @staticmethod
    def _placed(values: Tensor, pairs: Pairs, experience: Experience) -> Tensor:
        return values.new_zeros(experience.num_tokens).index_put((pairs.places,), values)

    def pair_loss(self, pairs: Pairs) -> Tensor:
        """[P], by `config.loss`."""
        config, beta = self.config, self.config.beta
        chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
        match config.loss:
            case "sigmoid":
                return losses.dpo_sigmoid(pairs.margins, beta=beta, label_smoothing=config.label_smoothing)
            case "robust":
                return losses.dpo_robust(pairs.margins, beta=beta, label_smoothing=config.label_smoothing)
            case "ipo":
                return losses.ipo(pairs.margins, beta=beta)
            case "ipo_mean":
                return losses.ipo(pairs.mean_margins, beta=beta)
            case "hinge":
                return losses.hinge(pairs.margins, beta=beta)
            case "simpo":
                return losses.simpo(chosen, rejected, beta=beta, gamma=config.simpo_gamma)
            case "orpo":
                return beta * losses.orpo_odds(chosen, rejected) - chosen

    def measured(self, pairs: Pairs) -> dict[str, Tensor]:
        """[P] of each metric: whether the chosen completion leads, by how much, and how likely both are."""
        leads = pairs.mean_margins if self.config.loss in _OF_MEANS else pairs.margins
        return {
            "preference_accuracy": (leads > 0).float() + 0.5 * (leads == 0),  # a tie is a guess
            "margin": self.config.beta * leads,
            "chosen_logprob": pairs.chosen,
            "rejected_logprob": pairs.rejected,
        }

    def state(self) -> dict[str, Any]:
        """Position in the data, and which reference."""
        return super().state() | {"reference": self.reference and fingerprint(self.reference.named_parameters())}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            CheckpointError: the reference is another.
        """
        if state["reference"] != (self.reference and fingerprint(self.reference.named_parameters())):
            raise CheckpointError(
                "the reference is a copy of the policy that the run began with, and the model given now is another; "
                "resume with the model that the run was started with"
            )
        super().load_state(state)

    def evaluate_at(self, step: int) -> bool:
        """Every `eval_every_steps`, where there is held-out data."""
        every = self.config.eval_every_steps
        return bool(self.eval_examples) and every is not None and step % every == 0

    def evaluate(self) -> PreferenceResult | None:
        """How often the chosen completion of held-out pairs leads; each rank looks at all of them."""
        if not self.eval_examples:
            return None
        totals: dict[str, float] = {}
        for pack in self._packs("eval", self.eval_examples, range(len(self.eval_examples))):
            moved = pack.to(self.learner.device)
            pairs = pairs_of(self.learner.score([moved])[0], moved)
            for name, values in (self.measured(pairs) | {"loss": self.pair_loss(pairs)}).items():
                totals[name] = totals.get(name, 0.0) + float(values.sum())
        means = {name: total / len(self.eval_examples) for name, total in totals.items()}
        return PreferenceResult(
            means["preference_accuracy"], means["margin"], means["loss"], num_pairs=len(self.eval_examples)
        )


def pairs_of(logprobs: Tensor, pack: Experience) -> Pairs:
    """The pairs of a pack, from the log-probs [N] of its tokens: sequences 2 i and 2 i + 1 are pair i."""
    ids, mask = pack.segments.sequence_of_token, pack.completion_mask
    num_sequences = 2 * (1 + max(pack.segments.sequence_ids) // 2)
    ref = torch.zeros_like(logprobs) if pack.ref_logprobs is None else pack.ref_logprobs
    sums, ratios, counts = (
        sequence_sum(torch.where(mask, values, 0.0), ids, num_sequences=num_sequences).view(-1, 2)
        for values in (logprobs, logprobs - ref, torch.ones_like(logprobs))
    )
    here = counts[:, 0] > 0
    first = torch.full((num_sequences,), len(ids), device=ids.device)
    index = torch.arange(len(ids), device=ids.device)
    first = first.scatter_reduce(0, ids[mask].long(), index[mask], "amin").view(-1, 2)
    return Pairs(
        sums[here, 0], sums[here, 1], ratios[here, 0], ratios[here, 1], counts[here, 0], counts[here, 1], first[here, 0]
    )
