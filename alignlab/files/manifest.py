"""The manifest of a folder: size and SHA-256 of each file in it, and the run that made it.

    {"format": 3, "run": "5f0c...", "files": {"config.json": {"bytes": 731, "sha256": "..."}, ...}, "sha256": "..."}

The last `sha256` is of the manifest itself, which is written last: a folder with a manifest is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from alignlab.files.digests import json_digest, sha256_of_file

MODEL_MANIFEST = "alignlab-manifest.json"
"""Name of the manifest of a model, an adapter or a reward model."""
FORMAT = 3


def write_manifest(
    folder: Path, *, run_id: str | None = None, name: str = MODEL_MANIFEST, entries: Mapping[str, Any] | None = None
) -> None:
    """Write the manifest of all files that a folder holds now.

    Args:
        run_id: id of the run that made the files; None if no run did, such as for a merged model.
        name: name of the manifest's file.
        entries: further entries of the manifest.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / name)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in paths
    }
    manifest = {"format": FORMAT, "run": run_id, **(entries or {}), "files": files}
    text = json.dumps(manifest | {"sha256": json_digest(manifest)}, indent=1) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def has_manifest(folder: Path, name: str = MODEL_MANIFEST) -> bool:
    """Return True if a folder has a manifest; folders of other programs have none."""
    return (folder / name).is_file()


def read_manifest(folder: Path, name: str = MODEL_MANIFEST) -> dict[str, Any]:
    """Return the entries of a folder's manifest after verifying the manifest, but not the files in it.

    Raises:
        ValueError: the manifest cannot be read, is of another format or is damaged; the message names its file.
        PermissionError: it may not be read, which is no damage.
    """
    file = folder / name
    try:
        manifest = dict(json.loads(file.read_bytes()))
        files = dict(manifest["files"])
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} has format {manifest.get('format')}, and this version reads {FORMAT}")
    if manifest.pop("sha256", None) != json_digest(manifest):
        raise ValueError(f"{file} is damaged: its SHA-256 is not the one it was written with")
    for inside, written in files.items():
        path = PurePosixPath(inside)
        whole = isinstance(written, dict) and set(written) == {"bytes", "sha256"}
        if path.is_absolute() or ".." in path.parts or not whole:
            raise ValueError(f"{file} has an entry that no version writes: {inside}")
    return manifest


def find_damage(folder: Path, name: str = MODEL_MANIFEST) -> str | None:
    """Return a description of the first damage to a folder's manifest or a file in it; None if there is none.

    Files that are not in the manifest are not verified.
    """
    try:
        files = read_manifest(folder, name)["files"]
    except ValueError as error:
        return str(error)
    return next((damage for inside, written in files.items() if (damage := _damage(folder / inside, written))), None)


def _damage(path: Path, written: Mapping[str, Any]) -> str | None:
    """Return a description of the damage to a file; None if there is none."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != written["bytes"]:
        return f"{path} has {path.stat().st_size} bytes and was written with {written['bytes']}"
    if sha256_of_file(path) != written["sha256"]:
        return f"{path} is damaged: its SHA-256 is not the one it was written with"
    return None
