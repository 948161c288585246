"""Supervised fine-tuning: maximum likelihood of completions, packed, the prompt left out of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignlab.config.trainers import SFTConfig
from alignlab.data.examples import Example
from alignlab.data.packing import pack_examples
from alignlab.evaluation.held_out_intervals import likelihood_intervals
from alignlab.evaluation.results import LikelihoodResult
from alignlab.loop.given_data import GivenData, resolve_examples
from alignlab.loop.offline import OfflineTrainer
from alignlab.loop.offline_algorithm import OfflineAlgorithm, OfflineInputs, policy_learner
from alignlab.loop.supervised import SupervisedModel, SupervisedOutput, supervised_forward
from alignlab.types import Experience


class SFT(OfflineAlgorithm[Example]):
    """Cross-entropy on the completion's tokens, averaged over all of a step."""

    config: SFTConfig
    compares_logprobs = False
    trains_mtp = True

    def __init__(self, config: SFTConfig, inputs: OfflineInputs) -> None:
        module = SupervisedModel(
            inputs.model, label_smoothing=config.label_smoothing, z_loss_coef=config.z_loss_coef,
            chunk_tokens=config.memory.logprob_chunk_tokens,
        )
        options = {"forward": supervised_forward, "compares_logprobs": self.compares_logprobs}
        super().__init__(config, inputs, policy_learner(config, inputs, module, **options))

    def read(self, data: GivenData) -> Sequence[Example]:
        """Return the examples of rows with `prompt` and `completion` or `messages`, or examples made already."""
        return resolve_examples(data, self.tokenizer)

    def packs(self, name: str, examples: Sequence[Example], rows: Sequence[int]) -> list[Experience]:
        """Return the packs of some examples, each a sequence of its own."""
        return pack_examples([examples[i] for i in rows], budget=self.config.memory.tokens_per_microbatch)

    def loss(self, output: SupervisedOutput, pack: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of each token [N]: -log p, unless labels are smoothed or there is a z-loss."""
        metrics = {"entropy": output.entropy}
        if self.config.label_smoothing or self.config.z_loss_coef:
            metrics["cross_entropy"] = -output.logprobs  # of the labels as they are
        if self.config.z_loss_coef:
            metrics["log_normalizer"] = output.log_normalizer
        return output.label_loss, metrics

    def evaluate(self, held_out: Sequence[Example]) -> LikelihoodResult:
        """Return the mean negative log-likelihood of held-out completions, nats a token."""
        packs = self.packs("eval", held_out, range(len(held_out)))
        parts = self.measured_packs(lambda share: self._likelihoods(share(packs)))
        nats, tokens = ([value for part in parts for value in part[index]] for index in (0, 1))
        return LikelihoodResult(
            sum(nats) / sum(tokens), num_examples=len(held_out), num_tokens=int(sum(tokens)),
            intervals=likelihood_intervals(nats, tokens),
        )

    def _likelihoods(self, packs: Sequence[Experience]) -> list[list[list[float]]]:
        """Return, for each pack, the sums of -log p of its completions' tokens, and the numbers of tokens."""
        moved = [pack.to(self.learner.device) for pack in packs]
        parts = []
        for pack, logprobs in zip(moved, self.learner.logprobs(moved), strict=True):
            ids, mask = pack.segments.sequence_of_token.cpu(), pack.completion_mask.cpu()
            chosen = list(pack.segments.sequences)
            values = torch.zeros(2, 1 + max(chosen), dtype=torch.float64)  # on the host, which adds in order
            values[0].index_add_(0, ids[mask], -logprobs.cpu().double()[mask])
            values[1].index_add_(0, ids[mask], torch.ones(int(mask.sum()), dtype=torch.float64))
            parts.append(values[:, chosen].tolist())
        return parts


class SFTTrainer(OfflineTrainer):
    """Trainer of SFT; arguments are `OfflineTrainer`'s."""

    config: SFTConfig
    algorithm_class = SFT
    size_field = "num_sequences"
