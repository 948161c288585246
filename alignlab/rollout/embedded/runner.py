"""The forward pass of one step over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alignlab.models.cache_spec import cache_specs
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm, hidden_states, output_head
from alignlab.models.routing import RoutingRecord
from alignlab.rollout.embedded.paged_attention import PagedBatch
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.scheduler import Step
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.rollout.embedded.step_plan import plan_step
from alignlab.rollout.embedded.weights import EngineWeights


class Runner:
    """Computes the steps that the scheduler chose, on the weights of `weights`.

    Raises:
        ConfigError: a layer of the model caches what the paged cache cannot hold.

    Attributes:
        cache: the entries of all layers; the engine decides on its size.
    """

    def __init__(self, model: nn.Module, weights: EngineWeights, block_size: int) -> None:
        self.cache = PagedCache(cache_specs(model), block_size)
        self._model = model
        self._weights = weights
        config = causal_lm(model).config
        self._sparse = isinstance(config, PolicyConfig) and bool(config.sparse_layers)

    @property
    def device(self) -> torch.device:
        return output_head(self._model)[0].device

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, over all layers."""
        return self.cache.block_numel * output_head(self._model)[0].dtype.itemsize

    @property
    def vocab_size(self) -> int:
        """Logits after a token."""
        return int(output_head(self._model)[0].shape[0])

    def hidden(self, step: Step, others: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Compute a step.

        Args:
            step: the tokens to compute.
            others: host tensors that are needed on the device afterwards, and travel in the same copy.

        Returns:
            [M, hidden size], the final hidden states of the last `num_logits` tokens of each work, in order; and
            `others` on the device.
        """
        copies = torch.tensor(step.copies, dtype=torch.int64).view(-1, 2)
        plan, (copies, *moved) = plan_step(step.work, self.cache.block_size).on(self.device, [copies, *others])
        if step.copies:
            self.cache.copy(copies)
        layout = PagedBatch(self.cache, plan.slots, plan.groups)
        routing = RoutingRecord() if self._sparse else None
        extra = {} if routing is None else {"routing": routing}
        hidden = hidden_states(self._model, plan.tokens, plan.positions, layout, **extra)
        if routing is not None:
            self.cache.write_routing(plan.slots, routing.stacked_choices())
        return hidden.index_select(0, plan.logit_tokens), moved

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [M,V] of hidden states [M, hidden size], in the model's dtype."""
        return self._weights.logits(hidden)

    @torch.inference_mode(False)  # the record leaves the engine, so it must be an ordinary tensor
    def routing(self, sequence: TokenSequence) -> Tensor | None:
        """Return the experts chosen for each token of a sequence [tokens, MoE layers, experts a token], on the CPU.

        The last token was not computed; its entries are -1. None for a dense model.
        """
        if self.cache.routing is None:
            return None
        stored = self.cache.routing.unflatten(0, (self.cache.num_blocks, -1))
        blocks = torch.tensor(sequence.blocks, device=stored.device)
        computed = stored.index_select(0, blocks).flatten(0, 1)[: sequence.num_computed].cpu()
        record = torch.full((len(sequence.token_ids), *computed.shape[1:]), -1, dtype=computed.dtype)
        record[: len(computed)] = computed
        return record
