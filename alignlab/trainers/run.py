"""A whole run from one config: model, data, warm start, training, closing report."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.data import DataSettings
from alignlab.config.loader import dump_resolved
from alignlab.config.model import ModelSettings, TokenizerTraining
from alignlab.config.render import RenderSettings
from alignlab.config.run import RunConfig, WarmStart
from alignlab.config.trainers import (
    DistillConfig,
    DPOConfig,
    GKDConfig,
    GRPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    OnPolicyDistillConfig,
    PPOConfig,
    RewardConfig,
    RLAIFConfig,
    SFTConfig,
    TrainerConfig,
)
from alignlab.data.examples import load_examples
from alignlab.data.messages import BadRow
from alignlab.data.prompts import count_or_raise, split_row
from alignlab.data.rows import plain_row
from alignlab.data.sources import load_rows
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.data.vocabulary import num_token_ids
from alignlab.errors import NothingLearntError
from alignlab.models.checkpoints import is_adapter, load_model, load_tokenizer, new_model
from alignlab.models.student import chosen_layers, student_from
from alignlab.trainers.distill import DistillTrainer
from alignlab.trainers.dpo import DPOTrainer
from alignlab.trainers.gkd import GKDTrainer
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.kto import KTOTrainer
from alignlab.trainers.loop import TrainResult
from alignlab.trainers.offline import OfflineTrainer
from alignlab.trainers.on_policy_distill import OnPolicyDistillTrainer
from alignlab.trainers.online import OnlineTrainer
from alignlab.trainers.online_dpo import OnlineDPOTrainer
from alignlab.trainers.ppo import PPOTrainer
from alignlab.trainers.rank_watchdog import watched_set_up
from alignlab.trainers.reward import RewardTrainer
from alignlab.trainers.rlaif import RLAIFTrainer
from alignlab.trainers.sft import SFTTrainer
from alignlab.training.evaluation import Evaluation, EvaluationResult, LikelihoodResult
from alignlab.training.run_folder import check_folder, holds_run
from alignlab.types import message_text

WARM_START = "warm_start"
ONLINE: dict[type[TrainerConfig], type[OnlineTrainer]] = {
    GRPOConfig: GRPOTrainer,
    PPOConfig: PPOTrainer,
    OnlineDPOConfig: OnlineDPOTrainer,
    GKDConfig: GKDTrainer,
    OnPolicyDistillConfig: OnPolicyDistillTrainer,
}
OFFLINE: dict[type[TrainerConfig], type[OfflineTrainer]] = {
    SFTConfig: SFTTrainer,
    DPOConfig: DPOTrainer,
    KTOConfig: KTOTrainer,
    RewardConfig: RewardTrainer,
    DistillConfig: DistillTrainer,
}


@dataclass(frozen=True)
class RunSummary:
    """What a run came to.

    Attributes:
        task: the data it was trained on.
        result: of the training.
        trains_adapter: whether it made an adapter, and not a whole model.
    """

    task: str
    result: TrainResult
    trains_adapter: bool

    def to_json(self) -> dict[str, Any]:
        """The closing line of `alignlab train`."""
        kind = "adapter" if self.trains_adapter else "model"
        return {
            "task": self.task,
            "before": _headline(self.result.before),
            "after": _headline(self.result.after),
            "train_seconds": round(self.result.train_seconds, 1),
            "num_steps": self.result.num_steps,
            "interrupted": self.result.interrupted,
            "run": self.result.run_id,
            **self.result.verdict.to_json(),
            kind: str(self.result.model_path),
        }


def _headline(result: Evaluation | None) -> dict[str, float] | None:
    if result is None:
        return None
    if isinstance(result, LikelihoodResult):
        return {name: round(getattr(result, name), 4) for name in ("loss", "perplexity")}
    if not isinstance(result, EvaluationResult):
        return {"accuracy": round(result.accuracy, 4)}
    counts = {} if result.num_judged is None else {"num_judged": result.num_judged}
    return {"greedy": round(result.greedy, 4), "sampled": round(result.sampled, 4), **counts}


def run(config: RunConfig, *, resume: bool = False) -> RunSummary:
    """Train as the config says, and write the closing report.

    Args:
        resume: go on from the newest checkpoint in the output folder, in the warm start too.

    Raises:
        AlignlabError: any of its kinds, each before work is lost.
    """
    folder = config.trainer.output_dir
    # A run that was stopped in its warm start has not begun itself.
    check_folder(folder, resume=resume and (holds_run(folder) or not holds_run(folder / WARM_START)))
    tokenizer = make_tokenizer(config)
    set_seed(config.trainer.seed)  # a new model's weights are the run's too
    # A warm start trains all weights, whatever is put on them afterwards.
    dtype = model_dtype(config.model) if config.warm_start is None else torch.float32
    model: PreTrainedModel | PeftModel = make_model(config.model, tokenizer, dtype)
    if config.warm_start is not None:
        with _summarised(config):
            warm = warm_start(config, config.warm_start, model, tokenizer, resume=resume)
        if warm.interrupted or warm.signal:  # also where it came in the last step: the run is not over
            return RunSummary(_task(config.data), replace(warm, interrupted=True), trains_adapter=False)
        model = load_model(str(warm.model_path), dtype=model_dtype(config.model))
        resume = resume and holds_run(folder)
    with watched_set_up():
        trainer = make_trainer(config, model, tokenizer)
    trainer.config_text = dump_resolved(config)
    trainer.identity.add_run(config)
    if config.warm_start is None:
        trainer.base_model = config.model.name
    trainer.generate_options = generate_options(config.data)
    trainer.title = f"{type(trainer).__name__} on {_task(config.data)}"
    with _summarised(config):
        return _summary(config, trainer.train(resume=resume))


@contextmanager
def _summarised(config: RunConfig) -> Iterator[None]:
    """Give an error that comes with a result the closing line of `alignlab train`."""
    try:
        yield
    except NothingLearntError as error:
        error.summary = _summary(config, error.result).to_json()
        raise


def _summary(config: RunConfig, result: TrainResult) -> RunSummary:
    return RunSummary(_task(config.data), result, trains_adapter=is_adapter(str(result.model_path)))


def model_dtype(settings: ModelSettings) -> torch.dtype:
    """The dtype of a run's weights: "auto" is bfloat16 under an adapter, float32 where all weights are trained."""
    if settings.dtype == "auto":
        return torch.float32 if settings.lora is None else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]


