"""Schedules of steps with chunks, forks, shared prefixes and rows, whose attention is computed in both ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.rollout.embedded.block_pools import BlockPools
from alignlab.rollout.embedded.paged_attention import PagedBatch
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.scheduler import Scheduler, Step
from alignlab.rollout.embedded.sequence import Request, TokenSequence
from alignlab.rollout.embedded.step_plan import plan_step
from alignlab.rollout.embedded.tile_attention import TileBatch
from alignlab.rollout.embedded.tile_plan import TileStep, plan_tiles
from alignlab.types import SamplingParams
from tests.rollout.conftest import make_prompts

CPU = torch.device("cpu")
HEADS, MAX_RUNNING = 4, 6
LAYERS = {0: (2, 16, 16, None), 1: (1, 16, 32, 7), 2: (4, 32, 16, 40)}  # kv heads, key and value size, window
WINDOWS = [None, 7, 40]
LATENTS = {3: (48, 32, None)}  # size, columns that are the value, window
SPECS = {i: LayerCacheSpec.of_heads(kv, k, v, window=window) for i, (kv, k, v, window) in LAYERS.items()} | {
    i: LayerCacheSpec.of_latent(size, columns, window=window) for i, (size, columns, window) in LATENTS.items()
}
Visit = Callable[[Step, TileStep, int], None]
Compare = Callable[[Tensor, Tensor], None]


def assert_close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


def walk(visit: Visit, *, block_size: int, prefill_tokens: int, most: int = 1000) -> None:
    """Schedule prompts of many lengths: chunks of long ones, groups that fork, prefixes that are found, rows."""
    rng = random.Random(block_size)
    prompts = make_prompts(5, 300, 70, 1)
    requests = [Request(p, SamplingParams(n=3, max_new_tokens=9), frozenset()) for p in [*prompts, prompts[1]]]
    sequences = [TokenSequence(r, 0, list(r.prompt.token_ids)) for r in requests for _ in range(r.sampling.n)]
    num_blocks = 2000 // block_size + 9
    pools = BlockPools(WINDOWS, block_size)
    pools.grow(dict.fromkeys(WINDOWS, num_blocks))
    scheduler = Scheduler(pools, root=b"", max_running=MAX_RUNNING, prefill_tokens=prefill_tokens)
    scheduler.add(sequences)
    while scheduler.has_work and most > 0:
        most -= 1
        step = scheduler.schedule()
        visit(step, plan_tiles(
            step.work, block_size=block_size, num_blocks=dict.fromkeys(WINDOWS, num_blocks), max_rows=MAX_RUNNING
        ), num_blocks)  # fmt: skip
        for sequence, _ in scheduler.commit(step):
            sequence.append(rng.randrange(256), 0.0, 0.0, 0)
            if sequence.finish_reason is not None:
                scheduler.finish(sequence)


def entries(
    tokens: Tensor, positions: Tensor, dtype: torch.dtype, layer: int, heads: int, size: int, kind: int
) -> Tensor:
    """Numbers [1,heads,N,size] that depend on each token and its position alone."""
    table = torch.randn(7, heads, size, generator=torch.Generator().manual_seed(100 * layer + kind)).to(tokens.device)
    numbers = table[tokens % 7] * torch.sin(positions[:, None, None] + 1.0 + kind)
    return numbers.to(dtype).transpose(0, 1)[None]


def attended(
    batch: Any, tokens: Tensor, positions: Tensor, softcap: float | None, dtype: torch.dtype, *, has_sinks: bool = False
) -> list[Tensor]:
    """Attention of every layer, [N,H,V]."""
    outputs = []
    sinks = torch.tensor([-1.0, 0.0, 0.5, 2.0], device=tokens.device) if has_sinks else None
    for layer, (kv, k, v, window) in LAYERS.items():
        query, key, value = (
            entries(tokens, positions, dtype, layer, heads, size, kind)
            for kind, (heads, size) in enumerate([(HEADS, k), (kv, k), (kv, v)])
        )
        outputs.append(
            batch.attend(layer, query, key, value, scaling=0.4, sliding_window=window, softcap=softcap, sinks=sinks)[0]
        )
    for layer, (size, _, window) in LATENTS.items():
        query, latent = (
            entries(tokens, positions, dtype, layer, heads, size, kind) for kind, heads in enumerate([HEADS, 1])
        )
        options: dict[str, Any] = {"scaling": 0.4, "sliding_window": window, "softcap": softcap, "sinks": sinks}
        outputs.append(batch.attend(layer, query, latent, None, **options)[0])
    return outputs


def compare_all_steps(
    *, block_size: int, prefill_tokens: int, softcap: float | None, most: int = 1000, device: torch.device = CPU,
    dtype: torch.dtype = torch.float32, compare: Compare = assert_close, has_sinks: bool = False,
) -> set[tuple[bool, bool]]:
    """Compute a schedule both ways, compare every token in every layer, and return the kinds of steps there were."""
    kinds = set()
    gathered, in_place = PagedCache(SPECS, block_size), PagedCache(SPECS, block_size)

    def visit(step: Step, tiles: TileStep, num_blocks: int) -> None:
        if not gathered.layers:
            gathered.resize(dict.fromkeys(WINDOWS, num_blocks))
            in_place.resize(dict.fromkeys(WINDOWS, num_blocks), num_more=1)
        for window, pairs in step.copies.items():
            for cache in (gathered, in_place):
                cache.copy(window, torch.tensor(pairs, device=device))
        kinds.add((tiles.rows is not None, tiles.chunks is not None))
        (twin, _), (ours, _) = plan_step(step.work, block_size, WINDOWS).on(device), tiles.on(device)
        options: dict[str, Any] = {"softcap": softcap, "dtype": dtype, "has_sinks": has_sinks}
        expected = attended(PagedBatch(gathered, twin.slots, twin.groups), twin.tokens, twin.positions, **options)
        found = attended(TileBatch(in_place, ours), ours.tokens, ours.positions, **options)
        our_slots, twin_slots = ours.slots[None], twin.slots[None]
        is_own = our_slots < num_blocks * block_size
        places = {slot: index for index, slot in enumerate(twin_slots.tolist())}
        order = torch.tensor([places.pop(slot) for slot in our_slots[is_own].tolist()], device=device)
        assert not places
        for in_place_output, gathered_output in zip(found, expected, strict=True):
            compare(in_place_output[is_own], gathered_output[order])
        assert torch.equal(our_slots[ours.logit_tokens], twin_slots[twin.logit_tokens]), "in the order of the works"

    walk(visit, block_size=block_size, prefill_tokens=prefill_tokens, most=most)
    return kinds
