"""The embedded engine's decoding: attention that reads the cache in place, recorded steps, waits, speed.

Without a GPU stand-ins take the place of kernels and of recorded graphs, so that the job itself is tried.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from alignlab.config.rollout import RolloutSettings
from alignlab.models import paged_flex
from alignlab.models.hub.checkpoints import new_model
from alignlab.rollout.embedded import replays, runner
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, Rollout, SamplingParams
from tests.gpu.flex_stand_in import paged_stand_in
from tests.gpu.graph_stand_in import Rerun
from tests.gpu_job.kernels import DENSE, MIXTURE
from tests.gpu_job.lines import Line, checked, relative_error
from tests.rollout.conftest import VOCAB
from tests.rollout.embedded.schedules import compare_all_steps

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest relative error of attention. In float32 products may be in TF32, which has 10 bits of mantissa."""
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_new_tokens=40, n=4, ignore_eos=True),
    "sampled": SamplingParams(max_new_tokens=40, n=4, seed=3, top_p=0.9, ignore_eos=True),
}
CPU_TOKENS = 12
"""Length of a completion on a CPU: some steps more than are computed before the first is recorded."""


@contextmanager
def in_place(device: torch.device) -> Iterator[None]:
    """Make the choices of a GPU on a CPU, too, with stand-ins; on a GPU do nothing."""
    with ExitStack() as patches:
        if device.type != "cuda":
            patches.enter_context(patch.object(runner, "reads_in_place", lambda device: True))
            patches.enter_context(patch.object(runner, "can_be_recorded", lambda model, device: True))
            patches.enter_context(patch.object(paged_flex, "_compiled_flex", paged_stand_in))
            patches.enter_context(patch.object(replays, "record", Rerun))
            patches.enter_context(patch.object(replays, "new_pool", object))
        yield


def paged(device: torch.device) -> Iterator[Line]:
    """Yield the errors of attention in place against the gathered cache: chunks, forks, windows, soft-caps."""
    for dtype, limit in LIMITS.items():
        for block_size, prefill_tokens, softcap in ((128, 200, None), (16, 150, None), (128, 305, 20.0)):
            errors = [0.0]

            def compare(ours: Tensor, exact: Tensor, errors: list[float] = errors) -> None:
                errors.append(relative_error(ours, exact))

            with in_place(device), torch.inference_mode():
                compare_all_steps(
                    block_size=block_size, prefill_tokens=prefill_tokens, softcap=softcap, device=device, dtype=dtype,
                    compare=compare,
                )
            what = f"blocks of {block_size}{'' if softcap is None else ', soft-cap'}"
            yield checked(f"attention in place: {what}, {str(dtype)[6:]}", max(errors), limit)


def decoding(device: torch.device) -> Iterator[Line]:
    """Yield whether recorded steps give the tokens of steps that are not, their waits, and the speed of both."""
    for kind, architecture in (("dense", DENSE), ("mixture", MIXTURE)):
        torch.manual_seed(0)
        model = new_model(architecture, vocab_size=VOCAB, dtype=torch.bfloat16).to(device)
        with in_place(device):
            recorded, plain = (
                EmbeddedEngine(model, make_tokenizer(), RolloutSettings(cuda_graphs=graphs, native="off"))
                for graphs in (True, False)
            )
            for name, params in SAMPLING.items():
                params = params if device.type == "cuda" else replace(params, max_new_tokens=CPU_TOKENS)
                num_replayed = sum(graph.times for graph in Rerun.made)
                same = _tokens(recorded.generate(_prompts(), params)) == _tokens(plain.generate(_prompts(), params))
                if device.type != "cuda":  # where a record can be counted
                    same = same and sum(graph.times for graph in Rerun.made) > num_replayed
                yield Line(f"recorded steps, {kind}, {name}", "ok" if same else "failed", "the tokens of plain steps")
            yield _waits(recorded, kind, device)
            if device.type == "cuda":
                for name, engine in (("recorded", recorded), ("plain", plain)):
                    yield Line(f"decoding, {kind}, {name} steps", "figure", f"{_step_ms(engine):.2f} ms a step")


def _prompts() -> list[Prompt]:
    return [Prompt(tuple(range(1, 20 + 60 * n)), "") for n in range(4)]


def make_tokenizer() -> Any:
    """Return a tokenizer of as many tokens as the models have."""
    from alignlab.data.tokenizer_training import train_tokenizer

    return train_tokenizer(["abc abd ab ba 123"], vocab_size=VOCAB)


def _tokens(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [completion.token_ids for rollout in rollouts for completion in rollout.completions]


def _waits(engine: EmbeddedEngine, kind: str, device: torch.device) -> Line:
    """Return how often the host waits for the device in the worst of the steps between the first and the last."""
    name = f"waits in a decoding step, {kind}"
    if device.type != "cuda":
        return Line(name, "skipped", "the CPU computes at once")
    counts = [0]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.generate(_prompts(), SAMPLING["greedy"], on_step=lambda *_: counts.append(len(caught)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [after - before for before, after in pairwise(counts)][2:-1]
    return checked(name, max(waits), 1)


def _step_ms(engine: EmbeddedEngine) -> float:
    """Return the milliseconds of a decoding step, the mean of those between the tenth and the last."""
    times: list[float] = []
    engine.generate(_prompts(), SAMPLING["greedy"], on_step=lambda *_: times.append(time.perf_counter()))
    return 1000 * (times[-2] - times[9]) / (len(times) - 11)
