"""alignlab: post-training and alignment of language models with reinforcement learning.

The public names below are imported when they are first used: `import alignlab` itself is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignlab.config.data import DataSettings as DataSettings
    from alignlab.config.loader import load_config as load_config
    from alignlab.config.model import LoraSettings as LoraSettings
    from alignlab.config.render import RenderSettings as RenderSettings
    from alignlab.config.rewards import RewardSettings as RewardSettings
    from alignlab.config.rollout import RolloutSettings as RolloutSettings
    from alignlab.config.rollout import SamplingSettings as SamplingSettings
    from alignlab.config.run import EvaluationSettings as EvaluationSettings
    from alignlab.config.run import RunConfig as RunConfig
    from alignlab.config.teacher import TeacherSettings as TeacherSettings
    from alignlab.config.trainers import CriticSettings as CriticSettings
    from alignlab.config.trainers import DistillConfig as DistillConfig
    from alignlab.config.trainers import DPOConfig as DPOConfig
    from alignlab.config.trainers import GKDConfig as GKDConfig
    from alignlab.config.trainers import GRPOConfig as GRPOConfig
    from alignlab.config.trainers import KLSettings as KLSettings
    from alignlab.config.trainers import KTOConfig as KTOConfig
    from alignlab.config.trainers import OnlineDPOConfig as OnlineDPOConfig
    from alignlab.config.trainers import OnPolicyDistillConfig as OnPolicyDistillConfig
    from alignlab.config.trainers import PPOConfig as PPOConfig
    from alignlab.config.trainers import RewardConfig as RewardConfig
    from alignlab.config.trainers import RLAIFConfig as RLAIFConfig
    from alignlab.config.trainers import SFTConfig as SFTConfig
    from alignlab.errors import AlignlabError as AlignlabError
    from alignlab.models.reward_checkpoints import load_reward_model as load_reward_model
    from alignlab.models.reward_model import RewardModel as RewardModel
    from alignlab.rollout.engine import EmbeddedEngine as EmbeddedEngine
    from alignlab.trainers.distill import DistillTrainer as DistillTrainer
    from alignlab.trainers.dpo import DPOTrainer as DPOTrainer
    from alignlab.trainers.gkd import GKDTrainer as GKDTrainer
    from alignlab.trainers.grpo import GRPOTrainer as GRPOTrainer
    from alignlab.trainers.kto import KTOTrainer as KTOTrainer
    from alignlab.trainers.on_policy_distill import OnPolicyDistillTrainer as OnPolicyDistillTrainer
    from alignlab.trainers.online_dpo import OnlineDPOTrainer as OnlineDPOTrainer
    from alignlab.trainers.ppo import PPOTrainer as PPOTrainer
    from alignlab.trainers.reward import RewardTrainer as RewardTrainer
    from alignlab.trainers.rlaif import RLAIFTrainer as RLAIFTrainer
    from alignlab.trainers.run import run as run
    from alignlab.trainers.sft import SFTTrainer as SFTTrainer
    from alignlab.types import Completion as Completion
    from alignlab.types import Prompt as Prompt
    from alignlab.types import Rollout as Rollout
    from alignlab.types import SamplingParams as SamplingParams

__version__ = "0.1.0"

# Public name -> the module that holds it.
_HOMES = {
    "AlignlabError": "alignlab.errors",
    "Completion": "alignlab.types",
    "CriticSettings": "alignlab.config.trainers",
    "DPOConfig": "alignlab.config.trainers",
    "DPOTrainer": "alignlab.trainers.dpo",
    "DataSettings": "alignlab.config.data",
    "DistillConfig": "alignlab.config.trainers",
    "DistillTrainer": "alignlab.trainers.distill",
    "EmbeddedEngine": "alignlab.rollout.engine",
    "EvaluationSettings": "alignlab.config.run",
    "GKDConfig": "alignlab.config.trainers",
    "GKDTrainer": "alignlab.trainers.gkd",
    "GRPOConfig": "alignlab.config.trainers",
    "GRPOTrainer": "alignlab.trainers.grpo",
    "KLSettings": "alignlab.config.trainers",
    "KTOConfig": "alignlab.config.trainers",
    "KTOTrainer": "alignlab.trainers.kto",
    "LoraSettings": "alignlab.config.model",
    "OnPolicyDistillConfig": "alignlab.config.trainers",
    "OnPolicyDistillTrainer": "alignlab.trainers.on_policy_distill",
    "OnlineDPOConfig": "alignlab.config.trainers",
    "OnlineDPOTrainer": "alignlab.trainers.online_dpo",
    "PPOConfig": "alignlab.config.trainers",
    "PPOTrainer": "alignlab.trainers.ppo",
    "RLAIFConfig": "alignlab.config.trainers",
    "RLAIFTrainer": "alignlab.trainers.rlaif",
    "Prompt": "alignlab.types",
    "RenderSettings": "alignlab.config.render",
    "RewardConfig": "alignlab.config.trainers",
    "RewardModel": "alignlab.models.reward_model",
    "RewardSettings": "alignlab.config.rewards",
    "RewardTrainer": "alignlab.trainers.reward",
    "Rollout": "alignlab.types",
    "RolloutSettings": "alignlab.config.rollout",
    "RunConfig": "alignlab.config.run",
    "SFTConfig": "alignlab.config.trainers",
    "SFTTrainer": "alignlab.trainers.sft",
    "SamplingParams": "alignlab.types",
    "SamplingSettings": "alignlab.config.rollout",
    "TeacherSettings": "alignlab.config.teacher",
    "load_config": "alignlab.config.loader",
    "load_reward_model": "alignlab.models.reward_checkpoints",
    "run": "alignlab.trainers.run",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'alignlab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
