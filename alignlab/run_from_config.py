"""A whole run from one config: model, data, warm start, training, closing report; or all of its checks, and no run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.config.loader import dump_resolved
from alignlab.config.run import RunConfig, WarmStart
from alignlab.config.trainers import RLAIFConfig
from alignlab.data.examples import load_examples
from alignlab.errors import ConfigError, NothingLearntError
from alignlab.evaluation.results import Evaluation, EvaluationResult, LikelihoodResult
from alignlab.loop.accelerator import make_accelerator, prepared_device
from alignlab.loop.host_ranks import loading_for_training
from alignlab.loop.preflight import Preflight
from alignlab.loop.rank_watchdog import watched_set_up
from alignlab.loop.run_description import RunDescription
from alignlab.loop.run_identity import OWN
from alignlab.loop.sharding import check_sharding
from alignlab.loop.training_loop import TrainResult
from alignlab.models.empty import without_weights
from alignlab.models.hub.checkpoints import is_adapter, load_model
from alignlab.runs.folder import check_folder, holds_run
from alignlab.starting_model import make_model, make_tokenizer, model_dtype
from alignlab.trainers.from_config import make_trainer
from alignlab.trainers.sft import SFTTrainer

WARM_START = "warm_start"


@dataclass(frozen=True)
class RunSummary:
    """The outcome of a run.

    Attributes:
        task: name of the training data.
        result: result of the training.
        trains_adapter: True if the run made an adapter, False for a whole model.
    """

    task: str
    result: TrainResult
    trains_adapter: bool

    def to_json(self) -> dict[str, Any]:
        """Return the closing line of `alignlab train`."""
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
            **({} if self.result.stopping is None else self.result.stopping.to_json()),
            kind: str(self.result.model_path),
        }


@dataclass(frozen=True)
class CheckedRun:
    """A run that could begin.

    Attributes:
        preflight: of its training, after the warm start.
    """

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    preflight: Preflight


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
        AlignlabError: any of its kinds, before work is lost.
    """
    folder = config.trainer.output_dir
    check_sharding(config.trainer.sharding, int(os.environ.get("WORLD_SIZE", "1")))
    # A run that was stopped in its warm start has no checkpoint to resume from.
    check_folder(folder, resume=resume and (holds_run(folder) or not holds_run(folder / WARM_START)))
    _check_warm_start_folder(config)
    if config.warm_start is None:
        tokenizer = make_tokenizer(config)
        set_seed(config.trainer.seed)  # a new model's weights are the run's too
        with _loading(config) as device:
            model = make_model(config.model, tokenizer, model_dtype(config.model), device)
        return _train(config, model, tokenizer, resume=resume)
    check_run(config)  # what the training would refuse is refused before the warm start
    return _train_from_warm_start(config, config.warm_start, resume=resume)


def _train_from_warm_start(config: RunConfig, settings: WarmStart, *, resume: bool) -> RunSummary:
    folder, tokenizer = config.trainer.output_dir, make_tokenizer(config)
    set_seed(config.trainer.seed)
    with _loading(config) as device:  # a warm start trains all weights, also where an adapter is added afterwards
        model = make_model(config.model, tokenizer, torch.float32, device)
    with _summarised(config):
        trainer = warm_start_trainer(config, settings, model, tokenizer)
        warm = trainer.train(resume=resume and holds_run(folder / WARM_START))
    if warm.interrupted or warm.signal:  # a signal in the last step of the warm start, too
        return RunSummary(_task(config.data), replace(warm, interrupted=True), trains_adapter=False)
    with _loading(config) as device:
        model = load_model(str(warm.model_path), dtype=model_dtype(config.model), device=device, mtp=config.model.mtp)
    return _train(config, model, tokenizer, resume=resume and holds_run(folder))


