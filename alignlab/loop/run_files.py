"""Files of a training: the run's folder and metrics at its start, the trained model and the report at its end."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.errors import CheckpointError
from alignlab.evaluation.report import RunReport
from alignlab.files.library_errors import writing
from alignlab.loop.averaging import GROUP, average_for, whole_averages
from alignlab.loop.early_stopping import best_line
from alignlab.loop.exported_weights import replaced_weights
from alignlab.loop.result import TrainResult
from alignlab.loop.step_keeper import check_trained_weights
from alignlab.models.hub.saving import published
from alignlab.models.weight_view import WeightView
from alignlab.runs.checkpoint import Checkpoint, checkpoint_path, load_step, remove_old
from alignlab.runs.folder import RunFolder
from alignlab.runs.metrics import MetricsLogger

if TYPE_CHECKING:
    from alignlab.loop.training_loop import TrainingLoop


def enter_folder(loop: TrainingLoop, stack: ExitStack, *, resume: bool) -> RunFolder:
    """Take the run's folder for this process; `stack` gives it up. Every rank calls this together."""
    rank = loop.accelerator.process_index
    with loop.agreed("opening the run's folder"):
        folder = stack.enter_context(
            RunFolder(
                loop.config.output_dir, resume=resume, config_text=loop.run.config_text, rank=rank,
                part_of=loop.run.part_of,
            )
        )
    folder.run_id = loop.ranks.of_main(folder.run_id or "")
    return folder


def open_files(
    loop: TrainingLoop, stack: ExitStack, folder: RunFolder, checkpoint: Checkpoint | None
) -> MetricsLogger:
    """Open the metrics and the trainer's files; `stack` closes them."""
    resume_step = None if checkpoint is None else checkpoint.step
    with loop.agreed("opening the files of the run"), writing(folder.path, "the run's files"):
        logger = stack.enter_context(
            MetricsLogger(
                folder.path, loop.config.trackers, accelerator=loop.accelerator, resume_step=resume_step,
                last_step=max(loop.config.num_steps, loop.step),
                saved=None if checkpoint is None else checkpoint.state["metrics"],
                ended=None if folder.last_end is None else folder.last_end.get("metrics"),
            )
        )
        loop.open(stack, folder, resume_step)
    return logger


def save_trained_model(loop: TrainingLoop, folder: RunFolder) -> Path:
    """Write the trained adapter or model into the run's folder, and return its path; every rank calls this together.

    Of a run that has ended it is that of the step that early stopping chooses.

    Raises:
        CheckpointError: the checkpoint of that step is gone or damaged.
    """
    path = folder.adapter if loop.learner.has_adapters else folder.model
    _save_model(loop, folder, path, "saving the trained model", step=loop.model_step)
    return path


def save_model_of_step(loop: TrainingLoop, folder: RunFolder) -> None:
    """Write the present adapter or model among the run's `models`, of which as many stay as of its checkpoints.

    It is written before the checkpoint of the step, so that there is a model for each checkpoint. Every rank calls this
    together.
    """
    path = checkpoint_path(folder.models, loop.step)
    _save_model(loop, folder, path, f"saving the model of step {loop.step}")
    if loop.is_main:
        remove_old(folder.models, loop.config.checkpoints.keep, loop.evaluations.stopping.kept_steps)


def complete_models(loop: TrainingLoop, folder: RunFolder) -> None:
    """Write the model of the step that a run goes on after, unless it is there: of a step that a failing run has kept,
    rank 0 could not write it alone. Every rank calls this together."""
    if loop.ranks.any(loop.is_main and not checkpoint_path(folder.models, loop.step).exists()):
        save_model_of_step(loop, folder)


def _save_model(loop: TrainingLoop, folder: RunFolder, path: Path, work: str, *, step: int | None = None) -> None:
    """Write a model; `step` is that of its weights, by default the present one."""
    with loop.agreed(work):
        check_trained_weights(loop.learners, loop.step)
        is_present, average = step is None or step == loop.step, average_for(loop.learner, "export")
        is_gathered = is_present and average is not None and loop.learner.is_spread  # then the average is, in place
        with average.in_place() if average is not None and is_gathered else nullcontext():
            weights = loop.learner.whole_weights()
    with loop.agreed(work):
        if loop.is_main:
            folder.renew()
            if step is not None and not is_present:
                weights = _weights_of_step(loop, folder, weights, step)
            elif average is not None and not is_gathered:
                weights = replaced_weights(loop.learner.module, weights, whole_averages(average))
            with published(path, run_id=folder.run_id) as unfinished:
                loop.write_model(unfinished, view=weights)


def _weights_of_step(loop: TrainingLoop, folder: RunFolder, weights: WeightView, step: int) -> WeightView:
    """Return a view of the learner's weights with those of a checkpoint in place of what was trained."""
    try:
        tensors = load_step(folder.checkpoints, step, run_id=folder.run_id)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}, or set early_stopping.export: last, since the run's model is to be that of step {step}"
        ) from None
    average = tensors.get(GROUP, {}) if average_for(loop.learner, "export") else {}
    return replaced_weights(loop.learner.module, weights, {**tensors["policy"], **average})


def closing_report(loop: TrainingLoop, result: TrainResult) -> RunReport:
    """Return the report of a training that has ended."""
    adapters = loop.learner.has_adapters
    return RunReport(
        title=loop.run.title,
        before=result.before,
        after=result.after,
        train_seconds=result.train_seconds,
        num_steps=result.num_steps,
        adapter=result.model_path if adapters else None,
        model=None if adapters else result.model_path,
        generate_options=loop.run.generate_options,
        base_model=loop.run.base_model,
        usage_hint=loop.usage_hint(result.model_path),
        verdict=result.verdict,
        run_id=result.run_id,
        summary=loop.identity.summary | ({} if result.stopping is None else result.stopping.to_json()),
        after_step=result.model_step,
        early_stopping=None if result.stopping is None else best_line(result.stopping),
    )
