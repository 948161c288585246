"""Checkpoints: safetensors and JSON, complete or absent, verified by digest when they are read.

    checkpoints/step-00000020/
        manifest.json            step, number of ranks, size and SHA-256 of every other file, and its own SHA-256
        state.json               what the caller's `state` said
        <name>.safetensors       one a name in `tensors`, such as model and optimizer
        random-<rank>.safetensors, random-<rank>.json

A checkpoint is written into a hidden temporary folder, synced to the disk and renamed: a folder that has the name of a
checkpoint is complete. Older ones are removed only after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.errors import CheckpointError
from alignlab.training.files import sha256_of, sync_file
from alignlab.training.random_state import RandomState, random_state

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step-"
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


def _no_barrier() -> None:
    """The barrier of a single rank."""


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = _no_barrier,
) -> Path:
    """Write the checkpoint of a step; every rank calls it, each adds the state of its own random generators.

    Args:
        folder: holds the run's checkpoints.
        step: that is complete. A step that is saved already is left as it is.
        tensors: by name of file, by name of tensor; read on rank 0 only.
        state: anything that JSON holds exactly; read on rank 0 only.
        keep: how many checkpoints stay, >= 1; older ones go once this one is complete.
        barrier: returns when all ranks have called it.

    Returns:
        The checkpoint's folder.
    """
    assert keep >= 1, keep
    random = random_state()
    final = folder / f"{PREFIX}{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if final.exists():
        return final
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    _write_tensors(temporary / f"random-{rank}.safetensors", random.tensors)
    _write_json(temporary / f"random-{rank}.json", random.state)
    if rank == 0:
        for name, group in tensors.items():
            _write_tensors(temporary / f"{name}.safetensors", group)
        _write_json(temporary / STATE, state)
    barrier()
    if rank == 0:
        _complete(temporary, final, step=step, world_size=world_size)
        _remove_old(folder, keep)
    barrier()
    return final


def load_latest(folder: Path, *, rank: int = 0, world_size: int = 1) -> Checkpoint | None:
    """The newest checkpoint in a folder, verified; None where there is none.

    Raises:
        CheckpointError: it is damaged (the message names the newest intact one), or of another number of ranks.
    """
    found = checkpoint_folders(folder)
    if not found:
        return None
    newest = found[-1]
    damage = find_damage(newest)
    if damage is not None:
        intact = next((path for path in reversed(found[:-1]) if find_damage(path) is None), None)
        way_on = f"resume from {intact}, which is intact" if intact else "start again: no other checkpoint is intact"
        raise CheckpointError(f"{damage}; remove the folder {newest} to {way_on}")
    manifest = json.loads((newest / MANIFEST).read_text())
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


def checkpoint_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if every one is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{checkpoint / MANIFEST} cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"{checkpoint / MANIFEST} has format {manifest.get('format')}, and this version reads {FORMAT}"
    if manifest.pop("sha256", None) != _digest(manifest):
        return f"{checkpoint / MANIFEST} is damaged: its SHA-256 is not the one it was written with"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size} bytes and was written with {expected['bytes']}"
        if sha256_of(path) != expected["sha256"]:
            return f"{path} is damaged: its SHA-256 is not the one it was written with"
    return None


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


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _complete(temporary: Path, final: Path, *, step: int, world_size: int) -> None:
    """Write the manifest, wait for the disk, and give the folder its name."""
    paths = sorted(temporary.iterdir())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": files}
    _write_json(temporary / MANIFEST, manifest | {"sha256": _digest(manifest)})
    for path in [*paths, temporary / MANIFEST, temporary]:
        sync_file(path)
    os.replace(temporary, final)
    sync_file(final.parent)


def _remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted save left."""
    for path in checkpoint_folders(folder)[:-keep]:
        # Renamed first: a removal that is cut short must not leave half a checkpoint under a checkpoint's name.
        hidden = path.with_name(f".{path.name}.removed")
        os.replace(path, hidden)
        shutil.rmtree(hidden)
    for pattern in (f".{PREFIX}*.tmp", f".{PREFIX}*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
