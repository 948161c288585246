"""Imported once by the process that servers of tests are forked from: a server's three processes import vLLM each."""

from __future__ import annotations

import importlib
import multiprocessing
from typing import Any

from vllm.utils import system_utils


def fork_context() -> Any:
    """Take the place of vLLM's choice: on a CPU it starts the processes of a server as new interpreters."""
    return multiprocessing.get_context("fork")


system_utils.get_mp_context = fork_context
for _name in (  # what the processes of a server import, after the line above
    "vllm.entrypoints.launchers.api_server.entry", "vllm.v1.engine.async_llm", "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3_moe", "alignlab.rollout.vllm.inside.endpoints",
    "alignlab.rollout.vllm.inside.plugin", "alignlab.rollout.vllm.inside.token_guard",
    "alignlab.rollout.vllm.inside.worker",
):  # fmt: skip
    importlib.import_module(_name)
