"""Checkpoints: safetensors and JSON, complete or absent, verified by digest when they are read.

    checkpoints/step-00000020/
        manifest.json            the run, the step, the number of ranks, and the digest of every other file; see
                                 `alignlab.files.manifest`
        state.json               the caller's `state`
        <name>.safetensors       one for each name in `tensors`, such as model and optimizer; or one for each rank,
                                 see `alignlab.runs.tensor_groups`
        random-<rank>.safetensors, random-<rank>.json

A checkpoint is written into a hidden temporary folder, synced to the disk and renamed: a folder that has the name of a
checkpoint is complete. Older ones are removed only after that. A folder whose name is not exactly that of a checkpoint,
such as a copy with another ending, is left alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alignlab.errors import CheckpointError
from alignlab.files.atomic_files import (
    REMOVED,
    TEMPORARY,
    hidden_name,
    make_folder,
    publish_folder,
    remove,
    remove_folder,
)
from alignlab.files.library_errors import writing
from alignlab.files.manifest import find_damage, read_manifest, write_manifest
from alignlab.files.tensor_files import write_tensors
from alignlab.models.exact_weights import is_exact
from alignlab.models.pieces import whole_shape
from alignlab.runs.checkpoint_parts import take_parts
from alignlab.runs.random_state import RandomState, random_state
from alignlab.runs.tensor_groups import load_held, read_groups, shape_of

MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step-"
STEP = "step"
"""Name of an optimizer's count of steps in its state."""
MASTER = "master"
"""Key of a weight's float32 copy in the optimizer's state; see `loop.master_weights`."""
NAME = re.compile(rf"{PREFIX}(\d{{8}})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: the checkpoint's folder.
        step: number of optimizer steps that were complete when it was written.
        tensors: by the name of their group, then by their own; read from the disk when they are asked for.
        state: the `state` that it was saved with.
        num_ranks: of the run that saved it.
        random: state of this rank's random generators, for `restore_random_state`; None for a rank of another number
            of ranks, of which there is none.
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    num_ranks: int
    random: RandomState | None


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    random: Sequence[RandomState] | None = None,
    run_id: str | None = None,
    parts: Sequence[Path] = (),
    kept_steps: Collection[int] = (),
) -> Path:
    """Write the checkpoint of a step, on one rank alone, and return its folder.

    Args:
        folder: the folder of all checkpoints of the run.
        step: number of complete optimizer steps. A step that this run has saved already is not written again.
        tensors: tensors by the name of their file, then by their own name.
        state: anything that JSON holds exactly.
        keep: number of checkpoints to keep, >= 1; older ones are removed once this one is complete.
        random: state of the random generators of each rank; default: of this process, as the only rank.
        run_id: id of the run, see `RunFolder`.
        parts: of other tensors, one for each rank; see `checkpoint_parts`.
        kept_steps: steps whose checkpoints stay, beside the newest `keep`.

    Raises:
        DiskError: the checkpoint cannot be written; earlier ones stay.
    """
    assert keep >= 1, keep
    random = [random_state()] if random is None else random
    final = checkpoint_path(folder, step)
    if final.exists():
        if _is_of(final, run_id):
            return final
        remove_folder(final)
    with writing(final, "the checkpoint"):
        temporary = hidden_name(final, TEMPORARY)
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(folder)
        temporary.mkdir()
        for rank, generators in enumerate(random):
            write_tensors(generators.tensors, temporary / f"random-{rank}.safetensors")
            _write_json(temporary / f"random-{rank}.json", generators.state)
        for name, group in tensors.items():
            write_tensors(group, temporary / f"{name}.safetensors")
        take_parts(list(parts), temporary)
        _write_json(temporary / STATE, state)
        write_manifest(temporary, run_id=run_id, name=MANIFEST, entries={"step": step, "world_size": len(random)})
        publish_folder(temporary, final)
        remove_old(folder, keep, kept_steps)
    return final


def load_latest(
    folder: Path, *, rank: int = 0, world_size: int = 1, run_id: str | None = None
) -> Checkpoint | None:
    """Return the newest checkpoint in a folder, verified; None if there is none.

    Args:
        rank: of this process.
        world_size: number of ranks of the run that resumes.
        run_id: id of the run that resumes, see `RunFolder`.

    Raises:
        CheckpointError: the checkpoint is damaged, of another step than its name says or of another run (the message
            names the newest intact one).
    """
    folders = checkpoint_folders(folder)
    if not folders:
        return None
    newest = folders[-1]
    problem = find_problem(newest, run_id)
    if problem is not None:
        intact = next((path for path in reversed(folders[:-1]) if find_problem(path, run_id) is None), None)
        raise CheckpointError(
            f"{problem}; remove the folder {newest} to resume from {intact}, which is intact"
            if intact
            else f"{problem}; put it back as it was, or start again in another trainer.output_dir: no other checkpoint "
            "is intact"
        )
    manifest = read_manifest(newest, MANIFEST)
    return Checkpoint(
        path=newest,
        step=manifest["step"],
        tensors=_tensors_of(newest),
        state=json.loads((newest / STATE).read_text()),
        num_ranks=manifest["world_size"],
        random=_random_state(newest, rank) if manifest["world_size"] == world_size else None,
    )


