"""Check a config without training: load its tokenizer and data, try its rewards on one sample, say what would run."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignlab.cli.check_rewards import try_rewards
from alignlab.cli.train import add_config_arguments

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignlab.cli.check_data import Data
    from alignlab.config.constitution import Constitution
    from alignlab.config.judge import JudgeSettings
    from alignlab.config.run import RunConfig
    from alignlab.config.trainers import TrainerConfig
    from alignlab.types import Prompt

NAME = "check"
SUMMARY = "check a config, its data and its rewards without training"
EXAMPLE = "alignlab check configs/grpo_smollm2_cpu.yaml trainer.recipe=dapo"

# An adapter's learning rate is about ten times that of full fine-tuning.
LOW_LORA_RATE, HIGH_FULL_RATE = 1e-5, 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Load everything but the model, and tell."""
    from alignlab.config.loader import load_config
    from alignlab.config.results import check_results

    config = load_config(args.config, args.overrides)
    check_results(config, args.config)

    from alignlab.cli.check_data import held_out_data, training_data
    from alignlab.config.trainers import stages_of
    from alignlab.trainers.run import make_tokenizer

    stages = stages_of(config.trainer)
    for stage in stages:
        check_engine(stage)
    tell("model", model_line(config))
    tokenizer = make_tokenizer(config)
    template = "with" if tokenizer.chat_template else "without"
    tell("tokenizer", f"{len(tokenizer)} tokens, {template} a chat template, end token {tokenizer.eos_token!r}")
    data, held_out = training_data(config, tokenizer), held_out_data(config, tokenizer)
    tell_all("data", data.lines)
    tell_all("eval data", held_out.lines)
    tell_all("reward", try_rewards(config, tokenizer, data.prompts, held_out.prompts))
    tell_all("judge", judge_lines(config))
    tell_all("trainer", (trainer_line(stage, config.trainer.output_dir) for stage in stages))
    check_teacher(config, tokenizer, data.prompts)
    check_training(config, tokenizer, data, held_out)
    tell_all("note", itertools.chain.from_iterable(map(server_notes, stages)))
    tell_all("note", notes(config, data.prompts, held_out.prompts))
    print("ok: nothing was trained")
    return 0


def check_engine(trainer: TrainerConfig) -> None:
    """See that the rollout engine is installed.

    Raises:
        ConfigError: it is vLLM, and missing or of a version that was not tested.
    """
    from alignlab.config.trainers import OnlineConfig
    from alignlab.rollout.vllm.requirement import require_vllm

    if isinstance(trainer, OnlineConfig) and trainer.rollout.engine == "vllm":
        require_vllm(trainer.rollout.engine)


def judge_lines(config: RunConfig) -> Iterator[str]:
    """The constitution and the judge of RLAIF.

    Raises:
        ConfigError: the constitution cannot be read.
    """
    from alignlab.config.constitution import load_constitution
    from alignlab.config.trainers import RLAIFConfig

    if not isinstance(config.trainer, RLAIFConfig):
        return
    judge, constitution = config.trainer.judge, load_constitution(config.trainer.constitution)
    check_judge(judge, constitution)
    yield f"{constitution.name}: {', '.join(principle.name for principle in constitution.principles)}"
    where = f"{judge.model} at {judge.url}" if judge.backend == "endpoint" else judge.name or "the policy's own base"
    votes = "" if judge.backend == "reward_model" else f", {judge.answers}, {judge.votes} votes a pair"
    yield f"{judge.backend}: {where}{votes}; alignlab judge says how good it is"


def check_judge(judge: JudgeSettings, constitution: Constitution) -> None:
    """See what can be seen of a judge without loading or asking it.

    Raises:
        ConfigError, CheckpointError: its model or key is missing, it cannot be asked in chats, or a vote would be cast
            twice.
    """
    from alignlab.models.attention import num_embeddings
    from alignlab.models.checkpoints import empty_model, load_tokenizer
    from alignlab.rlaif.endpoint import EndpointChatModel
    from alignlab.rlaif.judges import check_votes
    from alignlab.rlaif.local import check_chats
    from alignlab.training.model_reward import ModelReward

    if judge.backend == "reward_model":
        ModelReward(judge.name)
        return
    check_votes(judge, constitution)
    if judge.backend == "endpoint":
        EndpointChatModel(judge)
    elif judge.name is not None:
        check_chats(load_tokenizer(judge.name), num_embeddings(empty_model(judge.name)))


