"""The rollout engine that the settings name."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import EngineSettings, RolloutSettings, VLLMServerSettings
from alignlab.models.export import Model
from alignlab.rollout.engine import EmbeddedEngine
from alignlab.rollout.vllm.requirement import require_vllm
from alignlab.types import RolloutEngine


def give_back(engine: RolloutEngine) -> None:
    """End an engine that is not used again: its servers take another run's weights, its process's memory is free."""
    if not isinstance(engine, EmbeddedEngine):
        engine.close()  # type: ignore[attr-defined]  # of vLLM


def make_engine(model: Model, tokenizer: PreTrainedTokenizerBase, settings: EngineSettings) -> RolloutEngine:
    """An engine that generates from the policy's weights.

    Raises:
        ConfigError: vLLM is asked for in this process, and missing or of a version that was not tested; or no server
            answers that runs this model.
    """
    if isinstance(settings, RolloutSettings):
        return EmbeddedEngine(model, tokenizer, settings)
    if isinstance(settings, VLLMServerSettings):
        from alignlab.rollout.vllm.server.engine import VLLMServerEngine

        return VLLMServerEngine(model, tokenizer, settings)
    require_vllm(settings.engine)
    from alignlab.rollout.vllm.engine import VLLMEngine

    return VLLMEngine(model, tokenizer, settings)
