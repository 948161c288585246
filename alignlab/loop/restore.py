"""Going on from a run's newest checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignlab.errors import CheckpointError
from alignlab.evaluation.results import evaluation_from_json
from alignlab.runs.checkpoint import Checkpoint, load_latest, remove_old
from alignlab.runs.folder import RunFolder
from alignlab.runs.random_state import restore_random_state, seed_anew

if TYPE_CHECKING:
    from alignlab.loop.training_loop import TrainingLoop


def restore_newest(loop: TrainingLoop, folder: RunFolder) -> Checkpoint | None:
    """Restore the newest checkpoint of a run, and return it; None where the run stopped before its first.

    Every rank calls this together.

    Raises:
        CheckpointError: the checkpoint is damaged, another trainer's, or of a run with other settings or data.
        RankError: on the other ranks.
    """
    with loop.agreed("reading the newest checkpoint"):
        checkpoint = load_latest(
            folder.checkpoints, rank=loop.ranks.index, world_size=loop.ranks.count, run_id=folder.run_id
        )
        folder.check_newest(None if checkpoint is None else checkpoint.step)
        if checkpoint is not None:
            _restore_learners(loop, checkpoint)
            if loop.is_main:  # a power cut may have undone a removal
                remove_old(folder.checkpoints, loop.config.checkpoints.keep, loop.evaluations.stopping.kept_steps)
    if checkpoint is not None:
        loop.load_state(checkpoint.state["loop"])
        _restore_random_state(loop, checkpoint)
    return checkpoint


def _restore_random_state(loop: TrainingLoop, checkpoint: Checkpoint) -> None:
    """Restore this rank's generators; on another number of ranks than before, seed them anew and say what differs."""
    if checkpoint.random is not None:
        restore_random_state(checkpoint.random)
        return
    seed_anew(f"{loop.config.seed}/{checkpoint.step}/{loop.ranks.index}")
    before, now = checkpoint.num_ranks, loop.ranks.count
    loop.identity.record(
        checkpoint.step,
        f"the number of ranks was {before} and is {now}: weights, optimizer and position in the data go on exactly; "
        f"{loop.drawn_by_rank}, and sums over ranks are rounded otherwise",
        log=loop.is_main,
    )


def _restore_learners(loop: TrainingLoop, checkpoint: Checkpoint) -> None:
    """Restore all that one rank can restore without the others."""
    state = checkpoint.state
    if state["trainer"] != type(loop).__name__:
        raise CheckpointError(
            f"{checkpoint.path} was written by {state['trainer']}, not {type(loop).__name__}; "
            "resume with the configuration it was started with"
        )
    loop.identity.check(state.get("identity"), path=checkpoint.path, step=checkpoint.step, log=loop.is_main)
    loop.step, loop.train_seconds = checkpoint.step, state["train_seconds"]
    loop.before = state["before"] and evaluation_from_json(state["before"])
    loop.evaluations.is_due = state["evaluation_due"]
    loop.signal.load_state(state["signal"])
    loop.evaluations.stopping.load_state(state.get("early_stopping"))  # not in earlier checkpoints
    for role, learner in loop.learners.items():
        groups = {name.removeprefix(role): t for name, t in checkpoint.tensors.items() if name.startswith(role)}
        learner.load(groups, state["learners"][role])
