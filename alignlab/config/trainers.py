"""All trainers' settings. A run's trainer is chosen by its `type`, and holds its own fields alone."""

from typing import Annotated

from pydantic import Field

from alignlab.config.averaging import EMASettings as EMASettings
from alignlab.config.distill import DistillConfig as DistillConfig
from alignlab.config.distill import GKDConfig as GKDConfig
from alignlab.config.distill import OnPolicyDistillConfig as OnPolicyDistillConfig
from alignlab.config.distill import TeacherSettings as TeacherSettings
from alignlab.config.offline import DPOConfig as DPOConfig
from alignlab.config.offline import KTOConfig as KTOConfig
from alignlab.config.offline import PairLossConfig as PairLossConfig
from alignlab.config.offline import RewardConfig as RewardConfig
from alignlab.config.offline import SFTConfig as SFTConfig
from alignlab.config.online import KLSettings as KLSettings
from alignlab.config.online import MismatchSettings as MismatchSettings
from alignlab.config.online import OnlineConfig as OnlineConfig
from alignlab.config.online import OnlineDPOConfig as OnlineDPOConfig
from alignlab.config.online import PolicyGradientConfig as PolicyGradientConfig
from alignlab.config.policy_gradient import CriticSettings as CriticSettings
from alignlab.config.policy_gradient import GRPOConfig as GRPOConfig
from alignlab.config.policy_gradient import PPOConfig as PPOConfig
from alignlab.config.rlaif import RLAIFConfig as RLAIFConfig
from alignlab.config.trainer import CheckpointSettings as CheckpointSettings
from alignlab.config.trainer import EarlyStoppingSettings as EarlyStoppingSettings
from alignlab.config.trainer import MemorySettings as MemorySettings
from alignlab.config.trainer import OptimSettings as OptimSettings
from alignlab.config.trainer import TrainerConfig as TrainerConfig

AnyTrainer = Annotated[
    GRPOConfig
    | PPOConfig
    | SFTConfig
    | DPOConfig
    | OnlineDPOConfig
    | KTOConfig
    | RewardConfig
    | DistillConfig
    | GKDConfig
    | OnPolicyDistillConfig
    | RLAIFConfig,
    Field(discriminator="type"),
]
"""The section of any trainer, chosen by its `type`."""


def stages_of(trainer: TrainerConfig | RLAIFConfig) -> tuple[TrainerConfig, ...]:
    """Return the trainings of a run, in order: one, or those of RLAIF."""
    return trainer.stages if isinstance(trainer, RLAIFConfig) else (trainer,)