def make_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names, or one trained from the training data's prompts and answers."""
    settings = config.model
    if not isinstance(settings.tokenizer, TokenizerTraining):
        name = settings.tokenizer or settings.name
        assert name is not None, "the config's rules ask for one of the two"
        return load_tokenizer(name)
    column = config.warm_start.answer_column if config.warm_start else "answer"
    texts = []
    for index, row in enumerate(itertools.islice(load_rows(config.data), settings.tokenizer.num_texts)):
        try:
            text, columns = split_row(plain_row(row), config.data.prompt_column)
            texts.append(f"{message_text(text)}{columns.get(column, '')}")
        except BadRow as error:
            count_or_raise(Counter(), error, index, config.data)
    return train_tokenizer(texts, vocab_size=settings.tokenizer.vocab_size)


def make_model(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel | PeftModel:
    """The model that the config names, or some of its layers; or a new one, random by torch's global generator."""
    if settings.name is not None:
        model = load_model(settings.name, dtype=dtype)
        if settings.student is None:
            return model
        return student_from(model, chosen_layers(model, settings.student.layers, settings.student.num_layers))
    assert settings.architecture is not None
    return new_model(
        settings.architecture,
        vocab_size=num_token_ids(tokenizer),
        dtype=dtype,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def warm_start(
    config: RunConfig,
    settings: WarmStart,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    resume: bool,
) -> TrainResult:
    """Supervised fine-tuning of all weights on prompts and answers; the result is in `warm_start/model`."""
    source = settings.data or config.data
    examples = load_examples(
        source,
        tokenizer,
        answer_column=settings.answer_column,
        answer_template=settings.answer_template,
    )
    folder = config.trainer.output_dir / WARM_START
    with watched_set_up():
        trainer = SFTTrainer(
            model, settings.trainer.model_copy(update={"output_dir": folder}), examples, tokenizer=tokenizer,
            render_settings=RenderSettings(on_bad_row=source.on_bad_row),
        )
    trainer.identity.prefix = "warm_start.trainer"
    return trainer.train(resume=resume and holds_run(folder))


def make_trainer(
    config: RunConfig, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> OnlineTrainer | OfflineTrainer | RLAIFTrainer:
    """The trainer that the config's `trainer.type` names."""
    lora = config.model.lora
    held_out = measured_data(config)
    if isinstance(config.trainer, RLAIFConfig):
        return RLAIFTrainer(
            model, config.trainer, config.data, eval_dataset=held_out, tokenizer=tokenizer, peft_config=lora,
            evaluation=config.evaluation,
        )
    kind = type(config.trainer)
    if kind in OFFLINE:
        measured = config.trainer.measures == "accuracy"
        scored: dict[str, Any] = {"reward_funcs": config.rewards, "evaluation": config.evaluation} if measured else {}
        return OFFLINE[kind](
            model, config.trainer, config.data, eval_dataset=held_out, tokenizer=tokenizer, peft_config=lora, **scored
        )
    return ONLINE[kind](
        model,
        config.rewards,
        config.trainer,  # type: ignore[arg-type]  # the table's key
        config.data,
        eval_dataset=held_out,
        tokenizer=tokenizer,
        peft_config=lora,
        evaluation=config.evaluation,
    )


def measured_data(config: RunConfig) -> DataSettings | None:
    """The held-out data that the trainer measures something on."""
    trainer = config.trainer
    unscored = trainer.takes_rewards == "optional" and trainer.measures == "accuracy" and not config.has_scorer
    return None if unscored else evaluation_data(config)


def evaluation_data(config: RunConfig) -> DataSettings | None:
    """The held-out data: as given, or the questions of the same task that training never sees."""
    if config.eval_data is not None or config.data.task is None:
        return config.eval_data
    return config.data.model_copy(update={"split": "eval"})


def generate_options(data: DataSettings) -> tuple[str, ...]:
    """Flags with which `alignlab generate` renders a prompt as the training did."""
    given = {"--plain": data.chat is False, "--escape-special-tokens": data.escape_special_tokens}
    default = RenderSettings()
    day = str(data.template_date) if data.template_date != default.template_date else None
    named = {
        "--system-prompt": data.system_prompt,
        "--prompt-template": data.prompt_template,
        "--tools": json.dumps(data.tools) if data.tools else None,
        "--chat-template-kwargs": json.dumps(data.chat_template_kwargs) if data.chat_template_kwargs else None,
        "--template-date": day,
    }
    flags = tuple(flag for flag, is_given in given.items() if is_given)
    return flags + tuple(word for flag, text in named.items() if text is not None for word in (flag, text))


def _task(data: DataSettings) -> str:
    return data.task or str(data.path)
