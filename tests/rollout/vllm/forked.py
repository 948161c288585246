"""Imported once by the process that servers of tests are forked from: a server's three processes import vLLM each.

Ranks that have a vLLM of their own are forked from it as well.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import warnings
from contextlib import suppress
from typing import Any

from vllm.platforms import current_platform
from vllm.utils import system_utils


def fork_context() -> Any:
    """Take the place of vLLM's choice: on a CPU it starts the processes of a server as new interpreters."""
    return multiprocessing.get_context("fork")


system_utils.get_mp_context = fork_context
SERVERS = (
    "vllm.entrypoints.launchers.api_server.entry", "vllm.v1.engine.async_llm", "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3_moe", "vllm.model_executor.layers.quantization.online.base",
    "vllm.v1.attention.backends.cpu_attn", "vllm.v1.core.sched.scheduler", "vllm.v1.pool.flash_maxsim",
    "vllm.distributed.elastic_ep.elastic_execute", "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router", "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.anthropic.api_router", "vllm.entrypoints.cohere.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router", "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.render.api_router", "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.serve.tokenize.api_router", "model_hosting_container_standards.sagemaker",
    "alignlab.rollout.vllm.inside.endpoints", "alignlab.rollout.vllm.inside.plugin",
    "alignlab.rollout.vllm.inside.token_guard", "alignlab.rollout.vllm.inside.worker",
)  # fmt: skip
"""What the processes of a server import."""
RANKS = (
    "tests.trainers.rank_engines", "tests.rollout.vllm.rank_shared_vllm", "alignlab.rollout.vllm.in_process",
    "vllm.entrypoints.llm", "matplotlib.figure", "peft.utils.transformers_weight_conversion",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer",
)  # fmt: skip
"""What ranks import beside it; the last two by accelerate, if deepspeed is installed."""


def prepare_once() -> None:
    """Do what each process with a worker would do again, in seconds: find vLLM's kernels, and compile a sum of its own.

    The sum counts the tokens that are likelier than one, which nothing reads here. At the end of an engine vLLM would
    have all that was imported looked through for garbage; forks end soon after.
    """
    from vllm.v1.sample import sampler

    gc.unfreeze = lambda: None
    if current_platform.is_cpu():
        current_platform.register_triton_kernel_overrides()
        type(current_platform).register_triton_kernel_overrides = lambda *_: None
    compiled: Any = sampler.batched_count_greater_than
    sampler.batched_count_greater_than = compiled._torchdynamo_orig_callable


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's own
    for _name in (*SERVERS, *RANKS):
        with suppress(ModuleNotFoundError):  # another version may lack it; what is needed is imported where it is
            importlib.import_module(_name)
    prepare_once()
