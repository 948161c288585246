"""One step on the device: the model's forward pass over the paged cache, and the logits that are sampled from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alignlab.models.attention import causal_lm, hidden_states, output_head
from alignlab.models.config import PolicyConfig
from alignlab.models.moe import RoutingRecord
from alignlab.rollout.paged_attention import KVCache, PagedBatch
from alignlab.rollout.scheduler import Step
from alignlab.rollout.sequence import TokenSequence
from alignlab.rollout.step_plan import plan_step
from alignlab.rollout.weights import EngineWeights


class Runner:
    """Runs the model on the steps that the scheduler chose.

    Attributes:
        cache: keys and values; grown by the engine.
    """

    def __init__(self, model: nn.Module, weights: EngineWeights, block_size: int) -> None:
        self.cache = KVCache(block_size)
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
        config, dtype = causal_lm(self._model).config.get_text_config(), output_head(self._model)[0].dtype
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = 2 * kv_heads * head_dim
        return int(config.num_hidden_layers * self.cache.block_size * width * dtype.itemsize)

    def logits(self, step: Step, wanted: Sequence[int]) -> Tensor:
        """Compute a step.

        Args:
            wanted: indices of works, with repetitions.

        Returns:
            [len(wanted), V], the logits after the last token of each, in the model's dtype.
        """
        if step.copies:
            self.cache.copy(step.copies)
        plan = plan_step(step.work, self.cache.block_size)
        tokens, positions, slots, groups = plan.on(self.device)
        layout = PagedBatch(self.cache, slots, groups)
        routing = RoutingRecord() if self._sparse else None
        extra = {} if routing is None else {"routing": routing}
        hidden = hidden_states(self._model, tokens, positions, layout, **extra)
        if routing is not None:
            self.cache.write_routing(slots, routing.stacked_choices())
        rows = torch.tensor([plan.last[index] for index in wanted], dtype=torch.int64, device=hidden.device)
        return self._weights.logits(hidden.index_select(0, rows))

    @torch.inference_mode(False)  # what leaves the engine is an ordinary tensor
    def routing(self, sequence: TokenSequence) -> Tensor | None:
        """Experts chosen for each token of a sequence, -1 for the last, which was not computed; on the CPU."""
        if self.cache.routing is None:
            return None
        stored = self.cache.routing.unflatten(0, (self.cache.num_blocks, -1))
        blocks = torch.tensor(sequence.blocks, device=stored.device)
        computed = stored.index_select(0, blocks).flatten(0, 1)[: sequence.num_computed].cpu()
        record = torch.full((len(sequence.token_ids), *computed.shape[1:]), -1, dtype=computed.dtype)
        record[: len(computed)] = computed
        return record