def server_notes(trainer: TrainerConfig) -> Iterator[str]:
    """Which vLLM servers do not answer now."""
    import anyio

    from alignlab.config.rollout import VLLMServerSettings
    from alignlab.config.trainers import OnlineConfig
    from alignlab.rollout.vllm.server.client import is_healthy

    rollout = trainer.rollout if isinstance(trainer, OnlineConfig) else None
    for address in rollout.servers if isinstance(rollout, VLLMServerSettings) else ():
        if not anyio.run(is_healthy, address):
            yield f"the vLLM server {address} does not answer; start it: bash launch/serve_vllm.sh CONFIG"


def check_teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
    """See that a teacher's tokenizer fits the student's.

    Raises:
        ConfigError, DataError: it does not, or its chat template refuses a prompt.
    """
    from alignlab.config.trainers import DistillConfig, GKDConfig, OnPolicyDistillConfig
    from alignlab.data.alignment import TextAligner
    from alignlab.models.checkpoints import load_tokenizer
    from alignlab.trainers.teacher import check_same_tokens

    trainer = config.trainer
    if not isinstance(trainer, DistillConfig | GKDConfig | OnPolicyDistillConfig):
        return
    theirs = load_tokenizer(trainer.teacher.name)
    alignment = trainer.alignment if isinstance(trainer, OnPolicyDistillConfig) else "tokens"
    if alignment == "tokens":
        check_same_tokens(theirs, tokenizer)
    else:
        TextAligner(tokenizer, theirs, config.data).prompt_ids(prompts)
    tell("teacher", f"{trainer.teacher.name}, {len(theirs)} tokens, judges by {alignment}")


def check_training(config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: Data, held_out: Data) -> None:
    """What a training would refuse at its start: trackers, what does not fit the model, a warm start's answers.

    Raises:
        ConfigError, DataError: one of them is wrong.
    """
    from alignlab.data.examples import load_examples
    from alignlab.data.sequences import fitting
    from alignlab.data.vocabulary import check_ids
    from alignlab.models.attention import num_embeddings, num_positions
    from alignlab.trainers.preflight import check_prompt_ids
    from alignlab.trainers.teacher import check_width

    model = shape_of(config, tokenizer)
    models = {"the model": model} | teachers_of(config)
    check_prompts(models, data.prompts, config, tokenizer)
    check_prompt_ids(model, held_out.prompts, tokenizer)
    for teacher in list(models.values())[1:]:
        check_width(teacher, tokenizer, rows=num_embeddings(model))
    rows = {whose: num_embeddings(each) for whose, each in models.items()}
    positions = {whose: num_positions(each) for whose, each in models.items()}
    for source in (data, held_out):
        check_ids((example.sequences for example in source.examples), rows, tokenizer, what="example")
        fitting(source.examples, positions, skip=source.skips)
    warm = config.warm_start
    if warm is not None:
        few = (warm.data or config.data).model_copy(update={"size": 8})
        examples = load_examples(
            few, tokenizer, answer_column=warm.answer_column, answer_template=warm.answer_template
        )
        check_ids((example.sequences for example in examples), rows, tokenizer, what="example of the warm start:")
    check_endings(config, model, tokenizer)


def shape_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model without its weights; of a student, with its own layers alone.

    Raises:
        ConfigError, CheckpointError: it cannot be had.
    """
    from accelerate import init_empty_weights

    from alignlab.data.vocabulary import num_token_ids
    from alignlab.models.checkpoints import empty_model, new_model
    from alignlab.models.student import chosen_layers, student_from

    settings = config.model
    if settings.name is not None:
        model = empty_model(settings.name)
        if settings.student is None:
            return model
        return student_from(model, chosen_layers(model, settings.student.layers, settings.student.num_layers))
    assert settings.architecture is not None, "a model has a name or a shape"
    with init_empty_weights():
        return new_model(
            settings.architecture, vocab_size=num_token_ids(tokenizer), pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )


def teachers_of(config: RunConfig) -> dict[str, PreTrainedModel]:
    """The teacher without its weights, where it reads the student's tokens."""
    from alignlab.config.trainers import DistillConfig, GKDConfig, OnPolicyDistillConfig
    from alignlab.models.checkpoints import empty_model

    trainer = config.trainer
    if not isinstance(trainer, DistillConfig | GKDConfig | OnPolicyDistillConfig):
        return {}
    by_text = isinstance(trainer, OnPolicyDistillConfig) and trainer.alignment == "text"
    return {} if by_text else {"the teacher": empty_model(trainer.teacher.name)}


