"""The model part of `alignlab check`: engines, judges, teachers, and all that must fit the model.

Every function yields lines for the user, or raises what the training would raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alignlab.cli.checked_run import CheckedRun

if TYPE_CHECKING:
    from alignlab.config.judge import Constitution, JudgeSettings


def check_engines(run: CheckedRun) -> Iterator[str]:
    """Raise a ConfigError if an engine is vLLM, and vLLM is missing or of a version that was not tested."""
    from alignlab.rollout.vllm.installation import require_vllm

    for stage in run.online_stages:
        if stage.rollout.engine == "vllm":
            require_vllm(stage.rollout.engine)
    yield from ()


def server_notes(run: CheckedRun) -> Iterator[str]:
    """Yield the vLLM servers that do not answer now."""
    import anyio

    from alignlab.config.rollout import VLLMServerSettings
    from alignlab.rollout.vllm.client import is_healthy

    rollouts = [stage.rollout for stage in run.online_stages if isinstance(stage.rollout, VLLMServerSettings)]
    for address in (address for rollout in rollouts for address in rollout.servers):
        if not anyio.run(is_healthy, address):
            yield f"the vLLM server {address} does not answer; start it: bash launch/serve_vllm.sh CONFIG"


def judge_lines(run: CheckedRun) -> Iterator[str]:
    """Yield the constitution and the judge of RLAIF.

    Raises:
        ConfigError: the constitution cannot be read, or see `_check_judge`.
    """
    from alignlab.config.judge import load_constitution
    from alignlab.config.trainers import RLAIFConfig

    trainer = run.config.trainer
    if not isinstance(trainer, RLAIFConfig):
        return
    judge, constitution = trainer.judge, load_constitution(trainer.constitution)
    _check_judge(judge, constitution)
    yield f"{constitution.name}: {', '.join(principle.name for principle in constitution.principles)}"
    place = f"{judge.model} at {judge.url}" if judge.backend == "endpoint" else judge.name or "the policy's own base"
    votes = "" if judge.backend == "reward_model" else f", {judge.answers}, {judge.votes} votes a pair"
    yield f"{judge.backend}: {place}{votes}; alignlab judge says how good it is"


def _check_judge(judge: JudgeSettings, constitution: Constitution) -> None:
    """Check a judge without loading or asking it.

    Raises:
        ConfigError, CheckpointError: its model or key is missing, it cannot be asked in chats, or it would cast a vote
            twice.
    """
    from alignlab.models.decoder import num_embeddings
    from alignlab.models.hub.checkpoints import empty_model, load_tokenizer
    from alignlab.scoring.judges.endpoint import EndpointChatModel
    from alignlab.scoring.judges.local import check_chats
    from alignlab.scoring.judges.make_judge import check_votes
    from alignlab.scoring.reward_model import ModelReward

    if judge.backend == "reward_model":
        ModelReward(judge.name)
        return
    check_votes(judge, constitution)
    if judge.backend == "endpoint":
        EndpointChatModel(judge)
    elif judge.name is not None:
        check_chats(load_tokenizer(judge.name), num_embeddings(empty_model(judge.name)))


def teacher_lines(run: CheckedRun) -> Iterator[str]:
    """Yield the teacher of a distillation.

    Raises:
        ConfigError, DataError: its tokenizer does not fit the student's, or its chat template refuses a prompt.
    """
    from alignlab.data.token_alignment import TextAligner
    from alignlab.loop.teacher import check_same_tokens, check_width
    from alignlab.models.decoder import num_embeddings
    from alignlab.models.hub.checkpoints import load_tokenizer

    if run.teacher is None:
        return
    tokenizer = load_tokenizer(run.teacher.name)
    if run.aligns_text:
        TextAligner(run.tokenizer, tokenizer, run.config.data.rendering).prompt_ids(run.training_rows.prompts)
    else:
        check_same_tokens(tokenizer, run.tokenizer)
        check_width(run.models["the teacher"], run.tokenizer, rows=num_embeddings(run.model))
    yield f"{run.teacher.name}, {len(tokenizer)} tokens, judges by {'text' if run.aligns_text else 'tokens'}"


def check_fit(run: CheckedRun) -> Iterator[str]:
    """Raise if a model has no embedding for a token of the data, or no positions for a row.

    Raises:
        ConfigError, DataError: with the row's number.
    """
    from alignlab.data.dataset import fitting
    from alignlab.data.vocabulary import check_ids
    from alignlab.models.decoder import num_embeddings, num_positions

    _check_prompts(run)
    rows = {name: num_embeddings(model) for name, model in run.models.items()}
    positions = {name: num_positions(model) for name, model in run.models.items()}
    for source in filter(None, (run.training_rows, run.held_out_rows)):
        check_ids((example.sequences for example in source.examples), rows, run.tokenizer, what="example")
        fitting(source.examples, positions, skip=source.settings.on_bad_row == "skip")
    yield from ()


def _check_prompts(run: CheckedRun) -> None:
    """Raise if prompts with their completions do not fit a model, in training and in evaluation."""
    from alignlab.config.rollout import RolloutSettings, SamplingSettings
    from alignlab.config.trainers import RLAIFConfig
    from alignlab.loop.held_out import held_out_problems
    from alignlab.loop.preflight import check_prompt_ids, with_room

    trainer, prompts, held_out = run.config.trainer, run.training_rows.prompts, run.held_out_rows
    stages = trainer.sampling_stages if isinstance(trainer, RLAIFConfig) else run.online_stages
    for name, model in run.models.items():
        check_prompt_ids(model, prompts, run.tokenizer, whose=name)
        for stage in stages:
            with_room(prompts, model, stage, run.config.data.rendering, whose=name, tokenizer=run.tokenizer)
    if held_out is not None:
        last = run.online_stages[-1] if run.online_stages else None
        sampling = last.sampling if last else SamplingSettings()
        rollout = last.rollout if last else RolloutSettings()
        problems = held_out_problems(run.config.evaluation, (), sampling, rollout, needed=False)
        problems.of(held_out.prompts, held_out.settings.rendering, run.model, run.tokenizer)


def check_warm_start(run: CheckedRun) -> Iterator[str]:
    """Raise if the first examples of a warm start cannot be read.

    Raises:
        ConfigError, DataError: with the row's number.
    """
    from alignlab.data.examples import load_examples
    from alignlab.data.vocabulary import check_ids
    from alignlab.models.decoder import num_embeddings

    warm = run.config.warm_start
    if warm is not None:
        data = (warm.data or run.config.data).model_copy(update={"size": 8})
        columns = {"answer_column": warm.answer_column, "answer_template": warm.answer_template}
        examples = load_examples(data, run.tokenizer, **columns)
        rows = {"the model": num_embeddings(run.model)}
        check_ids((example.sequences for example in examples), rows, run.tokenizer, what="example of the warm start:")
    yield from ()


def check_endings(run: CheckedRun) -> Iterator[str]:
    """Try the end of each training on the model without weights: what it writes, and room on the disk.

    Raises:
        ConfigError, CheckpointError: see `loop.ending_check.check_ending`.
    """
    from alignlab.loop.ending_check import check_ending, writer_of
    from alignlab.starting_model import trained_part_of

    folder, tokenizer = run.config.trainer.output_dir, run.tokenizer
    if run.config.warm_start is not None:
        warm = run.config.warm_start.trainer
        check_ending(warm, run.model, tokenizer, folder, writer_of(warm, run.model, tokenizer))
    trained = trained_part_of(run.config.model, run.model)
    for stage in run.stages:
        check_ending(stage, trained, tokenizer, folder, writer_of(stage, trained, tokenizer))
    yield from ()
