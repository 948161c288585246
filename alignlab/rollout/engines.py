"""The rollout engine that the settings name."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from alignlab.config.rollout import RolloutSettings, VLLMSettings
from alignlab.models.export import Model
from alignlab.rollout.engine import EmbeddedEngine
from alignlab.rollout.vllm.requirement import require_vllm
from alignlab.types import RolloutEngine


def make_engine(
    model: Model, tokenizer: PreTrainedTokenizerBase, settings: RolloutSettings | VLLMSettings
) -> RolloutEngine:
    """An engine that generates from the policy's weights.

    Raises:
        ConfigError: vLLM is asked for, and missing or of a version that was not tested.
    """
    if isinstance(settings, RolloutSettings):
        return EmbeddedEngine(model, tokenizer, settings)
    require_vllm()
    from alignlab.rollout.vllm.engine import VLLMEngine

    return VLLMEngine(model, tokenizer, settings)
