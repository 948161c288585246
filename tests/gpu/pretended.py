"""A GPU that exists on any machine: values are computed on the CPU, devices are checked, crossings are counted.

    with PretendedGPU() as gpu:  # in a process that `tests.gpu.plugin` prepared
        torch.ones(3, device="cuda") + torch.ones(3)  # raises, as it does on CUDA
        print(gpu.report())

A tensor on "cuda" is a wrapper around a CPU tensor, and every operation passes through a dispatch mode. What is proved
is which device each tensor is on, how often the host waits for the device and where, and that results equal the CPU's.
Kernels, their dtypes, streams, memory and several devices are not.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import alignlab
import alignlab.models.routers.auction  # whose operation is in `WAITS`

aten = torch.ops.aten
PACKAGE = f"{Path(alignlab.__file__).parent}/"
CUDA = torch.device("cuda", 0)
# Operations whose CUDA kernels, or the C++ around them, wait for the device; by the number of waits in a call.
WAITS = {
    aten._local_scalar_dense.default: 1, aten.nonzero.default: 1, aten.masked_select.default: 1,
    aten.bincount.default: 2,  # for the smallest and the largest value
    aten.repeat_interleave.Tensor: 1, aten._unique2.default: 1, aten.unique_dim.default: 1,
    torch.ops.alignlab.balanced_assignment.default: 2,  # computes on the host: down and up again
}
# Operations that CUDA refuses under `torch.use_deterministic_algorithms`, whose documentation lists them: always, with
# numbers of a float dtype, or with weights.
REFUSED = (
    "put", "put_", "histc", "kthvalue", "median", "nanmedian", "nll_loss_forward", "nll_loss2d_forward",
    "grid_sampler_2d_backward", "_ctc_loss_backward", "max_unpool2d", "reflection_pad1d_backward",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "_adaptive_avg_pool2d_backward",
)
REFUSED_IN_FLOATS = ("cumsum", "cumsum_", "cumprod")
# Operations that add to one place in any order, unless torch is deterministic; then they are slower.
ADDING = {
    aten.index_add.default, aten.index_add_.default, aten.scatter_add.default, aten.scatter_add_.default,
    aten.scatter_reduce.two, aten.scatter_reduce_.two,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default}
GIB = 1 << 30


class GpuTensor(Tensor):
    """A CPU tensor that says it is on cuda:0.

    Attributes:
        inner: the CPU tensor.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> GpuTensor:
        wrapper: GpuTensor = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=CUDA, requires_grad=False,
        )
        wrapper.inner = real
        return wrapper

    def tolist(self) -> Any:
        """Return the values, by one transfer."""
        PretendedGPU.running().crossed("device to host", self, waits=True)
        return self.inner.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> GpuTensor:
        with torch.no_grad():
            copied = GpuTensor(self.inner.clone())
        copied.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def untyped_storage(self) -> Any:
        """Return the storage of the CPU tensor, which tells tensors that share memory."""
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        """Return the address of the CPU tensor."""
        return self.inner.data_ptr()

    def numpy(self, **kwargs: Any) -> Any:
        """Raise, as a tensor on CUDA does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self, **kwargs: Any) -> str:
        return f"GpuTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendedGPU.running().run(func, args, kwargs or {})


def _cuda_functions() -> dict[str, Callable[..., Any]]:
    """Return what `torch.cuda` answers, by name, where there is one device."""
    properties = SimpleNamespace(total_memory=80 * GIB, major=9, minor=0, name="pretended")
    return {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": lambda device: None, "mem_get_info": lambda device=None: (GIB, GIB),
        "memory_allocated": lambda device=None: 0, "memory_reserved": lambda device=None: 0,
        "empty_cache": lambda: None, "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: "pretended",
    }


class PretendedGPU(TorchDispatchMode):
    """Attributes:
    waits: how often the host waited for the device, by (kind, place in alignlab).
    transfers: how often tensors were moved between host and device, likewise.
    operations: how often each operation ran on the device; views are left out.
    watch: called with each operation on the device, its tensors and its place, before it runs; None for nothing.
    unordered: places of operations that added floats in an order that CUDA leaves open.
    """

    _active: PretendedGPU | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.transfers: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[Any] = Counter()
        self.watch: Callable[[Any, list[Tensor], str], None] | None = None
        self.unordered: set[str] = set()
        self._pinned: dict[int, Tensor] = {}  # by address; kept, so that no other tensor gets the address
        self._restore: dict[str, Any] = {}

    @classmethod
    def running(cls) -> PretendedGPU:
        """Return the mode that tensors on the device live in."""
        assert cls._active is not None, "tensors of a PretendedGPU live within its context"
        return cls._active

    def __enter__(self) -> PretendedGPU:
        PretendedGPU._active = self
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter becomes a wrapper
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device="cuda") is moved where the mode sees it
        self._restore = {name: getattr(torch.cuda, name) for name in _cuda_functions()}
        for name, function in _cuda_functions().items():
            setattr(torch.cuda, name, function)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, function in self._restore.items():
            setattr(torch.cuda, name, function)
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)
        PretendedGPU._active = None

    def reset(self) -> None:
        """Set all counts to zero."""
        for counter in (self.waits, self.transfers, self.operations):
            counter.clear()

    @property
    def num_waits(self) -> int:
        """How often the host waited since `reset`."""
        return sum(self.waits.values())

    def report(self) -> str:
        """Return the waits and transfers by place, the most frequent first."""
        lines = [
            f"{times:5d} {what}: {kind}, {place}"
            for what, counter in (("waits", self.waits), ("transfers", self.transfers))
            for (kind, place), times in counter.most_common()
        ]
        return "\n".join(lines)

    def crossed(self, kind: str, source: Tensor, *, waits: bool) -> None:
        """Count a transfer, and a wait if the host waits for it."""
        if source.numel():
            self.transfers[kind, _place()] += 1
            if waits:
                self._wait(kind)

    def _wait(self, kind: str, times: int = 1) -> None:
        self.waits[kind, _place()] += times

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and a guard against it takes longer than most operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the tensors that the wrappers hold, and wrap its result if it is on the device."""
        with torch._C._DisableTorchDispatch():
            if func is aten._fused_sdp_choice.default:
                return 0
            if func in COPIES:
                return self._copy(func, args, kwargs)
            if func is aten.addmm.dtype_out:  # a kernel that CUDA alone has
                total, left, right = _real(args[:3])
                total += left @ right
                return kwargs["out"]
            if func in (aten.is_pinned.default, aten._pin_memory.default):
                return self._pin(func, args[0])
            return self._compute(func, args, kwargs)

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        has_gpu = any(isinstance(tensor, GpuTensor) for tensor in tensors)
        if has_gpu:
            self._check_devices(func, args, tensors)
            _check_deterministic(func, args, kwargs)
            if func in WAITS:
                self._wait(str(func), WAITS[func])
            if adds_twice(func, args):
                self.unordered.add(f"{func}, {_place()}")
            if self.watch is not None:
                self.watch(func, tensors, _place())
        target = kwargs.get("device")
        on_gpu = has_gpu if target is None else _is_cuda(target)
        if _is_cuda(target):
            kwargs = kwargs | {"device": torch.device("cpu")}
        is_pinned = kwargs.pop("pin_memory", False) if target is None or not on_gpu else False
        result = func(*_real(args), **_real(kwargs))
        if is_pinned:
            self._pinned[result.untyped_storage().data_ptr()] = result
        if not on_gpu:
            return result
        is_view, is_in_place = _kind(func)
        if not is_view:
            self.operations[func] += 1
        if is_in_place:
            out = kwargs.get("out")
            return out if isinstance(out, GpuTensor) else args[0]
        return _wrapped(result)

    def _check_devices(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        """Raise where CUDA refuses a mix of devices; count the waits of indexing."""
        strangers = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor) and tensor.dim() > 0]
        if func not in INDEXING:
            if strangers:
                raise RuntimeError(
                    f"{func}: expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                    f"and cpu ({tuple(strangers[0].shape)}), at {_place()}"
                )
            return
        if not isinstance(args[0], GpuTensor):
            raise RuntimeError(f"{func}: a CPU tensor is indexed by tensors on cuda:0, at {_place()}")
        for stranger in strangers:
            self.crossed("an index is moved to the device", stranger, waits=True)
        masks = sum(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if masks:
            self._wait("index by a mask", masks)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten.lift_fresh.default:
            return args[0]
        if func is aten.copy_.default:
            target, source = args[:2]
            self._count_crossing(source, isinstance(target, GpuTensor), args[2] if len(args) > 2 else False, target)
            func(*_real((target, source)))
            return target
        [source], device = args, kwargs.get("device")
        on_gpu = isinstance(source, GpuTensor) if device is None else _is_cuda(device)
        self._count_crossing(source, on_gpu, kwargs.get("non_blocking", False))
        options = {name: v for name, v in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
        if device is not None and torch.device(device).type == "meta":
            options["device"] = device
        result = func(_real(source), **options)
        return GpuTensor(result) if on_gpu else result

    def _count_crossing(self, source: Tensor, to_gpu: bool, non_blocking: bool, target: Tensor | None = None) -> None:
        """Count a copy between host and device; CUDA goes on without waiting where the host's memory is pinned alone.

        Args:
            target: of a copy into given memory.
        """
        from_gpu = isinstance(source, GpuTensor)
        if from_gpu and not to_gpu:
            pinned = target is not None and target.untyped_storage().data_ptr() in self._pinned
            self.crossed("device to host", source, waits=not (non_blocking and pinned))
        elif to_gpu and not from_gpu and source.dim():
            pinned = source.untyped_storage().data_ptr() in self._pinned
            self.crossed("host to device", source, waits=not (non_blocking and pinned))

    def _pin(self, func: Any, source: Tensor) -> Any:
        if func is aten.is_pinned.default:
            return source.untyped_storage().data_ptr() in self._pinned
        copied = source.clone()
        self._pinned[copied.untyped_storage().data_ptr()] = copied
        return copied


def _check_deterministic(func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise where CUDA has no deterministic form of an operation, and torch is to have no other."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    name = func._schema.name.removeprefix("aten::")
    refused = name in REFUSED or (name in REFUSED_IN_FLOATS and args[0].is_floating_point())
    refused = refused or (name == "bincount" and len(args) > 1 and args[1] is not None)
    if refused or (name.startswith("scatter_reduce") and "prod" in args):
        raise RuntimeError(f"{name} does not have a deterministic implementation on CUDA, at {_place()}")


def adds_twice(func: Any, args: Any) -> bool:
    """Return whether an operation adds floats to one place more than once, in an order that CUDA leaves open."""
    if func not in ADDING or not args[0].is_floating_point() or any(word in args for word in ("amax", "amin")):
        return False
    dim, index = args[1], _real(args[2])
    rows = index.movedim(dim, -1).reshape(-1, index.shape[dim]) if index.dim() > 1 else index[None]
    return any(len(set(row)) < len(row) for row in rows.tolist())


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _real(tree: Any) -> Any:
    """Return the arguments of an operation with the tensors that wrappers hold in their places."""
    if isinstance(tree, GpuTensor):
        return tree.inner
    if type(tree) in (list, tuple):
        return type(tree)(map(_real, tree))
    return {name: _real(value) for name, value in tree.items()} if type(tree) is dict else tree


def _wrapped(tree: Any) -> Any:
    """Return the results of an operation, tensors or lists of them, on the device."""
    if isinstance(tree, Tensor):
        return tree if isinstance(tree, GpuTensor) else GpuTensor(tree)
    return type(tree)(map(_wrapped, tree)) if type(tree) in (list, tuple) else tree


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif type(argument) in (list, tuple):
            yield from _tensors(argument)


@cache
def _kind(func: Any) -> tuple[bool, bool]:
    """Return whether an operation gives a view, and whether its one result is a tensor that it was given."""
    aliases = [output.alias_info for output in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    [alias] = aliases if len(aliases) == 1 else [None]
    return is_view, func._schema.is_mutable and alias is not None and alias.is_write


def _place() -> str:
    """Return file and line of alignlab's innermost frame."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            return f"{path.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd or a library"
