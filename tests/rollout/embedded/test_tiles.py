"""Attention that reads the cache in place, as on a GPU, equals attention over the gathered cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.attention import flex_attention as torch_flex

from alignlab.errors import ConfigError
from alignlab.models import paged_flex
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.flex_attention import soft_capped
from alignlab.models.paged_flex import TILE
from alignlab.rollout.embedded.block_manager import block_size_for
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.scheduler import Step
from alignlab.rollout.embedded.tile_plan import TileStep, size_class, visited_blocks
from tests.gpu.flex_stand_in import dense_paged_flex, paged_stand_in, seen_slots, visited_slots
from tests.rollout.embedded.schedules import LATENTS, LAYERS, SPECS, compare_all_steps, walk

CPU = torch.device("cpu")


def score_mod(softcap: float | None) -> Any:
    return None if softcap is None else soft_capped(softcap)


@pytest.mark.parametrize("has_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["no soft-cap", "soft-cap"])
@pytest.mark.parametrize(("block_size", "prefill_tokens"), [(16, 150), (128, 305), (4, 37)])
def test_reading_in_place_equals_gathering(
    block_size: int, prefill_tokens: int, softcap: float | None, has_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_flex, "_compiled_flex", paged_stand_in)
    kinds = compare_all_steps(
        block_size=block_size, prefill_tokens=prefill_tokens, softcap=softcap, has_sinks=has_sinks
    )
    assert kinds == {(False, True), (True, True), (True, False)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_torchs_own_flex_attention_equals_gathering_by_the_masks_rule_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compilation torch computes all slots and hides by the rule: it never looks at the lists of blocks."""

    def uncompiled(has_window: bool, softcap: float | None, block_size: int, scaling: float) -> Callable[..., Tensor]:
        return partial(paged_flex._attend, block_size=block_size, scaling=scaling, score_mod=score_mod(softcap))

    monkeypatch.setattr(paged_flex, "_compiled_flex", uncompiled)
    for has_sinks in (False, True):
        options: dict[str, Any] = {"softcap": 1.5, "most": 9, "has_sinks": has_sinks}
        assert len(compare_all_steps(block_size=16, prefill_tokens=150, **options)) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_the_compiled_kernel_of_a_cpu_equals_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel visits listed blocks alone, and leaves out the rule in full ones. On a CPU it cannot be compiled for
    sizes that change, and wants both lists, as wide as the cache."""

    def attend(has_window: bool, softcap: float | None, block_size: int, scaling: float) -> Callable[..., Tensor]:
        function = partial(paged_flex._attend, block_size=block_size, scaling=scaling, score_mod=score_mod(softcap))
        compiled = torch.compile(  # type: ignore[call-overload]
            function, fullgraph=True, dynamic=False, isolate_recompiles=True
        )
        names = paged_flex.VisitedBlocks._fields

        def wide(*tensors: Tensor | None) -> Tensor:
            args: dict[str, Any] = dict(zip(names, tensors[-len(names) :], strict=True))
            if args["num_full"] is None:
                args |= {"num_full": torch.zeros_like(args["num_partial"]), "full": torch.zeros_like(args["partial"])}
            place_of_block: Any = tensors[6]
            for name in ("partial", "full"):
                args[name] = F.pad(args[name], (0, len(place_of_block) - args[name].shape[3]))
            output: Tensor = compiled(*tensors[: -len(names)], *args.values())
            return output

        return wide

    monkeypatch.setattr(paged_flex, "_compiled_flex", attend)
    monkeypatch.delitem(LAYERS, 2)  # a kernel takes ten seconds to compile
    monkeypatch.delitem(LATENTS, 3)
    with torch.inference_mode():
        kinds = compare_all_steps(block_size=128, prefill_tokens=200, softcap=1.5, most=2)
    assert kinds == {(False, True), (True, True)}


def test_the_blocks_that_are_listed_hold_all_that_the_rule_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    num_full = 0

    def checked(*args: Any, block_mask: Any, **options: Any) -> Tensor:
        nonlocal num_full
        assert torch.equal(visited_slots(block_mask), seen_slots(block_mask))
        num_full += 0 if block_mask.full_kv_num_blocks is None else int(block_mask.full_kv_num_blocks.sum())
        return dense_paged_flex(*args, block_mask=block_mask, **options)

    def attend(has_window: bool, softcap: float | None, block_size: int, scaling: float) -> Callable[..., Tensor]:
        options: dict[str, Any] = {"block_size": block_size, "scaling": scaling, "score_mod": score_mod(softcap)}
        return partial(paged_flex._attend, **options, flex=checked)

    monkeypatch.setattr(paged_flex, "_compiled_flex", attend)
    compare_all_steps(block_size=16, prefill_tokens=150, softcap=None)
    assert num_full > 50


@pytest.mark.parametrize("window", [None, 1, 3, 4, 9])
def test_listed_blocks_are_those_with_visible_keys(window: int | None) -> None:
    rng, size = random.Random(0), 4
    starts = np.array([0, 2, 5, 11, 13])
    positions = starts[:, None] + np.minimum(np.arange(6), 5)
    table = np.array([rng.sample(range(40), 6) for _ in starts])
    visited = visited_blocks(positions, table, size, window, split=True)
    whole = visited_blocks(positions, table, size, window, split=False)
    assert whole.num_full is None and visited.num_full is not None and visited.full is not None
    for tile, queries in enumerate(positions):
        counts = []
        for place in range(6):
            keys = range(place * size, (place + 1) * size)
            counts.append(sum(k <= q and (window is None or k > q - window) for k in keys for q in queries))
        partial_blocks = [int(table[tile, i]) for i, n in enumerate(counts) if 0 < n < size * len(queries)]
        full_blocks = [int(table[tile, i]) for i, n in enumerate(counts) if n == size * len(queries)]
        listed = visited.partial[tile, 0, 0, : visited.num_partial[tile, 0, 0]]
        listed_full = visited.full[tile, 0, 0, : visited.num_full[tile, 0, 0]]
        assert (listed.tolist(), listed_full.tolist()) == (partial_blocks, full_blocks)
        both = whole.partial[tile, 0, 0, : whole.num_partial[tile, 0, 0]].tolist()
        assert both == [int(table[tile, i]) for i, n in enumerate(counts) if n]


def test_steps_have_few_shapes_and_added_rows_lie_in_a_block_of_their_own() -> None:
    shapes: set[tuple[tuple[int, ...], int]] = set()

    def note(step: Step, tiles: TileStep, num_blocks: int) -> None:
        nonlocal shapes
        added = tiles.slots[None] >= num_blocks * 16
        assert all((slots[added] == num_blocks * 16).all() for slots in tiles.slots.values())
        if tiles.rows is not None:
            shapes |= {(tuple(t.positions.shape), t.table.shape[1]) for t in tiles.rows.tiles.values()}
            num_rows = sum(work.count == 1 for work in step.work)
            assert added.sum() == len(tiles.rows.tiles[None].positions) - num_rows
            assert not tiles.positions[added].any() and not tiles.tokens[added].any()
            is_added = (tiles.rows.tiles[None].table == num_blocks).all(1)
            assert is_added.sum() == added.sum(), "rows of nothing but this block"
        if tiles.chunks is not None:
            assert tiles.chunks.tiles[None].positions.shape[1] == TILE

    walk(note, block_size=16, prefill_tokens=150)
    assert shapes <= {((rows, 1), width) for rows in (4, 6) for width in (4, 16, 64)}


def test_size_classes_grow_fourfold_up_to_the_most() -> None:
    assert [size_class(n) for n in (1, 4, 5, 16, 17, 64, 65)] == [4, 4, 16, 16, 64, 64, 256]
    assert [size_class(n, 100) for n in (1, 5, 64, 65, 100)] == [4, 16, 64, 100, 100]
    assert size_class(1, 1) == 1


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts traces of the compiled attention, which runs uncompiled."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    paged_flex._compiled_flex.cache_clear()
    yield counter
    paged_flex._compiled_flex.cache_clear()


@pytest.mark.parametrize("has_sinks", [False, True])
def test_rows_are_traced_once_for_each_size_class_and_tiles_twice(counter: Any, has_sinks: bool) -> None:
    """Rows with their number as a constant, for the sake of torch's kernel for decoding; all other sizes may change."""
    for block_size, prefill_tokens in ((16, 150), (16, 40), (16, 999)):
        with torch.inference_mode():
            compare_all_steps(
                block_size=block_size, prefill_tokens=prefill_tokens, softcap=None, has_sinks=has_sinks
            )
    num_classes = 2  # 4 rows, and the 6 that run together
    assert counter.frame_count <= len(SPECS) * (num_classes + 2)
    queries = [
        node.args[0].meta["example_value"].shape for graph in counter.graphs for node in graph.graph.nodes
        if node.target is torch.ops.higher_order.flex_attention
    ]  # fmt: skip
    rows = [shape for shape in queries if shape[2] == 1]
    assert rows and all(type(shape[0]) is int for shape in rows)


def test_the_block_size_follows_the_device_and_fits_its_kernels() -> None:
    cuda = torch.device("cuda")
    assert [block_size_for(None, device) for device in (CPU, cuda)] == [16, 128]
    assert [block_size_for(size, CPU) for size in (1, 3, 40)] == [1, 3, 40]
    assert [block_size_for(size, cuda) for size in (16, 64, 256)] == [16, 64, 256]
    for size, fix in ((8, 16), (24, 16), (100, 64)):
        with pytest.raises(ConfigError, match=f"block_size is {size}, .* power of two, at least 16, .* or use {fix}$"):
            block_size_for(size, cuda)


def test_no_tensor_of_a_layer_outgrows_32_bits() -> None:
    cache = PagedCache({0: LayerCacheSpec.of_heads(8, 128, 128)}, 128)
    assert (cache.addressable_blocks + 1) * 128 * 1024 < 2**31 <= (cache.addressable_blocks + 2) * 128 * 1024


def test_flex_attention_is_torchs_own() -> None:
    assert paged_flex._attend.__kwdefaults__["flex"] is torch_flex.flex_attention
