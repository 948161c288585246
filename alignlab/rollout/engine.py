"""The protocol of rollout engines, and the engine that the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import EngineSettings, RolloutSettings, VLLMServerSettings, VLLMSettings
from alignlab.models.decoder import causal_lm
from alignlab.models.hub.export import Model
from alignlab.models.routers.uses import check_rollouts
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.engine_choice import chosen_engine
from alignlab.rollout.vllm.installation import require_vllm
from alignlab.rollout.vllm.options import check_quantization, check_served_cache
from alignlab.types import Prompt, Rollout, SamplingParams


@runtime_checkable
class RolloutEngine(Protocol):
    """An engine that samples completions from the policy.

    Attributes:
        policy_version: version of the weights in use, recorded with every sampled token.
    """

    policy_version: int

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[Rollout]:
        """Sample `sampling.n` completions of each prompt, in the order of `prompts`.

        Args:
            prompts: the prompts.
            sampling: one for all prompts, or one for each.

        Raises:
            RolloutError: a prompt leaves no room for a completion, a parameter is out of range, the policy's weights
                were changed since the last `update_weights`, or the engine was closed.
        """
        ...

    def update_weights(self, policy_version: int) -> None:
        """Take over the policy's present weights as version `policy_version`; drop what older weights computed.

        An engine that was closed is opened again.

        Raises:
            RolloutError: the version does not advance.
        """
        ...

    def rest(self) -> None:
        """Free memory that is not needed until the next call; the next call allocates it again."""
        ...

    def abandon(self) -> None:
        """Make every `generate` in flight raise a RolloutError soon; may be called from any thread."""
        ...

    def close(self) -> None:
        """Release servers, processes and memory. A second call does nothing; `update_weights` opens it all again."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return figures of the engine's work so far, by name."""
        ...


def check_engine(settings: EngineSettings) -> None:
    """Raise if an engine cannot be made for any model.

    Raises:
        ConfigError: vLLM is to run in this process, and is missing or of an untested version, or cannot quantize
            weights or the cache as the settings ask.
    """
    if isinstance(settings, VLLMSettings):
        require_vllm(settings.engine)
        check_quantization(settings)
        check_served_cache(settings)


def make_engine(model: Model, tokenizer: PreTrainedTokenizerBase, settings: EngineSettings) -> RolloutEngine:
    """Return the engine of `settings`, which generates from the weights of `model`.

    Raises:
        ConfigError: vLLM is to run in this process, and is missing or of an untested version; or no server runs this
            model.
    """
    check_rollouts(model)
    settings = chosen_engine(settings, model, causal_lm(model).device)
    if isinstance(settings, RolloutSettings):
        return EmbeddedEngine(model, tokenizer, settings)
    from alignlab.rollout.vllm.verified_engine import VerifiedEngine

    if isinstance(settings, VLLMServerSettings):
        from alignlab.rollout.vllm.servers import ServerBackend

        return VerifiedEngine(model, tokenizer, settings, ServerBackend(model, tokenizer, settings))
    assert isinstance(settings, VLLMSettings)
    check_engine(settings)
    from alignlab.rollout.vllm.in_process import InProcessBackend

    return VerifiedEngine(model, tokenizer, settings, InProcessBackend(model, tokenizer, settings))
