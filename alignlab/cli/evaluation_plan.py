"""The problems and settings of an evaluation: of a run's config, or of a reasoning_gym task."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from alignlab.cli.policy import sampling_settings
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from alignlab.config.data import DataSettings
    from alignlab.config.rewards import RewardSettings
    from alignlab.config.rollout import EngineSettings, SamplingSettings
    from alignlab.config.run import EvaluationSettings, RunConfig


class Plan(NamedTuple):
    """The problems of an evaluation, and its settings."""

    data: DataSettings
    scorer: RewardSettings
    sampling: SamplingSettings
    rollout: EngineSettings
    evaluation: EvaluationSettings
    seed: int

    @property
    def task(self) -> str:
        """Name of the problems."""
        return self.data.task or str(self.data.path)


def plan_of_config(config: RunConfig, args: argparse.Namespace) -> Plan:
    """Return the evaluation of a run's config, with the command line's changes."""
    from alignlab.config.rollout import RolloutSettings, SamplingSettings

    refuse_preferences(config, args.config)
    data = config.evaluation_data
    if data is None:
        raise ConfigError(f"{args.config} has no evaluation data; set eval_data, or use --set eval_data.path=FILE")
    if config.scorer is None:
        raise ConfigError(f"{args.config} has nothing that scores; use --set evaluation.scorer=NAME")
    online = config.online_stage
    rollout = online.rollout if online else RolloutSettings()
    base = online.sampling.model_copy(update={"temperature": 1.0}) if online else SamplingSettings()
    sampling = sampling_settings(args, **dict(config.evaluation.sampled or base))
    seed = config.trainer.seed if args.seed is None else args.seed
    return Plan(data, config.scorer, sampling, rollout, _changed(config.evaluation, args), seed)


def refuse_preferences(config: RunConfig, path: str) -> None:
    """Raise if a config's data are preferences, to which no answer is correct or wrong.

    Raises:
        ConfigError: with what to use instead.
    """
    if config.trainer.measures != "preferences":
        return
    task = config.data.task or "NAME"
    raise ConfigError(
        f"{path} is of trainer {config.trainer.type}, whose held-out data are preferences, and eval counts correct "
        "answers; alignlab train measures how often the chosen completion leads, before and after, and writes it into "
        f"{config.trainer.output_dir / 'report.json'}. To count correct answers, use --task {task}, or --config "
        "of a run with rewards"
    )


def plan_of_task(args: argparse.Namespace) -> Plan:
    """Return the evaluation of a reasoning_gym task, on the questions that training never sees."""
    from alignlab.config.data import DataSettings
    from alignlab.config.rewards import RewardSettings
    from alignlab.config.rollout import RolloutSettings
    from alignlab.config.run import EvaluationSettings

    if args.set:
        raise ConfigError(f"--set changes a config's settings, and there is no --config; remove --set {args.set[0]}")
    data = DataSettings(task=args.task, split="eval", size=args.num_problems, system_prompt=args.system_prompt)
    scorer = RewardSettings(name="reasoning_gym_answer", options={"extract": args.extract} if args.extract else {})
    evaluation = _changed(EvaluationSettings(), args)
    return Plan(data, scorer, sampling_settings(args), RolloutSettings(), evaluation, args.seed or 0)


def _changed(evaluation: EvaluationSettings, args: argparse.Namespace) -> EvaluationSettings:
    """Return the settings with --num-problems, --num-samples and --pass-at, validated again."""
    flags = {"num_problems": args.num_problems, "num_samples": args.num_samples, "pass_at": args.pass_at}
    changes: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    return type(evaluation)(**{**dict(evaluation), **changes})
