"""Weights that are converted as they are read, made once for all ranks of a host.

A weight that lies in a checkpoint's file as the model wants it is mapped into memory, and the ranks of a host share its
pages. One in another dtype, or an expert's matrix that is stacked with others, has to be made: by each rank for itself,
or, within `made_once`, by one of them, in a file that all map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from torch import Tensor

from alignlab.files.tensor_files import write_streamed


class Host(Protocol):
    """The ranks of this run on this host."""

    def file(self, num_bytes: int, write: Callable[[Path], None]) -> AbstractContextManager[Path]:
        """Return a context with a file that one rank has written, and that is removed when all have left the context.

        Every rank calls this together.

        Args:
            num_bytes: size of the file.
            write: writes it.

        Raises:
            DiskError: there is no room for it, or it cannot be written.
            RankError: on the other ranks.
        """
        ...


_HOST: ContextVar[Host | None] = ContextVar("host", default=None)


@contextmanager
def made_once(host: Host | None) -> Iterator[None]:
    """Have converted weights made once for the ranks of a host, which load the same models in the same order; None:
    by each rank for itself."""
    token = _HOST.set(host)
    try:
        yield
    finally:
        _HOST.reset(token)


def is_shared() -> bool:
    """Return whether converted weights are made once, see `made_once`."""
    return _HOST.get() is not None


def shared_copies(shapes: Mapping[str, Tensor], made: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors that one rank of the host makes, mapped into the memory of each.

    Args:
        shapes: of all, with their dtypes, on the device "meta".
        made: makes them, one after another.
    """
    host = _HOST.get()
    assert host is not None, "outside of made_once"
    size = sum(shape.nbytes for shape in shapes.values())
    with host.file(size, lambda path: write_streamed(made, shapes, path)) as path, safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in shapes}
