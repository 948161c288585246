"""Settings of the whole test session; other fixtures live beside the tests that use them."""

import gc
import os

# Before torch and the Hub's client are imported: nothing in the tests may wait for a network or fight over cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch

from tests.quick import replacements

LONG = ("slow", "distributed", "vllm")
PLOT_CURVES = "alignlab.evaluation.report.plot_curves"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this suite."""
    parser.addoption(
        "--full", action="store_true",
        help="run whole products of cases where otherwise a part is chosen in which every two of their factors meet "
        "(the trainers on a pretended GPU: six minutes of CPU more)",
    )


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """Leave out of all tests what `tests.quick` names; those that use `curves` draw them."""
    with pytest.MonkeyPatch.context() as patch:
        for replaced in replacements():
            patch.setattr(*replaced)
        yield


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw curves in this test."""
    from alignlab.evaluation.curves import plot_curves

    monkeypatch.setattr(PLOT_CURVES, plot_curves)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, each of which would look through all of it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the end of the process collect what was left out: some libraries report it as leaked otherwise."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with long tests first, and skip tests marked `gpu` where there is no CUDA device.

    Files are shared out to processes in this order, so that no process is left with a long one at the end.
    """
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONG)}
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
