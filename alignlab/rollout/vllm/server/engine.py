"""vLLM servers as a rollout engine."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.adapters import has_adapters
from alignlab.models.export import Model, adapter_tensors, merged_tensors
from alignlab.models.merging import unties
from alignlab.rollout.vllm.completions import Answer, Request
from alignlab.rollout.vllm.options import check_adapter, why_not_alone
from alignlab.rollout.vllm.proved import ProvedEngine
from alignlab.rollout.vllm.server.client import ServerLost
from alignlab.rollout.vllm.server.handout import SentWeights
from alignlab.rollout.vllm.server.identity import model_identity
from alignlab.rollout.vllm.server.pool import ServerPool
from alignlab.rollout.vllm.server.wire import weights_file
from alignlab.rollout.weight_proof import CanaryGap, adapter_digests, digests


class VLLMServerEngine(ProvedEngine):
    """Generates on vLLM servers, to which the first rank sends the policy's weights; see `ProvedEngine`.

    With `max_staleness` over 0, `update_weights` may be called while another thread is in `generate`: what is running
    goes on under the new weights, and each token bears the version that sampled it.

    Raises:
        ConfigError: no server answers, or one runs another model, vocabulary, dtype or sizes.
    """

    _settings: VLLMServerSettings

    def __init__(
        self, model: Model, tokenizer: PreTrainedTokenizerBase, settings: VLLMServerSettings, *, policy_version: int = 0
    ) -> None:
        super().__init__(model, tokenizer, settings, policy_version=policy_version)
        if unties(model):
            raise ConfigError(
                "the adapter makes the embeddings and the head differ, which the model ties, and a vLLM server loads "
                "it tied; use rollout.engine: vllm or embedded, or take embed_tokens and lm_head out of the adapter"
            )
        self._may_run_behind = settings.max_staleness > 0
        self._device = next(model.parameters()).device
        dtype = str(self._lm.dtype).removeprefix("torch.")
        identity = model_identity(self._lm.config, tokenizer, dtype)
        sparse_layers: list[int] = list(getattr(self._lm.config, "sparse_layers", ()))
        self._alone: bool | None = None
        self._num_sent = 0
        self._pool = ServerPool(
            settings, identity, sparse_layers, run=_shared_name(self._device), rank=_rank(), check=self._check_server
        )
        self._sent_file = ExitStack()  # until the next update: a server that comes back is given it again
        try:
            self._alone = self._travels_alone(self._pool.open())
            self._update(policy_version)
        except BaseException:
            self.close()
            raise

    def metrics(self) -> dict[str, float]:
        """Servers alive now; so far, servers lost and back, requests asked again, faulty answers; the canary's gap."""
        names = ("lost", "returned", "reissued", "faulty")
        counts = {f"servers/{name}": float(self._pool.counts[name]) for name in names}
        return super().metrics() | {"servers/alive": float(len(self._pool.alive))} | counts

    def release(self) -> None:
        """Let other runs have the servers; one that updates the weights again takes them back."""
        self._pool.release()

    def abandon(self) -> None:
        """Give up what other threads are generating; they get a RolloutError."""
        self._pool.abandon()

    def close(self) -> None:
        """End all connections; it generates no more. The servers go on, for the next run."""
        self._in_doubt = "it was closed"
        self._pool.close()
        self._sent_file.close()

    def _travels_alone(self, servers: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the adapter is sent alone: as configured, or where all servers are ready for it."""
        room = min(server["lora_rank"] for server in servers)
        alone = self._settings.sync == "adapter" or (
            self._settings.sync == "auto"
            and has_adapters(self._model)
            and room > 0
            and why_not_alone(self._model) is None
        )
        for server in servers:
            self._check_room(server, alone)
        return alone

    def _check_server(self, about: Mapping[str, Any]) -> None:
        """See that a server takes prompts as long and weights as this run sends them."""
        if not {"context_tokens", "lora_rank"} <= about.keys():
            raise ConfigError("a vLLM server does not tell its sizes; start it with this version of alignlab")
        longest = about["context_tokens"]
        if longest < self.context_tokens:
            raise ConfigError(
                f"a vLLM server takes {longest} tokens of prompt and completion, and must take {self.context_tokens}; "
                f"start it from the trainer's config, or use trainer.rollout.context_tokens={longest}"
            )
        if self._alone is not None:
            self._check_room(about, self._alone)

    def _check_room(self, about: Mapping[str, Any], alone: bool) -> None:
        needed, room = check_adapter(self._model) if alone else 0, about["lora_rank"]
        if needed > room or (not alone and room > 0):
            wanted = f"an adapter of rank {needed}" if alone else "all weights"
            raise ConfigError(
                f"a vLLM server was started for {f'adapters of rank {room}' if room else 'all weights'}, and must be "
                f"ready for {wanted}; start it from the trainer's config (model.lora, trainer.rollout.sync)"
            )

    def _update(self, policy_version: int) -> None:
        """On all ranks together: the first sends, and the others go on when it has."""
        self._num_sent += 1
        if _rank() == 0:
            try:
                super()._update(policy_version)
            finally:
                _all_ranks(self._in_doubt is None, self._device)
            return
        if not _all_ranks(True, self._device):
            self._in_doubt = "the first rank's update failed"
            raise RolloutError("the first rank could not update the servers' weights; see its message")
        self._pool.expect(SentWeights(self._name(policy_version), None, {}, bool(self._alone)))
        self.policy_version, self._stamp, self._in_doubt = policy_version, self._present(), None

    def _name(self, policy_version: int) -> str:
        """The version as servers know it: another at each attempt, for nothing that they cached may outlive one."""
        return f"{self._pool.run}-{policy_version}-{self._num_sent}"

    def _replace_weights(self, policy_version: int) -> Mapping[str, Tensor]:
        model = self._model
        if self._alone:
            assert isinstance(model, PeftModel)
            sent, config = adapter_tensors(model), model.peft_config[model.active_adapter].to_dict()
            expected = adapter_digests(model, sent, self._lm.dtype)
        else:
            sent, config = merged_tensors(model), None
            expected = digests(sent)
        file = ExitStack()
        path = file.enter_context(weights_file(sent, config))
        try:
            self._pool.put(SentWeights(self._name(policy_version), path, expected, bool(self._alone)))
        finally:
            self._sent_file.close()
            self._sent_file = file
        return sent

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        return self._pool.answers(requests)

    def _proves(self) -> bool:
        """Also where a server came since the last canary."""
        return super()._proves() or not all(server.is_proved for server in self._pool.alive)

    def _canaries(self) -> list[CanaryGap]:
        """Of each server; one that is lost meanwhile has none."""
        gaps = []
        for server in self._pool.alive:
            try:
                gaps.append(self._canary(partial(self._pool.answers_of, server)))
                server.is_proved = True
            except ServerLost:
                continue
        if not gaps:
            raise RolloutError("every vLLM server was lost at its canary; see what they say, and start them again")
        return gaps


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _all_ranks(flag: bool, device: torch.device) -> bool:
    """Whether all ranks say so; every rank calls it together."""
    if not torch.distributed.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN)
    return bool(value)


def _shared_name(device: torch.device) -> str:
    """A name that no other run has, the same on all ranks."""
    number = torch.tensor(secrets.randbits(62), device=device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(number, 0)
    return f"{int(number):016x}"
