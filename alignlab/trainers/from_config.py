"""The trainer of a run from a config."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.run import RunConfig
from alignlab.config.trainers import RLAIFConfig
from alignlab.loop.offline import OfflineTrainer
from alignlab.loop.online import OnlineTrainer
from alignlab.trainers.distill import DistillTrainer
from alignlab.trainers.dpo import DPOTrainer
from alignlab.trainers.gkd import GKDTrainer
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.kto import KTOTrainer
from alignlab.trainers.on_policy_distill import OnPolicyDistillTrainer
from alignlab.trainers.online_dpo import OnlineDPOTrainer
from alignlab.trainers.ppo import PPOTrainer
from alignlab.trainers.reward import RewardTrainer
from alignlab.trainers.rlaif.trainer import RLAIFTrainer
from alignlab.trainers.sft import SFTTrainer

# By `trainer.type`.
ONLINE: dict[str, type[OnlineTrainer]] = {
    "grpo": GRPOTrainer,
    "ppo": PPOTrainer,
    "online_dpo": OnlineDPOTrainer,
    "gkd": GKDTrainer,
    "on_policy_distill": OnPolicyDistillTrainer,
}
OFFLINE: dict[str, type[OfflineTrainer]] = {
    "sft": SFTTrainer,
    "dpo": DPOTrainer,
    "kto": KTOTrainer,
    "reward": RewardTrainer,
    "distill": DistillTrainer,
}


def make_trainer(
    config: RunConfig, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> OnlineTrainer | OfflineTrainer | RLAIFTrainer:
    """Return the trainer of the config, with the config's data, rewards and evaluation."""
    section: Any = config.trainer
    given: dict[str, Any] = {
        "eval_dataset": config.measured_data, "tokenizer": tokenizer, "peft_config": config.model.lora,
    }
    if isinstance(section, RLAIFConfig):
        return RLAIFTrainer(model, section, config.data, evaluation=config.evaluation, **given)
    if section.type in ONLINE:
        make_online = ONLINE[section.type]
        return make_online(model, config.rewards, section, config.data, evaluation=config.evaluation, **given)
    if section.measures == "accuracy":
        given |= {"reward_funcs": config.rewards, "evaluation": config.evaluation}
    return OFFLINE[section.type](model, section, config.data, **given)
