"""Attention over the paged cache, compiled for a GPU that is not there: torch's choice of kernel, and machine code.

Tensors without values stand on a pretended H100. Torch lowers the attention to Triton, and Triton compiles it to code
for that GPU; nothing runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from alignlab.models import paged_flex
from alignlab.models.paged_flex import TILE, Tiles, VisitedBlocks

pytest.importorskip("triton.backends.nvidia.compiler", reason="needs Triton, whose compiler needs no GPU")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's compiler
NUM_SMS = 132
ROWS: dict[str, Any] = {"num_tiles": 16, "num_queries": 1}
CHUNKS: dict[str, Any] = {"num_tiles": 5, "num_queries": TILE}
WINDOW: dict[str, Any] = {"window": True, "softcap": 30.0}
FORMS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {  # constants that the kernel must have
    "rows": (ROWS, {"SPLIT_KV": NUM_SMS // 32 * 2, "BLOCK_M": 16, "BLOCK_N": 64}),
    "rows with a window and a soft-cap": (ROWS | WINDOW, {"SPLIT_KV": NUM_SMS // 32 * 2}),
    "rows, small blocks": (ROWS | {"block_size": 16}, {"SPLIT_KV": 8, "BLOCK_N": 16}),
    "rows, three heads share keys": (ROWS | {"heads": 9, "kv_heads": 3, "size": 64}, {"BLOCK_M": 16}),
    "chunks": (CHUNKS, {"BLOCK_M": 128, "BLOCK_N": 64}),
    "chunks with a window and a soft-cap": (CHUNKS | WINDOW, {"BLOCK_M": 128}),
    "chunks, small blocks": (CHUNKS | {"block_size": 16}, {"BLOCK_N": 16}),
}


class _Lowered(Exception):
    """Ends a compilation where the code is known."""


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Returns the code that torch would run on an H100."""
    import triton.runtime
    from torch._inductor import config, graph
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    properties = SimpleNamespace(
        total_memory=80 << 30, major=9, minor=0, name="H100", multi_processor_count=NUM_SMS, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
    )
    functions = {
        "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_properties": properties, "_get_device_properties": properties,
        "get_device_capability": (9, 0), "is_initialized": True,
        "synchronize": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None, "is_bf16_supported": True,
    }
    for name, answer in functions.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for passes in (joint_graph, post_grad):
        monkeypatch.setattr(passes, "lazy_init", lambda *args, **options: None)  # would allocate on the GPU
    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    codegen = graph.GraphLowering.codegen

    def stop_at_code(self: Any) -> Any:
        raise _Lowered(codegen(self)[0].value)

    monkeypatch.setattr(graph.GraphLowering, "codegen", stop_at_code)

    def lower(**form: Any) -> str:
        with config.patch(force_disable_caches=True, compile_threads=1), pytest.raises(Exception) as raised:
            attend(**form)
        cause: BaseException | None = raised.value
        while cause is not None and not isinstance(cause, _Lowered):
            cause = cause.__cause__ or cause.__context__
        assert cause is not None, raised.value
        return str(cause)

    paged_flex._compiled_flex.cache_clear()
    yield lower
    paged_flex._compiled_flex.cache_clear()
    torch._dynamo.reset()


def attend(
    *, num_tiles: int, num_queries: int, heads: int = 8, kv_heads: int = 2, size: int = 128, block_size: int = 128,
    window: bool = False, softcap: float | None = None,
) -> Tensor:
    """Attend with tensors without values."""
    width, num_blocks = 16, 301

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device="cuda")

    def numbers(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda")

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        listed = ints(num_tiles, 1, 1), ints(num_tiles, 1, 1, width)
        full = listed if num_queries > 1 else (None, None)
        tiles = Tiles(ints(num_tiles, num_queries), ints(num_tiles, width), ints(num_blocks))
        cache = numbers(num_blocks * block_size, kv_heads, size)
        return paged_flex.flex_paged_attention(
            numbers(num_tiles, num_queries, heads, size).transpose(1, 2), cache, cache, tiles,
            VisitedBlocks(*listed, *full, ints(num_tiles, num_queries) if window else None),
            block_size=block_size, scaling=size**-0.5, softcap=softcap,
        )


@pytest.mark.parametrize("form", FORMS)
def test_torch_takes_the_kernel_that_is_meant_and_triton_compiles_it(form: str, lowered: Callable[..., str]) -> None:
    from torch._inductor.codecache import PyCodeCache

    shape, expected = FORMS[form]
    code = lowered(**shape)
    constants = dict(re.findall(r"(\w+) : tl\.constexpr = (\d+)\n", code))
    assert {name: int(constants[name]) for name in expected} == expected
    assert ("SPLIT_KV" in constants) == ("SPLIT_KV" in expected), "the kernel for decoding, which splits a row's keys"
    kernels = re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", code, flags=re.DOTALL)
    assert kernels
    for name, source in kernels:
        kernel = getattr(PyCodeCache.load(source), name)
        kernel.precompile(warm_cache_only=True)
        assert kernel.compile_results
