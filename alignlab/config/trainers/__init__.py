"""What each trainer is told, a file each. A trainer's section is chosen by its `type` and holds only its own fields."""

from typing import Annotated

from pydantic import Field

from alignlab.config.trainers.base import EvaluatedConfig as EvaluatedConfig
from alignlab.config.trainers.base import TrainerConfig as TrainerConfig
from alignlab.config.trainers.distill import DistillConfig as DistillConfig
from alignlab.config.trainers.dpo import DPOConfig as DPOConfig
from alignlab.config.trainers.gkd import GKDConfig as GKDConfig
from alignlab.config.trainers.grpo import GRPOConfig as GRPOConfig
from alignlab.config.trainers.kto import KTOConfig as KTOConfig
from alignlab.config.trainers.on_policy_distill import OnPolicyDistillConfig as OnPolicyDistillConfig
from alignlab.config.trainers.online import KLSettings as KLSettings
from alignlab.config.trainers.online import MismatchSettings as MismatchSettings
from alignlab.config.trainers.online import OnlineConfig as OnlineConfig
from alignlab.config.trainers.online import PolicyGradientConfig as PolicyGradientConfig
from alignlab.config.trainers.online_dpo import OnlineDPOConfig as OnlineDPOConfig
from alignlab.config.trainers.pairs import PairLossConfig as PairLossConfig
from alignlab.config.trainers.ppo import CriticSettings as CriticSettings
from alignlab.config.trainers.ppo import PPOConfig as PPOConfig
from alignlab.config.trainers.reward import RewardConfig as RewardConfig
from alignlab.config.trainers.rlaif import RLAIFConfig as RLAIFConfig
from alignlab.config.trainers.sft import SFTConfig as SFTConfig

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
    """The trainings of a run, in order: one, or those of RLAIF."""
    return trainer.stages if isinstance(trainer, RLAIFConfig) else (trainer,)
