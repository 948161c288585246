"""Recorder of the experts that vLLM chooses for every token on a CPU, where vLLM does not return them.

vLLM's own recorder keeps the choices of one step in one buffer, with a row for each token. Here the rows are assigned
to their requests. A token found in the prefix cache is not computed, and its row stays -1.
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

_MAX_REQUESTS = 20_000
"""Largest number of requests whose choices are held."""


class RoutingRecorder:
    """Records the choices of each request until they are taken.

    Args:
        model_runner: the model runner of vLLM's worker; its step is wrapped.
    """

    def __init__(self, model_runner: Any) -> None:
        config = model_runner.vllm_config
        self._runner = model_runner
        self._capturer = RoutedExpertsCapturer(config.scheduler_config.max_num_batched_tokens, config)
        self._records: dict[str, list[tuple[int, Tensor]]] = {}  # (first position, [tokens, layers, K]) of each step
        bind_routed_experts_capturer(model_runner.get_model(), self._capturer)
        step = model_runner.execute_model

        def execute_and_record(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(scheduled, *args, **kwargs)
            self._record_step(scheduled.num_scheduled_tokens)
            return result

        model_runner.execute_model = execute_and_record

    def take(self, request_ids: Sequence[str], layers: Sequence[int]) -> list[Tensor]:
        """Return and forget the choices of each request, [computed tokens, layers, K] int16, -1 without a record."""
        return [_joined(self._records.pop(name), layers) for name in request_ids]

    def _record_step(self, counts: dict[str, int]) -> None:
        """Assign the rows of the last step to requests; rows are in the order of the runner's batch."""
        batch = self._runner.input_batch
        rows = self._capturer.snapshot_routing_data(sum(counts.values())).to(torch.int16).cpu()
        row = 0
        for index, name in enumerate(batch.req_ids):
            count = counts.get(name, 0)
            if count:
                position = int(batch.num_computed_tokens_cpu[index])
                public_name = name.rpartition("-")[0]  # vLLM appends a random part to a request's name
                self._records.setdefault(public_name, []).append((position, rows[row : row + count]))
            row += count
        while len(self._records) > _MAX_REQUESTS:  # aborted requests, whose choices nobody takes
            self._records.pop(next(iter(self._records)))


def _joined(steps: Sequence[tuple[int, Tensor]], layers: Sequence[int]) -> Tensor:
    """Join the steps of a request; later steps win, because a preempted request is computed again."""
    length = max(position + len(rows) for position, rows in steps)
    joined = torch.full((length, *steps[0][1].shape[1:]), -1, dtype=torch.int16)
    for position, rows in steps:
        joined[position : position + len(rows)] = rows
    return joined[:, list(layers)]
