"""Which experts vLLM chose for every token, on a CPU, where it does not tell.

vLLM's own recorder keeps the choices of a step in one buffer, a row for each token. Here they are dealt out to the
requests that the rows belong to. A row that was found in the prefix cache was not computed, and stays -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)

_KEPT = 20_000
"""Requests whose choices are kept at most."""


class RoutingRecorder:
    """Keeps the choices of each request in work, from when it is made until they are taken.

    Args:
        model_runner: of vLLM's worker; its step is wrapped.
    """

    def __init__(self, model_runner: Any) -> None:
        config = model_runner.vllm_config
        self._runner = model_runner
        self._capturer = RoutedExpertsCapturer(config.scheduler_config.max_num_batched_tokens, config)
        self._records: dict[str, list[tuple[int, Tensor]]] = {}  # first position and [tokens, layers, K], as they came
        bind_routed_experts_capturer(model_runner.get_model(), self._capturer)
        step = model_runner.execute_model

        def recorded(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(scheduled, *args, **kwargs)
            self._deal(scheduled.num_scheduled_tokens)
            return result

        model_runner.execute_model = recorded

    def take(self, request_ids: Sequence[str], layers: Sequence[int]) -> list[Tensor]:
        """Choices of each request, [computed tokens, layers, K] int16, -1 where there is no record; forgets them."""
        return [_joined(self._records.pop(name), layers) for name in request_ids]

    def _deal(self, counts: dict[str, int]) -> None:
        """The rows of the step just computed lie in the order of the runner's batch."""
        batch = self._runner.input_batch
        rows = self._capturer.snapshot_routing_data(sum(counts.values())).to(torch.int16).cpu()
        row = 0
        for index, name in enumerate(batch.req_ids):
            count = counts.get(name, 0)
            if count:
                position = int(batch.num_computed_tokens_cpu[index])
                known_as = name.rpartition("-")[0]  # vLLM adds something random to a request's name
                self._records.setdefault(known_as, []).append((position, rows[row : row + count]))
            row += count
        while len(self._records) > _KEPT:  # of requests that were given up, whose choices nobody takes
            self._records.pop(next(iter(self._records)))


def _joined(parts: Sequence[tuple[int, Tensor]], layers: Sequence[int]) -> Tensor:
    """Later parts take the place of earlier ones: a request that was pre-empted is computed again."""
    length = max(position + len(rows) for position, rows in parts)
    joined = torch.full((length, *parts[0][1].shape[1:]), -1, dtype=torch.int16)
    for position, rows in parts:
        joined[position : position + len(rows)] = rows
    return joined[:, list(layers)]
