"""What each trainer is told, a file each. A trainer's section is chosen by its `type` and holds only its own fields."""

from alignlab.config.trainers.base import TrainerConfig as TrainerConfig
from alignlab.config.trainers.dpo import DPOConfig as DPOConfig
from alignlab.config.trainers.grpo import GRPOConfig as GRPOConfig
from alignlab.config.trainers.kto import KTOConfig as KTOConfig
from alignlab.config.trainers.online import KLSettings as KLSettings
from alignlab.config.trainers.online import MismatchSettings as MismatchSettings
from alignlab.config.trainers.online import OnlineConfig as OnlineConfig
from alignlab.config.trainers.online import PolicyGradientConfig as PolicyGradientConfig
from alignlab.config.trainers.online_dpo import OnlineDPOConfig as OnlineDPOConfig
from alignlab.config.trainers.pairs import PairLossConfig as PairLossConfig
from alignlab.config.trainers.ppo import CriticSettings as CriticSettings
from alignlab.config.trainers.ppo import PPOConfig as PPOConfig
from alignlab.config.trainers.sft import SFTConfig as SFTConfig
