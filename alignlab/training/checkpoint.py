"""Checkpoints: safetensors and JSON, complete or absent, verified by digest when they are read.

    checkpoints/step-00000020/
        manifest.json            the run, the step, the number of ranks, and the digest of every other file; see
                                 `alignlab.manifest`
        state.json               what the caller's `state` said
        <name>.safetensors       one a name in `tensors`, such as model and optimizer
        random-<rank>.safetensors, random-<rank>.json

A checkpoint is written into a hidden temporary folder, synced to the disk and renamed: a folder that has the name of a
checkpoint is complete. Older ones are removed only after that. A folder whose name is not exactly that of a checkpoint,
such as a copy with another ending, is nobody's and is left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.atomic_files import REMOVED, TEMPORARY, hidden_name, make_folder, publish_folder, remove_folder
from alignlab.digests import digest_of_values
from alignlab.errors import CheckpointError
from alignlab.library_errors import writing
from alignlab.manifest import find_damage, read_manifest, write_manifest
from alignlab.models.computed import model_settings
from alignlab.training.random_state import RandomState, random_state

MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step-"
NAME = re.compile(rf"{PREFIX}(\d{{8}})")
FINGERPRINT_VALUES = 16
"""Of each tensor: enough to tell two models apart, few enough for models of any size."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        step: the step that was complete when it was written.
        tensors: by the caller's names, by tensor name.
        state: the caller's JSON.
        random: the generators of this rank, for `restore_random_state`.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    random: RandomState


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    random: Sequence[RandomState] | None = None,
    run_id: str | None = None,
) -> Path:
    """Write the checkpoint of a step; one rank alone calls it.

    Args:
        folder: holds the run's checkpoints.
        step: that is complete. A step that this run has saved already is left as it is.
        tensors: by name of file, by name of tensor.
        state: anything that JSON holds exactly.
        keep: how many checkpoints stay, >= 1; older ones go once this one is complete.
        random: the generators of each rank; default: of this process, as the only rank.
        run_id: of the run, see `RunFolder`.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskError: the disk, a limit or a permission; earlier checkpoints stay.
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
            _write_tensors(temporary / f"random-{rank}.safetensors", generators.tensors)
            _write_json(temporary / f"random-{rank}.json", generators.state)
        for name, group in tensors.items():
            _write_tensors(temporary / f"{name}.safetensors", group)
        _write_json(temporary / STATE, state)
        write_manifest(temporary, run_id=run_id, name=MANIFEST, entries={"step": step, "world_size": len(random)})
        publish_folder(temporary, final)
        _remove_old(folder, keep)
    return final


def load_latest(
    folder: Path, *, rank: int = 0, world_size: int = 1, run_id: str | None = None
) -> Checkpoint | None:
    """The newest checkpoint in a folder, verified; None where there is none.

    Args:
        run_id: of the run that goes on, see `RunFolder`.

    Raises:
        CheckpointError: it is damaged, of another step than its name says or of another run (the message names the
            newest intact one), or of another number of ranks.
    """
    found = checkpoint_folders(folder)
    if not found:
        return None
    newest = found[-1]
    problem = find_problem(newest, run_id)
    if problem is not None:
        intact = next((path for path in reversed(found[:-1]) if find_problem(path, run_id) is None), None)
        raise CheckpointError(
            f"{problem}; remove the folder {newest} to resume from {intact}, which is intact"
            if intact
            else f"{problem}; put it back as it was, or start again in another trainer.output_dir: no other checkpoint "
            "is intact"
        )
    manifest = read_manifest(newest, MANIFEST)
    if manifest["world_size"] != world_size:
        raise CheckpointError(
            f"a run resumes on as many ranks as it was saved on, {newest} was saved on {manifest['world_size']} and "
            f"this run has {world_size}; start it with {manifest['world_size']}"
        )
    names = [Path(name).stem for name in manifest["files"] if name.endswith(".safetensors")]
    return Checkpoint(
        path=newest,
        step=manifest["step"],
        tensors={name: load_file(newest / f"{name}.safetensors") for name in names if not name.startswith("random-")},
        state=json.loads((newest / STATE).read_text()),
        random=RandomState(
            load_file(newest / f"random-{rank}.safetensors"), json.loads((newest / f"random-{rank}.json").read_text())
        ),
    )


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"{PREFIX}{step:08d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if NAME.fullmatch(path.name) and path.is_dir())


def find_problem(checkpoint: Path, run_id: str | None) -> str | None:
    """Return why a run cannot go on from a checkpoint's folder; None if it is whole, of its name's step and this run's.
    """
    damage = find_damage(checkpoint, MANIFEST)
    if damage is not None:
        return damage
    manifest, named = read_manifest(checkpoint, MANIFEST), NAME.fullmatch(checkpoint.name)
    if named is None or manifest.get("step") != int(named[1]):
        return f"{checkpoint} holds the checkpoint of step {manifest.get('step')}: it was renamed, or is a copy"
    if manifest["run"] != run_id:
        return f"{checkpoint} is of another run ({manifest['run']}) than the one that goes on ({run_id})"
    return None


def _is_of(checkpoint: Path, run_id: str | None) -> bool:
    """Whether a checkpoint's folder is what this run wrote under its name, as far as its manifest says."""
    try:
        manifest = read_manifest(checkpoint, MANIFEST)
    except ValueError:
        return False
    return manifest["run"] == run_id and checkpoint.name == f"{PREFIX}{manifest.get('step', -1):08d}"


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """An optimizer's state by parameter name: `exp_avg.<name>`, `exp_avg_sq.<name>`, `step.<name>`."""
    tensors = {}
    for name, parameter in dict(names).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` gave. Parameters without an entry start without a state, as at first.

    Raises:
        CheckpointError: an entry belongs to no parameter, or has another shape than its parameter.
    """
    parameters = dict(names)
    fused = {parameter: bool(group.get("fused")) for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for entry, value in tensors.items():
        key, _, name = entry.partition(".")
        parameter = parameters.get(name)
        if parameter is None or parameter not in fused:
            raise CheckpointError(
                f"the optimizer's state in a checkpoint must belong to trained parameters, and {name} is none; "
                "resume with the model and LoRA settings that the run was started with"
            )
        if key != "step" and value.shape != parameter.shape:
            raise CheckpointError(
                f"{entry} in the checkpoint has shape {tuple(value.shape)} and its parameter {tuple(parameter.shape)}; "
                "resume with the model and LoRA settings that the run was started with"
            )
        on_host = key == "step" and not fused[parameter]
        device = torch.device("cpu") if on_host else parameter.device
        optimizer.state[parameter][key] = value.to(device, copy=True)


@torch.no_grad()
def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, shapes, dtypes and a few values of each tensor: tells other weights, not a flipped bit."""
    digest = hashlib.sha256()
    for name, tensor in parameters:
        stride = max(1, tensor.numel() // FINGERPRINT_VALUES)
        values = tensor.detach().flatten()[::stride][:FINGERPRINT_VALUES].double().tolist()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype), values]).encode())
    return digest.hexdigest()


def fingerprint_of_model(model: nn.Module) -> str:
    """Digest of the fingerprint of a language model's weights and of the fields of its config that count."""
    return digest_of_values([fingerprint(model.named_parameters()), model_settings(model)])


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(_unshared(tensors), path)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, no two in one storage: what safetensors asks for (tied weights are written twice)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return result


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted save or removal left."""
    for path in checkpoint_folders(folder)[:-keep]:
        remove_folder(path)
    for kind in (TEMPORARY, REMOVED):
        for path in folder.glob(f".{PREFIX}*.{kind}"):
            shutil.rmtree(path)
