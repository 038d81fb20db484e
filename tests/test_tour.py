"""Tests that the notebooks of docs/tour were executed, are small, and use names that exist.

.ci/run executes them.
"""

import ast
import itertools
import json
import pkgutil
import re
import types

import pytest

from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs" / "tour").glob("*.ipynb"))
MAX_BYTES = 400_000  # git keeps every version of every picture


def cells(path, kind):
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(path, kind):
    text = "\n".join("".join(cell["source"]) for cell in cells(path, kind))
    return re.sub(r"^%.*", "", text, flags=re.MULTILINE)  # magics are no Python


def test_the_tour_is_complete():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_was_executed_in_order(self, path):
        counts = [cell["execution_count"] for cell in cells(path, "code")]
        assert counts == list(range(1, len(counts) + 1))

    def test_outputs_are_small_and_the_same_everywhere(self, path):
        assert path.stat().st_size < MAX_BYTES
        for output in itertools.chain(*(cell["outputs"] for cell in cells(path, "code"))):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output["text"]  # warnings and progress
            text = "".join([*output.get("text", []), *output.get("data", {}).get("text/plain", [])])
            # Folders of the machine that it ran on, and addresses of objects.
            assert not re.search(r"/(tmp|home|root|Users)/|0x[0-9a-f]{8}", text)

    def test_names_of_the_library_exist(self, path):
        nodes = list(ast.walk(ast.parse(source(path, "code"))))
        imported = {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("dense_jax"):
                for alias in node.names:
                    imported[alias.name] = pkgutil.resolve_name(f"{node.module}.{alias.name}")
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = imported.get(node.value.id)
                assert not isinstance(owner, types.ModuleType) or hasattr(owner, node.attr)

    def test_links_lead_somewhere(self, path):
        for target in re.findall(r"\]\(([^)#:]+)\)", source(path, "markdown")):
            assert (path.parent / target).exists(), target
