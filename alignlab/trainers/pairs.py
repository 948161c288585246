"""Pairs of completions in a pack, and their loss by `PairLossConfig.loss`.

DPO (arXiv:2305.18290), cDPO, robust DPO (arXiv:2403.00409), IPO (arXiv:2310.12036), hinge (arXiv:2305.10425), SimPO
(arXiv:2405.14734), ORPO (arXiv:2403.07691).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignlab.config.trainers import PairLossConfig
from alignlab.data.preferences import Preference
from alignlab.functional import preference_losses as losses
from alignlab.functional.reduction import sequence_sum
from alignlab.models.policy import PolicyOutput
from alignlab.transfer import to_device
from alignlab.types import Experience

_OF_MEANS = ("ipo_mean", "simpo", "orpo")
ROUNDING = 1e-3  # nats; a completion's log-prob differs by as much from pack to pack


@dataclass(frozen=True)
class Pairs:
    """The P pairs of a pack.

    Attributes:
        chosen, rejected: [P] summed log-probs under the policy, nats.
        chosen_ratio, rejected_ratio: [P] the same less the reference's; without a reference, the same.
        chosen_tokens, rejected_tokens: [P] lengths.
        probabilities: [P] that the chosen one is the better one; None for 1.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    probabilities: Tensor | None = None

    @property
    def margins(self) -> Tensor:
        """[P] log-ratio of the chosen completion less that of the rejected one, nats."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_margins(self) -> Tensor:
        """[P] the same of means over each completion's tokens."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens


def with_labels(packs: Sequence[Experience], pairs: Sequence[Preference]) -> list[Experience]:
    """Return the packs with the margin of each pair of the step, and the probability of its label."""
    margins = torch.tensor([pair.margin for pair in pairs])
    probabilities = torch.tensor([pair.probability for pair in pairs])
    return [replace(pack, pair_margins=margins, pair_probabilities=probabilities) for pack in packs]


def pair_index(pack: Experience) -> Tensor:
    """Return the ids [P] of the pairs in a pack."""
    return to_device([torch.tensor(pack.segments.pairs, dtype=torch.long)], pack.tokens.device)[0]


def pairs_of(logprobs: Tensor, pack: Experience) -> Pairs:
    """Return the pairs of a pack, from the log-probs [N] of its tokens."""
    ids, mask, index = pack.segments.sequence_of_token, pack.completion_mask, pair_index(pack)
    num_sequences = 2 * (1 + max(pack.segments.pairs, default=0))
    ref = torch.zeros_like(logprobs) if pack.ref_logprobs is None else pack.ref_logprobs
    sums, ratios, lengths = (
        sequence_sum(torch.where(mask, values, 0.0), ids, num_sequences=num_sequences).view(-1, 2)[index]
        for values in (logprobs, logprobs - ref, torch.ones_like(logprobs))
    )
    probabilities = None if pack.pair_probabilities is None else pack.pair_probabilities[index]
    return Pairs(
        sums[:, 0], sums[:, 1], ratios[:, 0], ratios[:, 1], lengths[:, 0], lengths[:, 1], probabilities
    )


def pair_loss(pairs: Pairs, config: PairLossConfig) -> Tensor:
    """Return the loss [P] of each pair by `config.loss`."""
    beta = config.beta
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    match config.loss:
        case "sigmoid":
            wrong = config.label_smoothing if pairs.probabilities is None else 1 - pairs.probabilities
            return losses.dpo_sigmoid(pairs.margins, beta=beta, label_smoothing=wrong)
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


def pair_metrics(pairs: Pairs, config: PairLossConfig) -> dict[str, Tensor]:
    """Return metrics [P]: whether the chosen completion leads, by how much, and how likely both are."""
    of_means = config.loss in _OF_MEANS
    leads = pairs.mean_margins if of_means else pairs.margins
    # A reference is scored in other packs than the policy; without one, equal log-probs alone are a tie.
    rounding = ROUNDING if config.needs_reference else 0.0
    length = torch.minimum(pairs.chosen_tokens, pairs.rejected_tokens) if of_means else torch.ones_like(leads)
    ties = leads.abs() <= rounding / length
    return {
        "preference_accuracy": torch.where(ties, 0.5, (leads > 0).float()),  # a tie is a guess
        "margin": config.beta * leads,
        "chosen_logprob": pairs.chosen,
        "rejected_logprob": pairs.rejected,
    }


def loss_of_pairs(
    output: PolicyOutput, pack: Experience, config: PairLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss [P] of each pair of a pack, and metrics [P]."""
    pairs = pairs_of(output.logprobs, pack)
    return pair_loss(pairs, config), pair_metrics(pairs, config)
