"""Pairs of completions in a pack: what is known of them, and their loss by `PairLossConfig.loss`.

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
from alignlab.types import Experience

_OF_MEANS = ("ipo_mean", "simpo", "orpo")
ROUNDING = 1e-3  # nats; a completion's log-prob differs by as much from pack to pack


@dataclass(frozen=True)
class Pairs:
    """What is known of the P pairs of a pack.

    Attributes:
        chosen, rejected: [P] summed log-probs under the policy.
        chosen_ratio, rejected_ratio: [P] the same less the reference's; without a reference, the same.
        chosen_tokens, rejected_tokens: [P] lengths.
        places: [P] index of the token on which a pair's numbers stand.
        probabilities: [P] that the chosen one is the better one; None for 1.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    places: Tensor
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
    """The packs with what the dataset says of each token's pair: margin, and probability of its label."""
    known = torch.tensor([[pair.margin, pair.probability] for pair in pairs])
    found = []
    for pack in packs:
        labels = known[torch.tensor(pack.segments.group_ids)].to(pack.tokens.device)[pack.segments.segment_of_token]
        found.append(replace(pack, margins=labels[:, 0], probabilities=labels[:, 1]))
    return found


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
    places = first[here, 0]
    known = None if pack.probabilities is None else pack.probabilities[places]
    return Pairs(
        sums[here, 0], sums[here, 1], ratios[here, 0], ratios[here, 1], counts[here, 0], counts[here, 1], places, known
    )


def pair_loss(pairs: Pairs, config: PairLossConfig) -> Tensor:
    """[P], by `config.loss`."""
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
    """[P] of each metric: whether the chosen completion leads, by how much, and how likely both are."""
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


def pair_token_loss(
    output: PolicyOutput, experience: Experience, config: PairLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, on one token of it [N]; metrics likewise."""
    pairs = pairs_of(output.logprobs, experience)

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(experience.num_tokens).index_put((pairs.places,), values)

    spread = {name: placed(values) for name, values in pair_metrics(pairs, config).items()}
    return placed(pair_loss(pairs, config)), spread
