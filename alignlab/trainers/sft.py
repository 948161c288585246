"""Supervised fine-tuning: maximum likelihood of completions, packed, the prompt left out of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from alignlab.config.trainers import SFTConfig
from alignlab.data.examples import Example
from alignlab.data.packing import pack_examples
from alignlab.models.policy import PolicyOutput
from alignlab.trainers.given_data import GivenData, resolve_examples
from alignlab.trainers.offline import OfflineTrainer
from alignlab.trainers.reduction import Weigh, token_mean
from alignlab.training.evaluation import LikelihoodResult
from alignlab.types import Experience


class SFTTrainer(OfflineTrainer):
    """Cross-entropy on the completion's tokens, averaged over all of a step; arguments are `OfflineTrainer`'s."""

    config: SFTConfig
    size_field = "num_sequences"

    @property
    def weigh(self) -> Weigh:
        """Every completion token weighs the same."""
        return token_mean

    def examples(self, data: GivenData) -> Sequence[Example]:
        """Of settings, a path, or rows with `prompt` and `completion` or `messages`; or examples made already."""
        return resolve_examples(data, self.tokenizer)

    def packs(self, rows: Sequence[int]) -> list[Experience]:
        """Each example a sequence of its own."""
        return self._packs([self.train_examples[i] for i in rows])

    def _packs(self, examples: Sequence[Example]) -> list[Experience]:
        return pack_examples(examples, budget=self.config.tokens_per_microbatch)

    def loss(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-log p of each token [N]."""
        return -output.logprobs, {"entropy": output.entropy}

    def evaluate(self) -> LikelihoodResult | None:
        """How likely the completions of held-out examples are; each rank looks at all of them."""
        if not self.eval_examples:
            return None
        total, num_tokens = 0.0, 0
        for pack in self._packs(self.eval_examples):
            moved = pack.to(self.learner.device)
            logprobs = self.learner.score([moved])[0][moved.completion_mask]
            total -= float(logprobs.double().sum())
            num_tokens += len(logprobs)
        return LikelihoodResult(total / num_tokens, num_examples=len(self.eval_examples), num_tokens=num_tokens)
