"""The forward pass of one step over the paged cache.

On a GPU attention reads the cache in place, and decoding steps are replayed; elsewhere the cache is gathered. A cache
that approximates is gathered everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from alignlab.config.kv_cache import ExactCache, KVCacheSettings, MmapCache
from alignlab.models.cache_spec import cache_specs
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm, hidden_states, output_head
from alignlab.models.kv_approximation.choice import approximation_of
from alignlab.models.layout import Layout
from alignlab.models.routing import RoutingRecord
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.embedded.block_pools import Window
from alignlab.rollout.embedded.cache_kinds import make_batch, make_cache
from alignlab.rollout.embedded.evicting_cache import EvictingCache
from alignlab.rollout.embedded.evictions import Eviction, Stayed
from alignlab.rollout.embedded.replays import Replays
from alignlab.rollout.embedded.sampler import Sampler
from alignlab.rollout.embedded.scheduler import Step
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.rollout.embedded.state_cache import StateCache, StepStates
from alignlab.rollout.embedded.step_plan import StepTensors, plan_step
from alignlab.rollout.embedded.tile_attention import TileBatch
from alignlab.rollout.embedded.tile_plan import TileStep, plan_tiles
from alignlab.rollout.embedded.weights import EngineWeights
from alignlab.transfer import to_device


def reads_in_place(device: torch.device) -> bool:
    """Return True if attention on a device reads the cache in place, and False if the cache is gathered for it."""
    return device.type == "cuda"


def can_be_recorded(model: nn.Module, device: torch.device) -> bool:
    """Return True if a decoding step of a model never makes the host wait, so that a CUDA graph can record it.

    Our own models never wait, except that torch multiplies experts in groups by a kernel for bfloat16 from compute
    capability 9.0 on, and otherwise by a loop that asks the device for the sizes of the groups. What models of
    `transformers` do is not known.
    """
    lm = causal_lm(model)
    if not isinstance(lm, PolicyForCausalLM) or device.type != "cuda":
        return False
    if not lm.config.num_routers:
        return True
    return lm.dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)


class Records(NamedTuple):
    """The engine's choices for a sequence, which the trainer replays; see `Completion`."""

    routing: Tensor | None = None
    kv_record: Tensor | None = None


