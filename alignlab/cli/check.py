"""Check a config without training: load its tokenizer and data, try its rewards on one sample, say what would run."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from alignlab.cli.train import add_config_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.config.constitution import Constitution
    from alignlab.config.judge import JudgeSettings
    from alignlab.config.rewards import RewardLimits
    from alignlab.config.run import RunConfig
    from alignlab.config.trainers import TrainerConfig
    from alignlab.data.prompts import PromptDataset
    from alignlab.training.reward_functions import LoadedReward
    from alignlab.types import Prompt, Rollout

NAME = "check"
SUMMARY = "check a config, its data and its rewards without training"
EXAMPLE = "alignlab check configs/grpo_smollm2_cpu.yaml trainer.recipe=dapo"

# An adapter's learning rate is about ten times that of full fine-tuning.
LOW_LORA_RATE, HIGH_FULL_RATE = 1e-5, 1e-4
WRONG_ANSWER = "I do not know."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Load everything but the model, and tell."""
    from alignlab.config.loader import load_config

    config = load_config(args.config, args.overrides)

    from alignlab.config.trainers import stages_of
    from alignlab.data.prompts import load_prompts
    from alignlab.trainers.run import make_tokenizer, measured_data

    stages = stages_of(config.trainer)
    for stage in stages:
        check_engine(stage)
    tell("model", model_line(config))
    tokenizer = make_tokenizer(config)
    template = "with" if tokenizer.chat_template else "without"
    tell("tokenizer", f"{len(tokenizer)} tokens, {template} a chat template, end token {tokenizer.eos_token!r}")
    if config.trainer.measures == "preferences":
        return check_preferences(config, tokenizer)
    if config.trainer.measures == "labels":
        return check_labels(config, tokenizer)
    prompts = load_prompts(config.data, tokenizer)
    tell("data", data_line(prompts))
    held_out = measured_data(config)
    eval_prompts = load_prompts(held_out, tokenizer) if held_out else None
    tell("eval data", data_line(eval_prompts) if eval_prompts else "none: accuracy will not be measured")
    for line in try_rewards(config, prompts[0], tokenizer):
        tell("reward", line)
    for line in judge_lines(config):
        tell("judge", line)
    for stage in stages:
        tell("trainer", trainer_line(stage))
    check_teacher(config, tokenizer, prompts)
    check_training(config, tokenizer, prompts)
    servers = itertools.chain.from_iterable(server_notes(stage) for stage in stages)
    own_answer = answer_notes(config, prompts[0], tokenizer)
    for line in itertools.chain(own_answer, servers, notes(config, prompts, eval_prompts)):
        tell("note", line)
    print("ok: nothing was trained")
    return 0


