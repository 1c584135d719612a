"""Importing `data` costs little: a parameter is checked, or a path computed, without the libraries that read."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "prefect", "PIL", "pandas", "datasets", "huggingface_hub", "safetensors", "jinja2"}
MODULES = sorted(path.stem for path in (ROOT / "data").glob("[!_]*.py"))
READERS = ("captioned", "cells", "files", "hub", "human", "ids", "labelled", "pictures", "prompts", "safetensors_file")


def loaded(modules: tuple[str, ...], heavy: set[str]) -> str:
    imports = ", ".join(f"data.{module}" for module in modules)
    code = f"import sys, {imports}; print(sorted({heavy} & sys.modules.keys()))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [(tuple(MODULES), HEAVY), ((*READERS, "tables"), HEAVY | {"pyarrow"})],
    ids=["everything", "readers"],
)
def test_importing_loads_no_heavy_module(modules: tuple[str, ...], heavy: set[str]) -> None:
    assert loaded(modules, heavy) == "[]\n"
