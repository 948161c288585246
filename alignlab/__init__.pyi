"""The public names of alignlab. This file is the only list: type checkers and `alignlab/__init__.py` read it."""

from alignlab.config.data import DataSettings as DataSettings
from alignlab.config.data import RenderSettings as RenderSettings
from alignlab.config.distill import TeacherSettings as TeacherSettings
from alignlab.config.loader import load_config as load_config
from alignlab.config.model import LoraSettings as LoraSettings
from alignlab.config.rewards import RewardSettings as RewardSettings
from alignlab.config.rollout import RolloutSettings as RolloutSettings
from alignlab.config.rollout import SamplingSettings as SamplingSettings
from alignlab.config.run import EvaluationSettings as EvaluationSettings
from alignlab.config.run import RunConfig as RunConfig
from alignlab.config.trainers import CheckpointSettings as CheckpointSettings
from alignlab.config.trainers import CriticSettings as CriticSettings
from alignlab.config.trainers import DistillConfig as DistillConfig
from alignlab.config.trainers import DPOConfig as DPOConfig
from alignlab.config.trainers import GKDConfig as GKDConfig
from alignlab.config.trainers import GRPOConfig as GRPOConfig
from alignlab.config.trainers import KLSettings as KLSettings
from alignlab.config.trainers import KTOConfig as KTOConfig
from alignlab.config.trainers import MemorySettings as MemorySettings
from alignlab.config.trainers import OnlineDPOConfig as OnlineDPOConfig
from alignlab.config.trainers import OnPolicyDistillConfig as OnPolicyDistillConfig
from alignlab.config.trainers import OptimSettings as OptimSettings
from alignlab.config.trainers import PPOConfig as PPOConfig
from alignlab.config.trainers import RewardConfig as RewardConfig
from alignlab.config.trainers import RLAIFConfig as RLAIFConfig
from alignlab.config.trainers import SFTConfig as SFTConfig
from alignlab.errors import AlignlabError as AlignlabError
from alignlab.models.hub.reward_checkpoints import load_reward_model as load_reward_model
from alignlab.models.reward_model import RewardModel as RewardModel
from alignlab.rollout.embedded.engine import EmbeddedEngine as EmbeddedEngine
from alignlab.run_from_config import run as run
from alignlab.trainers.distill import DistillTrainer as DistillTrainer
from alignlab.trainers.dpo import DPOTrainer as DPOTrainer
from alignlab.trainers.gkd import GKDTrainer as GKDTrainer
from alignlab.trainers.grpo import GRPOTrainer as GRPOTrainer
from alignlab.trainers.kto import KTOTrainer as KTOTrainer
from alignlab.trainers.on_policy_distill import OnPolicyDistillTrainer as OnPolicyDistillTrainer
from alignlab.trainers.online_dpo import OnlineDPOTrainer as OnlineDPOTrainer
from alignlab.trainers.ppo import PPOTrainer as PPOTrainer
from alignlab.trainers.reward import RewardTrainer as RewardTrainer
from alignlab.trainers.rlaif.trainer import RLAIFTrainer as RLAIFTrainer
from alignlab.trainers.sft import SFTTrainer as SFTTrainer
from alignlab.types import Completion as Completion
from alignlab.types import Prompt as Prompt
from alignlab.types import Rollout as Rollout
from alignlab.types import SamplingParams as SamplingParams

__version__: str
__all__: list[str]