def load_step(folder: Path, step: int, *, run_id: str | None) -> Mapping[str, Mapping[str, Tensor]]:
    """Return the tensors of the checkpoint of a step, verified; see `Checkpoint.tensors`.

    Raises:
        CheckpointError: it is gone, damaged, or of another run.
    """
    path = checkpoint_path(folder, step)
    problem = find_problem(path, run_id) if path.exists() else f"{path} is gone"
    if problem is not None:
        raise CheckpointError(f"{problem}; put it back as it was")
    return _tensors_of(path)


def _tensors_of(checkpoint: Path) -> Mapping[str, Mapping[str, Tensor]]:
    files = read_manifest(checkpoint, MANIFEST)["files"]
    names = [name for name in files if name.endswith(".safetensors") and not name.startswith("random-")]
    return read_groups(checkpoint, names)


def _random_state(checkpoint: Path, rank: int) -> RandomState:
    """Return the state of a rank's random generators."""
    state = json.loads((checkpoint / f"random-{rank}.json").read_text())
    return RandomState(load_file(checkpoint / f"random-{rank}.safetensors"), state)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return folder / f"{PREFIX}{step:08d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders of the complete checkpoints in a folder, oldest first."""
    # Of a folder without permission to read, `glob` says that it is empty; `iterdir` raises an error.
    paths = folder.iterdir() if folder.exists() else ()
    return sorted(path for path in paths if NAME.fullmatch(path.name) and path.is_dir())


def remove_old(folder: Path, keep: int, kept_steps: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints, and leftovers of an interrupted save or removal.

    Args:
        folder: the folder of all checkpoints of the run.
        keep: >= 1.
        kept_steps: steps whose checkpoints stay too.
    """
    kept = {checkpoint_path(folder, step) for step in kept_steps}
    for path in checkpoint_folders(folder)[:-keep]:
        if path not in kept:
            remove_folder(path)
    for kind in (TEMPORARY, REMOVED):
        for path in folder.glob(f".{PREFIX}*.{kind}"):
            remove(path)


def find_problem(checkpoint: Path, run_id: str | None) -> str | None:
    """Return why a run cannot resume from a checkpoint; None if files, step and run are as they must be."""
    damage = find_damage(checkpoint, MANIFEST)
    if damage is not None:
        return damage
    manifest, named = read_manifest(checkpoint, MANIFEST), NAME.fullmatch(checkpoint.name)
    if named is None or manifest.get("step") != int(named[1]):
        return f"{checkpoint} holds the checkpoint of step {manifest.get('step')}: it was renamed, or is a copy"
    if manifest["run"] != run_id:
        return f"{checkpoint} is of another run ({manifest['run']}) than the one that resumes ({run_id})"
    return None


def _is_of(checkpoint: Path, run_id: str | None) -> bool:
    """Return True if this run wrote the checkpoint of this name, by its manifest; its files are not verified."""
    try:
        manifest = read_manifest(checkpoint, MANIFEST)
    except ValueError:
        return False
    return manifest["run"] == run_id and checkpoint.name == f"{PREFIX}{manifest.get('step', -1):08d}"


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """Return an optimizer's state as tensors named `exp_avg.<parameter>`, `exp_avg_sq.<parameter>` and so on."""
    tensors = {}
    for name, parameter in dict(names).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
        if parameter in optimizer.state and is_exact(parameter):  # the optimizer's copy, elsewhere
            tensors[f"{MASTER}.{name}"] = parameter.detach()
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Restore the state of an optimizer from `optimizer_tensors`; parameters without an entry get an empty state.

    Raises:
        CheckpointError: an entry belongs to no parameter, or has another shape than its parameter.
    """
    fused = {parameter: bool(group.get("fused")) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for name, parameter in dict(names).items() if parameter in fused}
    check_optimizer_tensors(parameters, tensors)
    optimizer.state.clear()
    for entry in tensors:
        key, _, name = entry.partition(".")
        parameter = parameters[name]
        if key == STEP:
            # A step count stays on the CPU, as in a new optimizer, unless the kernel is fused.
            device = parameter.device if fused[parameter] else torch.device("cpu")
            optimizer.state[parameter][key] = tensors[entry].to(device, copy=True)
            continue
        if key == MASTER and is_exact(parameter):
            load_held(tensors, entry, parameter)
            continue
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        state = optimizer.state[parameter][key] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        load_held(tensors, entry, state)


def check_optimizer_tensors(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Raise if an optimizer's state from a checkpoint is not of these parameters.

    Raises:
        CheckpointError: an entry belongs to no parameter, or has another shape than its parameter.
    """
    for entry in tensors:
        key, _, name = entry.partition(".")
        if name not in parameters:
            raise CheckpointError(
                f"the optimizer's state in a checkpoint must belong to trained parameters, and {name} is none; "
                "resume with the model and LoRA settings that the run was started with"
            )
        shape, expected = shape_of(tensors, entry), whole_shape(parameters[name])
        if key != STEP and shape != expected:
            raise CheckpointError(
                f"{entry} in the checkpoint has shape {tuple(shape)} and its parameter {tuple(expected)}; "
                "resume with the model and LoRA settings that the run was started with"
            )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
