"""Supervised fine-tuning: maximum likelihood of completions, packed, the prompt left out of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from alignlab.config.trainers import SFTConfig
from alignlab.data.examples import Example
from alignlab.data.packing import pack_examples
from alignlab.models.policy import PolicyOutput
from alignlab.trainers.assemble import resolve_examples
from alignlab.trainers.offline import OfflineTrainer
from alignlab.trainers.reduction import Weigh, token_mean
from alignlab.types import Experience


class SFTTrainer(OfflineTrainer):
    """Cross-entropy on the completion's tokens, averaged over all of a step; arguments are `OfflineTrainer`'s."""

    config: SFTConfig
    size_field = "num_sequences"

    @property
    def weigh(self) -> Weigh:
        """Every completion token weighs the same."""
        return token_mean

    def examples(self, dataset: Any) -> Sequence[Example]:
        """Of settings, a path, or rows with `prompt` and `completion` or `messages`; or examples made already."""
        return resolve_examples(dataset, self.tokenizer)

    def packs(self, rows: Sequence[int]) -> list[Experience]:
        """Each example a sequence of its own."""
        return pack_examples([self.train_examples[i] for i in rows], budget=self.config.tokens_per_microbatch)

    def loss(self, output: PolicyOutput, experience: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-log p of each token [N]."""
        return -output.logprobs, {"entropy": output.entropy}
