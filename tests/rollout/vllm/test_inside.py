"""Code that vLLM loads into its processes imports nothing of the trainer's side."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INSIDE = ROOT / "alignlab" / "rollout" / "vllm" / "inside"
SHARED = {
    "alignlab.errors",
    "alignlab.files.digests",
    "alignlab.files.library_errors",
    "alignlab.files.private_folders",
    "alignlab.files.tensor_files",
    "alignlab.network.credentials",
    "alignlab.models.config",
    "alignlab.models.hub.checkpoints",
    "alignlab.models.served_attention",
    "alignlab.models.sync_digests",
    "alignlab.models.transformer",
    "alignlab.rollout.vllm.packed_weights",
    "alignlab.rollout.vllm.protocol",
    "alignlab.rollout.vllm.serialization",
    "alignlab.rollout.vllm.weight_group",
}
SHARED_FILES = [ROOT / f"{name.replace('.', '/')}.py" for name in SHARED if ".rollout." in name]


def imported_files(path: Path) -> set[str]:
    """Return the full names of alignlab's modules that a file imports, outside `inside`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            are_files = {name for name in submodules if (ROOT / f"{name.replace('.', '/')}.py").is_file()}
            names |= are_files or {str(node.module)}
    return {name for name in names if name.startswith("alignlab") and ".vllm.inside" not in name}


@pytest.mark.parametrize("path", sorted([*INSIDE.glob("*.py"), *SHARED_FILES]), ids=lambda path: path.stem)
def test_code_inside_vllm_imports_only_shared_modules(path: Path) -> None:
    assert imported_files(path) <= SHARED
