"""vLLM on servers, in processes of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import ConfigError
from alignlab.models.decoder import causal_lm
from alignlab.models.exact_weights import model_dtype
from alignlab.models.hub.export import Model
from alignlab.models.merging import unties
from alignlab.models.sync_digests import ALGORITHMS
from alignlab.rollout.vllm.backend import Transfer
from alignlab.rollout.vllm.client import VLLMServer
from alignlab.rollout.vllm.completions import Answer, Request
from alignlab.rollout.vllm.installation import require_vllm
from alignlab.rollout.vllm.options import (
    VLLM_QUANTIZATIONS,
    can_sync_adapter_only,
    check_model,
    checked_adapter_rank,
    context_limit,
)
from alignlab.rollout.vllm.policy_weights import PolicyWeights
from alignlab.rollout.vllm.pool import ServerPool
from alignlab.rollout.vllm.protocol import model_identity, weights_version
from alignlab.rollout.vllm.ranks import shared_random_name, this_rank
from alignlab.rollout.vllm.serialization import weights_file
from alignlab.rollout.vllm.weight_broadcast import WeightBroadcast, uses_broadcast
from alignlab.rollout.vllm.weight_delivery import SentWeights

_COUNTS = ("lost", "returned", "reissued", "faulty")


@dataclass
class ServerRequirements:
    """Properties that a server must have to generate for a run.

    Attributes:
        identity: `model_identity` of the trainer's model.
        context_tokens: prompt and completion together that a server must take.
        adapter_rank: of the adapter that is sent alone; 0 if all weights are sent; None while that is undecided.
        quantization: vLLM's name of the rounding of a server's weights.
        kv_cache: its name of a rounded cache.
        digest_algorithm: by which the servers digest weights; None while that is unknown.
    """

    identity: Mapping[str, Any]
    context_tokens: int
    adapter_rank: int | None = None
    quantization: str | None = None
    kv_cache: str | None = None
    digest_algorithm: str | None = None

    def check(self, address: str, about: Mapping[str, Any]) -> None:
        """Raise if a server cannot generate for this run.

        Args:
            about: the server's description of itself.

        Raises:
            ConfigError: with the first property that differs.
        """
        for name, value in self.identity.items():
            if about["identity"].get(name) != value:
                label = "tokenizer's vocabulary" if name == "vocabulary" else name
                raise ConfigError(
                    f"the server {address} has {label} {about['identity'].get(name)!s:.80}, and must have the "
                    f"trainer's ({value}); start it from the trainer's config: bash launch/serve_vllm.sh CONFIG"
                )
        if not {"context_tokens", "lora_rank"} <= about.keys():
            raise ConfigError(f"the server {address} does not tell its sizes; start it with this version of alignlab")
        self._check_digests(address, about.get("digest_algorithm"))
        for name, value in (("quantization", self.quantization), ("kv_cache", self.kv_cache)):
            if about.get(name) != value:
                raise ConfigError(
                    f"the server {address} has the {name} {about.get(name)!s:.40}, and must have the config's "
                    f"({value}); start it from the trainer's config: bash launch/serve_vllm.sh CONFIG"
                )
        if about["context_tokens"] < self.context_tokens:
            raise ConfigError(
                f"the server {address} takes {about['context_tokens']} tokens of prompt and completion, and must take "
                f"{self.context_tokens}; start it from the trainer's config, or use "
                f"trainer.rollout.context_tokens={about['context_tokens']}"
            )
        if self.adapter_rank is not None:
            self._check_adapter(address, self.adapter_rank, max_rank=about["lora_rank"])

    def _check_digests(self, address: str, algorithm: Any) -> None:
        if algorithm not in ALGORITHMS:
            raise ConfigError(
                f"the server {address} digests weights by {algorithm!s:.40}, and must by {' or '.join(ALGORITHMS)}; "
                "start it with this version of alignlab"
            )
        if algorithm != (self.digest_algorithm or algorithm):
            raise ConfigError(
                f"the server {address} digests weights by {algorithm}, and another server by {self.digest_algorithm}; "
                "use servers that are all on GPUs, or all on CPUs"
            )

    @staticmethod
    def _check_adapter(address: str, rank: int, *, max_rank: int) -> None:
        if rank > max_rank or (rank == 0 and max_rank > 0):
            needed = f"an adapter of rank {rank}" if rank else "all weights"
            raise ConfigError(
                f"the server {address} was started for {f'adapters of rank {max_rank}' if max_rank else 'all weights'},"
                f" and must be ready for {needed}; start it from the trainer's config (model.lora, "
                "trainer.rollout.sync)"
            )


class ServerBackend:
    """vLLM servers, to which the first rank sends the policy's weights; a `Backend`.

    Args:
        model: policy, with or without LoRA.
        tokenizer: of the policy.
        settings: addresses, deadlines, and how weights are synced.

    Raises:
        ConfigError: the adapter unties the embeddings, or cannot be synced alone as the settings ask; or vLLM cannot
            spread or quantize the model.
    """

    _pool: ServerPool
    _broadcast: WeightBroadcast | None  # None: by files, or by another rank
    first_rank_sends = True
    on_gpu: bool
    model_runner: int

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, settings: VLLMServerSettings) -> None:
        if unties(model):
            raise ConfigError(
                "the adapter makes the embeddings and the head differ, which the model ties, and a vLLM server loads "
                "it tied; use rollout.engine: vllm or embedded, or take embed_tokens and lm_head out of the adapter"
            )
        lm = causal_lm(model)
        check_model(lm, settings)
        self._model, self._settings = model, settings
        self._sparse_layers: list[int] = list(getattr(lm.config, "sparse_layers", ()))
        dtype = str(model_dtype(lm)).removeprefix("torch.")
        self._requirements = ServerRequirements(
            model_identity(lm.config, tokenizer, dtype), context_limit(lm, settings),
            quantization=settings.quantization and VLLM_QUANTIZATIONS[settings.quantization],
            kv_cache=settings.kv_cache,
        )
        self._sent_file = ExitStack()  # until the next update: a server that returns is sent the file again

    @cached_property
    def _run(self) -> str:
        """Name of this run among those that use the servers; the ranks agree on it when they open the servers."""
        return shared_random_name()

    def open(self) -> None:
        """Wait for the servers, and check that they run this model."""
        self._requirements.adapter_rank = self._requirements.digest_algorithm = None
        self._pool = ServerPool(
            self._settings, self._requirements.check, self._sparse_layers, run=self._run, rank=this_rank(),
            vocab_size=self._requirements.identity["vocab_size"],
        )  # fmt: skip
        try:
            descriptions = self._pool.open()
            self._requirements.adapter_rank = self._choose_adapter_rank(descriptions.values())
            self.on_gpu = any(about.get("device") != "cpu" for about in descriptions.values())
            self._requirements.digest_algorithm = next(iter(descriptions.values()))["digest_algorithm"]
            self.model_runner = max(about["model_runner"] for about in descriptions.values())
            for address, about in descriptions.items():
                self._requirements.check(address, about)
            self._broadcast = self._chosen_broadcast(descriptions)
        except BaseException:
            self._pool.close()
            raise

    @property
    def adapter_only(self) -> bool:
        """True if the adapter is sent alone."""
        return bool(self._requirements.adapter_rank)

    def put_weights(self, weights: PolicyWeights, policy_version: int, attempt: int) -> Transfer:
        """Send the weights to every server or, on ranks but the first, note which servers have them."""
        version = weights_version(self._run, policy_version, attempt)
        if this_rank() > 0:
            self._pool.expect(SentWeights(version, None, {}, self.adapter_only))
            return Transfer()
        weights.digest_algorithm = self._requirements.digest_algorithm
        if self._broadcast is not None:
            self._broadcast.put(weights, version)
            return weights.size
        file = ExitStack()
        path = file.enter_context(weights_file(weights, weights.shapes(), weights.adapter_config))
        try:
            self._pool.put(SentWeights(version, path, weights.digests(), self.adapter_only))
        finally:
            self._sent_file.close()
            self._sent_file = file
        return weights.size

    def members(self) -> Sequence[VLLMServer]:
        """Return the servers that are alive; on ranks but the first, none."""
        return self._pool.alive if this_rank() == 0 else []

    def agreed(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: each rank asks the servers by itself."""
        return nullcontext()

    def answers(self, requests: Sequence[Request], member: VLLMServer | None = None) -> list[Answer]:
        """Return one completion for each request, in order, from any server or from `member`."""
        if not requests:
            return []
        return self._pool.answers(requests) if member is None else self._pool.answers_of(member, requests)

    def rest(self) -> None:
        """Do nothing: servers have a device of their own."""

    def abandon(self) -> None:
        """Make calls in flight, of any thread, raise a RolloutError."""
        self._pool.abandon()

    def close(self) -> None:
        """End all connections; the servers go on, and may serve another run."""
        if self._broadcast is not None:
            self._broadcast.close()
        if this_rank() == 0:
            self._pool.release()
        self._pool.close()
        self._sent_file.close()

    def metrics(self) -> dict[str, float]:
        """Return the number of servers alive; and of losses, returns, reissued requests and faulty answers so far."""
        counts = {f"servers/{name}": float(self._pool.counts[name]) for name in _COUNTS}
        return {"servers/alive": float(len(self._pool.alive))} | counts

    def _chosen_broadcast(self, descriptions: Mapping[str, Mapping[str, Any]]) -> WeightBroadcast | None:
        """Return the way by which this rank broadcasts the weights; None if it does not."""
        device = causal_lm(self._model).device
        if this_rank() > 0 or self.adapter_only or not uses_broadcast(self._settings, device, descriptions):
            return None
        if device.type != "cpu":
            require_vllm("vllm_server")
        return WeightBroadcast(self._pool, device)

    def _choose_adapter_rank(self, descriptions: Iterable[Mapping[str, Any]]) -> int:
        """Return the rank of the adapter if it is sent alone: as configured, or if all servers are ready for one."""
        are_ready = all(about["lora_rank"] > 0 for about in descriptions)
        is_sent_alone = self._settings.sync == "adapter" or (
            self._settings.sync == "auto" and self._settings.transfer != "broadcast"
            and are_ready and can_sync_adapter_only(self._model)
        )
        return checked_adapter_rank(self._model) if is_sent_alone else 0