class Runner:
    """Computes the steps that the scheduler chose, on the weights of `weights`.

    Args:
        model: the policy.
        weights: what the engine runs on.
        block_size: tokens in a block of the cache.
        max_running: most sequences that run together.
        replay: replay decoding steps on a GPU, where the model allows it.
        cache: settings of the cache, None for an exact one; how one that approximates rounds is recorded where the
            trainer replays it.

    Attributes:
        cache: what layers keep of tokens.
        states: what layers keep of sequences.
    """

    def __init__(
        self, model: nn.Module, weights: EngineWeights, block_size: int, *, max_running: int, replay: bool,
        cache: KVCacheSettings | None = None,
    ) -> None:
        config = causal_lm(model).config
        self._sparse = isinstance(config, PolicyConfig) and config.num_routers > 0
        specs = cache_specs(model)
        dtype = output_head(model)[0].dtype
        mapped = cache if isinstance(cache, MmapCache) else None
        approximate = None if cache is None or isinstance(cache, ExactCache | MmapCache) else cache
        approximation = None if approximate is None else approximation_of(approximate, model)
        self.cache = make_cache(
            specs, block_size, approximation, records_routing=self._sparse, mapped=mapped, dtype=dtype
        )
        self.states = StateCache(specs, dtype)
        self._records_cache = approximate is not None and approximate.replay
        self._model = model
        self._weights = weights
        self._max_running = max_running
        self._replay = replay
        self._replays: Replays | None = None
        self._rows: TileStep | None = None

    @property
    def device(self) -> torch.device:
        return output_head(self._model)[0].device

    @property
    def _in_place(self) -> bool:
        """True if attention reads the cache where it lies."""
        return self.cache.approximation is None and reads_in_place(self.device)

    @property
    def block_bytes(self) -> dict[Window, int]:
        """Bytes of one block, over all layers of a window, by window."""
        return self.cache.block_bytes(output_head(self._model)[0].dtype)

    @property
    def cache_bytes(self) -> int:
        """Bytes of memory of all blocks, but for those in a file, and of the slots of states."""
        blocks = sum(size * self.cache.num_blocks[window] for window, size in self.block_bytes.items())
        in_memory = blocks if self.cache.max_file_bytes() is None else 0
        return in_memory + self.states.slot_bytes * self.states.num_slots

    @property
    def max_blocks(self) -> int:
        """Blocks that attention can address: on a GPU kernels count the numbers of a layer's tensor in 32 bits."""
        return self.cache.addressable_blocks if self._in_place else sys.maxsize

    @property
    def vocab_size(self) -> int:
        """Logits after a token."""
        return int(output_head(self._model)[0].shape[0])

    def resize(self, num_blocks: Mapping[Window, int], num_slots: int) -> None:
        """Have a cache of `num_blocks` blocks, by window, and `num_slots` slots of states, without entries."""
        in_place = any(num_blocks.values()) and self._in_place
        self.cache.resize(num_blocks, num_more=1 if in_place else 0)
        self.states.resize(num_slots, num_more=1 if in_place else 0)
        self._replays = None

    def begin(self) -> None:
        """Prepare for the steps of a call; the engine's weights are in use."""
        if not self._replay or not self._in_place or not can_be_recorded(self._model, self.device):
            self._replays = None
            return
        self._replays = self._replays or Replays(self._rows_from)
        tensors = (*self._model.parameters(), *self._model.buffers())
        self._replays.keep_if_at(tuple(tensor.data_ptr() for tensor in tensors))

    def evict(self, eviction: Eviction) -> Stayed:
        """Drop tokens of a cache with a budget; see `EvictingCache.evict`."""
        assert isinstance(self.cache, EvictingCache)
        return self.cache.evict(eviction)

    def hidden(self, step: Step, others: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Compute a step.

        Args:
            step: the tokens to compute.
            others: host tensors that are needed on the device afterwards, and travel in the same copy.

        Returns:
            [M, hidden size], the final hidden states of the last `num_logits` tokens of each work, in order; and
            `others` on the device.
        """
        others = [*(torch.tensor(pairs, dtype=torch.int64) for pairs in step.copies.values()), *others]
        plan: StepTensors | TileStep
        if self._in_place:
            tiles = plan_tiles(
                step.work, block_size=self.cache.block_size, num_blocks=self.cache.num_blocks,
                max_rows=self._max_running, num_slots=self.states.num_slots,
            )
            plan, moved = tiles.on(self.device, others)
            lengths = tuple(work.count for work in step.work if work.count > 1)
        else:
            steps = plan_step(
                step.work, self.cache.block_size, self.cache.windows, tokens_of_group=self.cache.tokens_of_group
            )
            plan, moved = steps.on(self.device, others)
            lengths = steps.run_lengths
        for window in step.copies:
            self.cache.copy(window, moved.pop(0))
        return self._computed(plan, lengths).index_select(0, plan.logit_tokens), moved

    def _computed(self, plan: StepTensors | TileStep, lengths: tuple[int, ...]) -> Tensor:
        """Return the final hidden states of a step's tokens, [N, hidden size].

        Args:
            lengths: tokens of the works of more than one token, which come last.
        """
        if isinstance(plan, StepTensors):
            states = self._step_states(plan.state_slots, lengths)
            return self._forward(plan, make_batch(self.cache, plan, states))
        if self._replays is None or plan.chunks is not None:
            return self._forward(plan, TileBatch(self.cache, plan, self._step_states(plan.state_slots, lengths)))
        # Logits are computed outside, of as many tokens as there are: their number has no size class.
        self._rows = plan._replace(logit_tokens=plan.logit_tokens[:0])
        return self._replays.run(self._rows.tensors())

    def _rows_from(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the final hidden states of a decoding step that has the form of the present one, and these tensors."""
        assert self._rows is not None
        rows = self._rows.with_tensors(tensors)
        return self._forward(rows, TileBatch(self.cache, rows, self._step_states(rows.state_slots, ())))

    def _step_states(self, slots: Tensor | None, lengths: tuple[int, ...]) -> StepStates | None:
        return None if slots is None else StepStates(self.states, slots, lengths)

    def _forward(self, plan: StepTensors | TileStep, layout: Layout) -> Tensor:
        routing = RoutingRecord() if self._sparse else None
        extra = {} if routing is None else {"routing": routing}
        hidden = hidden_states(self._model, plan.tokens, plan.positions, layout, **extra)
        if routing is not None:
            self.cache.write_routing(plan.slots[None], routing.stacked_choices())
        return hidden

    def sampler(self) -> Sampler:
        """Return a new sampler from logits of this runner."""
        return Sampler()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [M,V] of hidden states [M, hidden size], in the model's dtype."""
        return self._weights.logits(hidden)

    @torch.inference_mode(False)  # records leave the engine, so they must be ordinary tensors
    def records(self, sequence: TokenSequence) -> Records:
        """Return what the trainer replays of a finished sequence."""
        return Records(self.routing(sequence), self._kv_record(sequence))

    def _kv_record(self, sequence: TokenSequence) -> Tensor | None:
        """Return how the cache rounded each token [tokens, L, bytes], on the CPU; 0 for the last, not computed token.
        """
        if not self._records_cache:
            return None
        computed = self.cache.record(
            sequence.tables, sequence.num_computed, sequence.num_prompt, evictions=sequence.evictions
        )
        if computed is None:
            return None
        record = torch.zeros((len(sequence.token_ids), *computed.shape[1:]), dtype=computed.dtype)
        record[: len(computed)] = computed
        return record

    def routing(self, sequence: TokenSequence) -> Tensor | None:
        """Return the experts chosen for each token of a sequence [tokens, MoE layers, experts a token], on the CPU.

        The last token was not computed; its entries are -1. None for a dense model.
        """
        if self.cache.routing is None:
            return None
        stored = self.cache.routing.unflatten(0, (-1, self.cache.block_size))
        [blocks] = to_device([torch.tensor(sequence.tables[None], dtype=torch.int64)], stored.device)
        computed = stored.index_select(0, blocks).flatten(0, 1)[: sequence.num_computed].cpu()
        record = torch.full((len(sequence.token_ids), *computed.shape[1:]), -1, dtype=computed.dtype)
        record[: len(computed)] = computed
        return record