def check_prompts(
    models: Mapping[str, Any], prompts: Sequence[Prompt], config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise if a model cannot read the prompts, or they and their completions do not fit its positions."""
    from alignlab.config.trainers import OnlineConfig, stages_of
    from alignlab.trainers.preflight import check_prompt_ids, check_room

    for whose, model in models.items():
        check_prompt_ids(model, prompts, tokenizer, whose=whose)
    for stage in stages_of(config.trainer):
        if isinstance(stage, OnlineConfig):
            for whose, model in models.items():
                check_room(model, prompts, stage, whose=whose, tokenizer=tokenizer)


def check_endings(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if a stage of the run could not end well: its end is tried on the model without weights.

    Raises:
        ConfigError, CheckpointError: see `trainers.ending.check_ending`.
    """
    from alignlab.config.trainers import stages_of
    from alignlab.models.adapters import add_lora
    from alignlab.trainers.ending import check_ending, writer_of

    folder = config.trainer.output_dir
    if config.warm_start is not None:
        warm = config.warm_start.trainer
        check_ending(warm, model, tokenizer, folder, writer_of(warm, model, tokenizer))
    if config.model.lora is not None:
        trained: Any = add_lora(model, config.model.lora)
    else:
        trained = with_adapter_of(config.model.name, model) or model.float()  # float32, whatever the checkpoint's dtype
    for stage in stages_of(config.trainer):
        check_ending(stage, trained, tokenizer, folder, writer_of(stage, trained, tokenizer))


def with_adapter_of(name: str | None, base: PreTrainedModel) -> PeftModel | None:
    """An adapter's base with the adapter on it, without weights; None for a name that is no adapter's."""
    from peft import get_peft_model

    from alignlab.models.adapter_files import adapter_config, is_adapter
    from alignlab.models.packaged import resolve_checkpoint

    path = None if name is None else resolve_checkpoint(name)
    if path is None or not is_adapter(path):
        return None
    adapter = adapter_config(path)
    adapter.inference_mode = False  # it is trained on
    return get_peft_model(base, adapter)


def tell(what: str, text: str) -> None:
    """One line of the result."""
    print(f"{what:10} {text}", flush=True)


def tell_all(what: str, lines: Iterable[str]) -> None:
    """A line each."""
    for line in lines:
        tell(what, line)


def model_line(config: RunConfig) -> str:
    """Which weights would be trained."""
    model = config.model
    what = f"a new one: {model.architecture}" if model.name is None else model.name
    if model.student is not None:
        chosen = model.student.layers or f"{model.student.num_layers}, evenly spaced"
        what = f"a student of {what}, layers {chosen}"
    lora = f"LoRA rank {model.lora.rank} alpha {model.lora.alpha:g}" if model.lora else "all weights"
    return f"{what}, {lora} trained, dtype {model.dtype}"


def trainer_line(trainer: TrainerConfig, folder: Path) -> str:
    """What would be run."""
    common = f"{trainer.num_steps} steps, learning rate {trainer.learning_rate:g}, into {folder}"
    return f"{trainer.method}: {common}; {trainer.step}"


def rate_notes(config: RunConfig) -> Iterator[str]:
    """A learning rate that is allowed and unusual."""
    from alignlab.config.trainers import stages_of

    for rate in dict.fromkeys(stage.learning_rate for stage in stages_of(config.trainer)):
        if config.model.lora and rate < LOW_LORA_RATE:
            yield f"learning rate {rate:g} is low for LoRA, which takes about ten times that of full fine-tuning"
        if config.model.name and not config.model.lora and rate >= HIGH_FULL_RATE:
            yield f"learning rate {rate:g} is high for all weights of a trained model; 1e-6 to 1e-5 is usual"


def notes(config: RunConfig, prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt]) -> Iterator[str]:
    """What is allowed and worth knowing before a run."""
    from alignlab.config.trainers import GRPOConfig, stages_of
    from alignlab.types import message_text

    yield from rate_notes(config)
    for stage in stages_of(config.trainer):
        if isinstance(stage, GRPOConfig):
            yield from stage.doubts
    shared = {message_text(p.text) for p in prompts} & {message_text(p.text) for p in eval_prompts}
    if shared:
        yield f"{len(shared)} evaluation prompts are also trained on, so their accuracy shows memory, not skill"
    if config.trainer.output_dir.exists() and any(config.trainer.output_dir.iterdir()):
        yield f"{config.trainer.output_dir} holds a run: use --resume, or another trainer.output_dir"
