"""Who may import whom, between packages and inside them: DESIGN and CONTRIBUTING have the table, this enforces it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "data": set(),
    "scoring": {"data"},
    "training": {"data"},
    "shapes": set(),
    "tasks": {"data", "scoring", "training"},
    "flows": {"tasks"},
    "rlaif": {"data", "scoring", "training", "tasks", "flows"},
}
PACKAGES = set(ALLOWED)
MAY_USE_PREFECT = {"tasks", "flows"}


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file: of `from a import b` both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def modules(root: Path, package: str) -> dict[str, Path]:
    """The files of a package by their dotted names."""
    files = sorted((root / package).rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def violations(root: Path) -> list[str]:
    """Imports of packages that the table does not allow."""
    found = []
    for package in sorted(PACKAGES):
        for path in modules(root, package).values():
            forbidden = PACKAGES - ALLOWED[package] - {package}
            if package not in MAY_USE_PREFECT:
                forbidden |= {"prefect"}
            tops = {name.split(".")[0] for name in imported(path)}
            found += [f"{path.relative_to(root)} imports {name}" for name in sorted(tops & forbidden)]
    return found


def circles(root: Path) -> Iterator[str]:
    """Import circles between the modules of a package. A deferred import counts, and so does one for types alone."""
    for package in sorted(PACKAGES):
        known = modules(root, package)
        graph = {name: (imported(path) & known.keys()) - {name} for name, path in known.items()}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            yield " imports ".join(reversed(error.args[1]))


def test_nobody_imports_what_it_may_not() -> None:
    assert violations(ROOT) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert list(circles(ROOT)) == []


def test_the_rules_can_fail(tmp_path: Path) -> None:
    (tmp_path / "scoring").mkdir()
    (tmp_path / "scoring" / "bad.py").write_text(
        "def f():\n    from training.loss.errors import x\n    import prefect.states\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.py").write_text("import data.two\n")
    (tmp_path / "data" / "two.py").write_text("def f():\n    from data import one\n")
    assert violations(tmp_path) == ["scoring/bad.py imports prefect", "scoring/bad.py imports training"]
    assert len(list(circles(tmp_path))) == 1


@pytest.mark.parametrize("package", ["data", "scoring", "training", "shapes"])
def test_a_library_loads_without_prefect(package: str) -> None:
    names = [name for name in modules(ROOT, package) if not name.endswith("__main__")]
    code = f"import importlib, sys\nfor m in {names!r}: importlib.import_module(m)\nprint('prefect' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_nothing_but_its_recipe_knows_the_shapes_world() -> None:
    texts = {p: p.read_text() for package in PACKAGES - {"shapes"} for p in (ROOT / package).rglob("*.py")}
    code = {p: text for p, text in texts.items() if "shapes." in text or "shapes/" in text}
    assert code == {}


def test_a_module_of_tasks_has_one_task_and_its_rooms_have_none() -> None:
    def count(path: Path) -> int:
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        return sum("task(" in ast.unparse(decorator) for node in functions for decorator in node.decorator_list)

    top = {path.name: count(path) for path in (ROOT / "tasks").glob("*.py")}
    assert max(top.values()) == 1
    assert [path for room in ("record", "report") for path in (ROOT / "tasks" / room).glob("*.py") if count(path)] == []
