"""Supervised fine-tuning: maximum likelihood of completions, packed, the prompt left out of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from alignlab.config.trainers import SFTConfig
from alignlab.data.examples import Example
from alignlab.data.packing import pack_examples
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
        sums = self.measured_packs(lambda share: self._likelihoods(share(packs)))
        num_tokens = sum(count for _, count in sums)
        loss = -sum(logprobs for logprobs, _ in sums) / num_tokens
        return LikelihoodResult(loss, num_examples=len(held_out), num_tokens=num_tokens)

    def _likelihoods(self, packs: Sequence[Experience]) -> list[tuple[float, int]]:
        """Return the sum of the log-probs of each pack's completion tokens, and their number."""
        moved = [pack.to(self.learner.device) for pack in packs]
        logprobs = [
            of_pack[pack.completion_mask] for pack, of_pack in zip(moved, self.learner.logprobs(moved), strict=True)
        ]
        return [(float(of_pack.double().sum()), len(of_pack)) for of_pack in logprobs]


class SFTTrainer(OfflineTrainer):
    """Trainer of SFT; arguments are `OfflineTrainer`'s."""

    config: SFTConfig
    algorithm_class = SFT
    size_field = "num_sequences"
