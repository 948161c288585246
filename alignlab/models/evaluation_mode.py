"""Evaluation mode for the length of a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode within the context, and each back into its own mode afterwards.

    `model.train(was_training)` would put a whole model into one mode, also the parts that were frozen in another.

    Args:
        modules: all modules, inner ones included, as in `model.modules()`.
    """
    trained = [module for module in modules if module.training]
    try:
        for module in trained:
            module.training = False
        yield
    finally:
        for module in trained:
            module.training = True