def _loading(config: RunConfig) -> AbstractContextManager[torch.device]:
    """Return a context in which the model to be trained is loaded on the device that it yields."""
    trainer = config.trainer
    if isinstance(trainer, RLAIFConfig) or not trainer.sharding.spreads_weights:  # RLAIF samples before it trains
        return nullcontext(prepared_device(trainer.numerics))
    return loading_for_training(trainer.sharding, make_accelerator(trainer.rank_timeout_s, trainer.numerics))


def _train(
    config: RunConfig, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, resume: bool
) -> RunSummary:
    with watched_set_up():
        trainer = make_trainer(config, model, tokenizer)
    config = config.model_copy(update={"trainer": trainer.config})  # with the engine that was chosen
    trainer.identity.add_run(config)
    trainer.describe_run(
        RunDescription(
            f"{type(trainer).__name__} on {_task(config.data)}",
            dump_resolved(config),
            section=OWN,
            base_model=config.model.name if config.warm_start is None else trainer.run.base_model,
            generate_options=generate_options(config.data),
        )
    )
    with _summarised(config):
        return _summary(config, trainer.train(resume=resume))


@contextmanager
def _summarised(config: RunConfig) -> Iterator[None]:
    """Add the closing line of `alignlab train` to an error that has a result."""
    try:
        yield
    except NothingLearntError as error:
        error.summary = _summary(config, error.result).to_json()
        raise


def _summary(config: RunConfig, result: TrainResult) -> RunSummary:
    return RunSummary(_task(config.data), result, trains_adapter=is_adapter(str(result.model_path)))


def _check_warm_start_folder(config: RunConfig) -> None:
    """Raise if the run in the folder was started with a warm start and the config has none, or the reverse.

    Raises:
        ConfigError: the message says what to change.
    """
    folder = config.trainer.output_dir
    has_warm_start = holds_run(folder / WARM_START)
    if has_warm_start and config.warm_start is None:
        raise ConfigError(
            f"warm_start is null, and must be what the run in {folder} was started with: {folder / WARM_START} holds "
            "its warm start; add it, or choose another trainer.output_dir"
        )
    if config.warm_start is not None and holds_run(folder) and not has_warm_start:
        raise ConfigError(
            f"warm_start is given, and must be null: the run in {folder} was started without; remove it, or choose "
            "another trainer.output_dir"
        )


def warm_start_trainer(
    config: RunConfig, settings: WarmStart, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> SFTTrainer:
    """Return the trainer that fine-tunes all weights on prompts and answers; the result is in `warm_start/model`."""
    source = settings.data or config.data
    examples = load_examples(
        source,
        tokenizer,
        answer_column=settings.answer_column,
        answer_template=settings.answer_template,
    )
    folder = config.trainer.output_dir / WARM_START
    shared = {"numerics": config.trainer.numerics, "sharding": config.trainer.sharding}
    with watched_set_up():
        trainer = SFTTrainer(
            model,
            settings.trainer.model_copy(update={"output_dir": folder, **shared}),
            examples, tokenizer=tokenizer, render_settings=RenderSettings(on_bad_row=source.on_bad_row),
        )
    final = holds_run(config.trainer.output_dir)
    trainer.describe_run(replace(trainer.run, section="warm_start.trainer", settings_are_final=final))
    return trainer


def check_run(config: RunConfig) -> CheckedRun:
    """Make the trainers of a run on models without weights, and check that they could end well.

    Raises:
        AlignlabError: whatever the run would raise before its first step, for all that needs no weights to find out.
    """
    with without_weights():
        tokenizer = make_tokenizer(config)
        if config.warm_start is not None:
            model = make_model(config.model, tokenizer, torch.float32)
            warm_start_trainer(config, config.warm_start, model, tokenizer).preflight()
        model = make_model(config.model, tokenizer, model_dtype(config.model))
        return CheckedRun(config, tokenizer, make_trainer(config, model, tokenizer).preflight())


def generate_options(data: DataSettings) -> tuple[str, ...]:
    """Return the flags with which `alignlab generate` renders a prompt as the training did."""
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
