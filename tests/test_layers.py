"""Who may import whom: libraries import no sibling and no Prefect, tasks import libraries, flows import tasks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"scoring", "training", "shapes", "tasks", "flows"}
ALLOWED = {
    "scoring": set(),
    "training": set(),
    "shapes": set(),
    "tasks": {"scoring", "training"},
    "flows": {"tasks", "training"},
}
MAY_USE_PREFECT = {"tasks", "flows"}


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def violations(root: Path) -> list[str]:
    found = []
    for package in sorted(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            forbidden = PACKAGES - ALLOWED[package] - {package}
            if package not in MAY_USE_PREFECT:
                forbidden |= {"prefect"}
            found += [f"{path.relative_to(root)} imports {name}" for name in sorted(imported(path) & forbidden)]
    return found


def test_nobody_imports_what_it_may_not() -> None:
    assert violations(ROOT) == []


def test_the_rule_can_fail(tmp_path: Path) -> None:
    (tmp_path / "scoring").mkdir()
    (tmp_path / "scoring" / "bad.py").write_text(
        "def f():\n    from training.losses import x\n    import prefect.states\n"
    )
    assert violations(tmp_path) == ["scoring/bad.py imports prefect", "scoring/bad.py imports training"]


@pytest.mark.parametrize("package", ["scoring", "training", "shapes"])
def test_a_library_loads_without_prefect(package: str) -> None:
    modules = [f"{package}.{path.stem}" for path in sorted((ROOT / package).glob("[!_]*.py"))]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint('prefect' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_nothing_but_its_recipe_knows_the_shapes_world() -> None:
    texts = {p: p.read_text() for package in PACKAGES - {"shapes"} for p in (ROOT / package).rglob("*.py")}
    code = {p: text for p, text in texts.items() if "shapes." in text or "shapes/" in text}
    assert code == {}