def check_preferences(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Load the pairs, and tell."""
    from alignlab.config.trainers import RewardConfig
    from alignlab.data.preferences import load_preferences
    from alignlab.trainers.run import evaluation_data

    columns: dict[str, str | None] = {}
    if isinstance(config.trainer, RewardConfig):
        columns = {name: getattr(config.trainer, name) for name in ("margin_column", "probability_column")}
    for name, settings in (("data", config.data), ("eval data", evaluation_data(config))):
        if settings is None:
            tell(name, "none: how often the chosen completion leads will not be measured")
            continue
        pairs = load_preferences(settings, tokenizer, **columns)
        lengths = [len(pair.prompt) + pair.num_tokens for pair in pairs]
        skipped = "".join(f", {count} skipped ({reason})" for reason, count in pairs.skipped.items())
        tell(name, f"{len(pairs)} pairs of {min(lengths)} to {max(lengths)} tokens with their prompt{skipped}")
    return check_offline(config)


def check_labels(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Load the completions that are labelled good or bad, and tell."""
    from alignlab.data.unpaired import load_unpaired
    from alignlab.trainers.run import evaluation_data

    for name, settings in (("data", config.data), ("eval data", evaluation_data(config))):
        if settings is None:
            tell(name, "none: how often labels are agreed with will not be measured")
            continue
        found = load_unpaired(settings, tokenizer)
        lengths = [len(each.prompt) + len(each.completion) for each in found]
        good = sum(each.desirable for each in found)
        skipped = "".join(f", {count} skipped ({reason})" for reason, count in found.skipped.items())
        told = f"{good} desirable and {len(found) - good} undesirable completions"
        tell(name, f"{told} of {min(lengths)} to {max(lengths)} tokens with their prompt{skipped}")
    return check_offline(config)


def check_offline(config: RunConfig) -> int:
    """Tell of the training itself, where no prompt is answered."""
    from alignlab.config.trainers import stages_of
    from alignlab.training.metrics import check_trackers

    for stage in stages_of(config.trainer):
        tell("trainer", trainer_line(stage))
        check_trackers(stage.trackers)
    for line in rate_notes(config):
        tell("note", line)
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
        ConfigError, CheckpointError: its model or key is missing, or a vote would be cast twice.
    """
    from alignlab.models.checkpoints import check_checkpoint
    from alignlab.rlaif.endpoint import EndpointChatModel
    from alignlab.rlaif.judges import check_votes
    from alignlab.training.model_reward import ModelReward

    if judge.backend == "reward_model":
        ModelReward(judge.name)
        return
    check_votes(judge, constitution)
    if judge.backend == "endpoint":
        EndpointChatModel(judge)
    elif judge.name is not None:
        check_checkpoint(judge.name)


def server_notes(trainer: TrainerConfig) -> Iterator[str]:
    """Which vLLM servers do not answer now."""
    import httpx2

    from alignlab.config.rollout import VLLMServerSettings
    from alignlab.config.trainers import OnlineConfig

    rollout = trainer.rollout if isinstance(trainer, OnlineConfig) else None
    for address in rollout.servers if isinstance(rollout, VLLMServerSettings) else ():
        try:
            httpx2.get(f"{address}/health", timeout=5.0, trust_env=False).raise_for_status()
        except httpx2.HTTPError as error:
            yield f"the vLLM server {address} does not answer ({error}); start it: bash launch/serve_vllm.sh CONFIG"


def check_teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase, prompts: PromptDataset) -> None:
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


def check_training(config: RunConfig, tokenizer: PreTrainedTokenizerBase, prompts: PromptDataset) -> None:
    """What a training would refuse at its start: trackers, a new model's shape, a warm start's answers.

    Raises:
        ConfigError, DataError: one of them is wrong.
    """
    from accelerate import init_empty_weights

    from alignlab.config.trainers import stages_of
    from alignlab.data.examples import load_examples
    from alignlab.models.checkpoints import new_model
    from alignlab.training.metrics import check_trackers

    for stage in stages_of(config.trainer):
        check_trackers(stage.trackers)
    if config.model.architecture is not None:
        with init_empty_weights():
            model = new_model(config.model.architecture, vocab_size=len(tokenizer))
        check_room(model, prompts, config)
    warm = config.warm_start
    if warm is not None:
        few = (warm.data or config.data).model_copy(update={"size": 8})
        load_examples(few, tokenizer, answer_column=warm.answer_column, answer_template=warm.answer_template)


def check_room(model: Any, prompts: PromptDataset, config: RunConfig) -> None:
    """See that completions fit the model's positions."""
    from alignlab.config.trainers import OnlineConfig, stages_of
    from alignlab.trainers.preflight import check_room as check

    for stage in stages_of(config.trainer):
        if isinstance(stage, OnlineConfig):
            check(model, prompts, stage)


def answer_notes(config: RunConfig, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Whether the reward that says what is right takes a row's own answer for right."""
    from alignlab.config.rewards import RewardSettings
    from alignlab.trainers.run import evaluation_data
    from alignlab.training.evaluation import require_scorer
    from alignlab.training.reward_functions import load_reward

    if not config.rewards:
        return
    named = config.evaluation.scorer
    scorer = load_reward(RewardSettings(name=named) if named else config.rewards[0])
    if evaluation_data(config) is not None:
        require_scorer(scorer)
    value = value_of_own_answer(scorer, prompt, tokenizer)
    if value is not None and value != 1.0:
        yield f"{scorer.name} gives {value} to the row's own answer: accuracy, which counts 1 alone, may stay 0"


def tell(what: str, text: str) -> None:
    """One line of the result."""
    print(f"{what:10} {text}", flush=True)


def model_line(config: RunConfig) -> str:
    """Which weights would be trained."""
    model = config.model
    what = f"a new one: {model.architecture}" if model.name is None else model.name
    if model.student is not None:
        chosen = model.student.layers or f"{model.student.num_layers}, evenly spaced"
        what = f"a student of {what}, layers {chosen}"
    lora = f"LoRA rank {model.lora.rank} alpha {model.lora.alpha:g}" if model.lora else "all weights"
    return f"{what}, {lora} trained, dtype {model.dtype}"


def data_line(prompts: PromptDataset) -> str:
    """How many prompts, how long, with which columns."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    skipped = "".join(f", {count} skipped ({reason})" for reason, count in prompts.skipped.items())
    return (
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens (mean {sum(lengths) / len(lengths):.0f})"
        f"{skipped}; columns: {', '.join(prompts.columns) or 'none'}"
    )


def try_rewards(config: RunConfig, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Each reward's value of the first row's own answer and of a wrong one.

    Raises:
        RewardError: a function fails.
    """
    from alignlab.config.rewards import RewardLimits, RewardSettings
    from alignlab.config.trainers import OnlineConfig
    from alignlab.training.model_reward import ModelReward
    from alignlab.training.reward_functions import load_reward

    limits = config.trainer.reward_limits if isinstance(config.trainer, OnlineConfig) else RewardLimits()
    scorer = (RewardSettings(name=config.evaluation.scorer),) if config.evaluation.scorer else ()
    rewards = [load_reward(each) for each in (*config.rewards, *scorer)]
    for reward in rewards:
        if isinstance(reward.function, ModelReward):
            reward.function.check_tokenizer(tokenizer)
    texts = [str(prompt.columns["answer"])] if "answer" in prompt.columns else []
    scored = score_once(rewards, limits, sample_rollout(prompt, [*texts, WRONG_ANSWER], tokenizer))
    for name, values in scored.reward_parts.items():
        told = [f"{value} for {c.text!r}" for value, c in zip(values, scored.completions, strict=True)]
        silent = "; it applies to neither" if all(value is None for value in values) else ""
        yield f"{name}: {', '.join(told)}{silent}"


def score_once(rewards: Sequence[LoadedReward], limits: RewardLimits, rollout: Rollout) -> Rollout:
    """The rollout with its rewards; that a reward does not apply to one row is no failure here.

    Raises:
        RewardError: a function fails.
    """
    from alignlab.errors import RewardError
    from alignlab.training.reward_runner import RewardRunner

    runner = RewardRunner(rewards, limits.model_copy(update={"max_failures": len(rewards)}))
    try:
        [scored] = runner.score([rollout])
    finally:
        runner.close()
    wrong = [f"{name} ({kind})" for name, kind in runner.failures if kind != "only None"]
    if wrong:
        raise RewardError(f"rewards failed on the first row: {', '.join(wrong)}; see the warnings above")
    return scored


def value_of_own_answer(reward: LoadedReward, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """What a reward gives to the row's own answer; None where the row has none, or the reward does not apply."""
    from alignlab.config.rewards import RewardLimits

    if "answer" not in prompt.columns:
        return None
    rollout = sample_rollout(prompt, [str(prompt.columns["answer"])], tokenizer)
    return score_once([reward], RewardLimits(), rollout).reward_parts[reward.name][0]


def sample_rollout(prompt: Prompt, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """A rollout that says `texts`, as an engine would return it."""
    from alignlab.types import Completion, Rollout

    completions = []
    for text in texts:
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        zeros = (0.0,) * len(ids)
        completions.append(Completion(ids, text, zeros, zeros, "stop", (0,) * len(ids)))
    return Rollout(prompt, tuple(completions))


def trainer_line(trainer: TrainerConfig) -> str:
    """What would be run."""
    common = f"{trainer.num_steps} steps, learning rate {trainer.learning_rate:g}, into {trainer.output_dir}"
    return f"{trainer.method}: {common}; {trainer.step}"


def rate_notes(config: RunConfig) -> Iterator[str]:
    """A learning rate that is allowed and unusual."""
    from alignlab.config.trainers import stages_of

    for rate in dict.fromkeys(stage.learning_rate for stage in stages_of(config.trainer)):
        if config.model.lora and rate < LOW_LORA_RATE:
            yield f"learning rate {rate:g} is low for LoRA, which takes about ten times that of full fine-tuning"
        if config.model.name and not config.model.lora and rate >= HIGH_FULL_RATE:
            yield f"learning rate {rate:g} is high for all weights of a trained model; 1e-6 to 1e-5 is usual"


def notes(config: RunConfig, prompts: PromptDataset, eval_prompts: PromptDataset | None) -> Iterator[str]:
    """What is allowed and worth knowing before a run."""
    from alignlab.types import message_text

    yield from rate_notes(config)
    shared = {message_text(p.text) for p in prompts} & {message_text(p.text) for p in eval_prompts or ()}
    if shared:
        yield f"{len(shared)} evaluation prompts are also trained on, so their accuracy shows memory, not skill"
    if config.trainer.output_dir.exists() and any(config.trainer.output_dir.iterdir()):
        yield f"{config.trainer.output_dir} holds a run: use --resume, or another trainer.output_dir"
