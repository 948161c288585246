import ast
from importlib.metadata import entry_points
from pathlib import Path

import alignlab_rewards
import pytest

FILES = sorted(
    path for folder in alignlab_rewards.__path__ for path in Path(folder).glob("*.py") if path.stem != "__init__"
)


def test_every_file_is_an_installed_plug_in_of_its_own_name() -> None:
    installed = {entry.name: entry.value for entry in entry_points(group="alignlab.rewards")}
    assert FILES
    for path in FILES:
        assert installed[path.stem] == f"alignlab_rewards.{path.stem}:{path.stem}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_plug_in_imports_nothing_of_alignlab_but_its_types(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert {name for name in imported if name.split(".")[0] == "alignlab"} <= {"alignlab.types"}
