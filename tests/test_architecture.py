"""The layers of the package: who may import whom, and how long a function may be."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bids_gacelle"
WORKFLOWS = ROOT / "workflows"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Imports go from a layer to a lower number only; parts of one layer do not know each other.
LAYERS = {
    "cli": 5,
    "workflows": 4,
    "interfaces": 3,
    "phantom": 2,
    "settings": 2,
    "engine": 1,
    "bids": 1,
    "spatial": 1,
    "report": 1,
    "group": 1,
    "errors": 0,
    "": 0,
}
ENGINE_LAYERS = {
    "fit": 11,
    "spatial_fit": 10,
    "adequacy": 9,
    "result": 9,
    "uncertainty": 8,
    "blocks": 9,
    "memory": 8,
    "noise": 7,
    "solvers": 7,
    "regularise": 6,
    "starts": 6,
    "study": 6,
    "replay": 5,
    "kernels": 4,
    "objective": 3,
    "models": 2,
    "prepare": 2,
    "arrays": 1,
    "simplex": 1,
    "derivatives": 1,
    "device": 1,
    "errors": 0,
    "physics": 1,
    "scheme": 1,
}
ENGINE_NEEDS = {"torch", "numpy"}
WITHOUT_TORCH = {"bids", "report", "group", "cli", "settings", "errors"}
MAX_LINES, MAX_FACTORY_LINES = 100, 80


def modules() -> dict[str, Path]:
    """Every module of the package by its importable name."""
    found = {}
    for top, name in ((PACKAGE, "bids_gacelle"), (WORKFLOWS, "bids_gacelle.workflows")):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((name, *parts))] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(), path) for name, path in MODULES.items()}


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Names that a module imports anywhere in its text, in full, with the line."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*up, source]).rstrip(".")
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield (full if full in MODULES else source), node.lineno


def part(name: str) -> str:
    """The part of the house that a module of ours belongs to; "" for the package itself."""
    return [*name.split("."), ""][1]


def test_the_walk_sees_the_whole_package():
    assert {part(name) for name in MODULES} <= set(LAYERS)
    engine = {name.split(".")[2] for name in MODULES if name.startswith("bids_gacelle.engine.")}
    assert engine == set(ENGINE_LAYERS), "a module of the engine without a layer, or the reverse"
    assert {"cli", "workflows", "interfaces", "engine", "bids"} <= {part(n) for n in MODULES}
    assert ("bids_gacelle.errors", "bids_gacelle.settings") in {
        (target, name) for name in MODULES for target, _ in imports(name)
    }


def test_imports_never_go_up():
    wrong = []
    for name in MODULES:
        own = part(name)
        for target, line in imports(name):
            if not target.startswith("bids_gacelle"):
                continue
            other = part(target)
            if other != own and LAYERS[other] >= LAYERS[own]:
                wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_inside_the_engine_imports_go_from_fit_down_to_physics():
    wrong = []
    for name in MODULES:
        source = name.split(".")[2:]
        if part(name) != "engine" or not source:
            continue
        for target, line in imports(name):
            parts = target.split(".")
            if parts[:2] != ["bids_gacelle", "engine"]:
                continue
            other = parts[2] if len(parts) > 2 else "fit"  # the package itself offers everything
            if other != source[0] and ENGINE_LAYERS[other] >= ENGINE_LAYERS[source[0]]:
                wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_the_engine_imports_torch_and_numpy_only():
    wrong = [
        f"{name}:{line} imports {target}"
        for name in MODULES
        for target, line in imports(name)
        if part(name) == "engine"
        and target.split(".")[0] not in sys.stdlib_module_names | ENGINE_NEEDS
        and not target.startswith("bids_gacelle.engine")
        and target != "bids_gacelle"  # its version, no part of the house
    ]
    assert not wrong, "\n".join(wrong)


def test_only_computing_parts_import_torch():
    wrong = [
        f"{name}:{line}"
        for name in MODULES
        for target, line in imports(name)
        if part(name) in WITHOUT_TORCH and target.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("bids_gacelle.engine", ["nibabel", "nipype", "bids", "scipy", "pandas", "matplotlib"]),
        ("bids_gacelle.bids", ["torch", "nipype"]),
        ("bids_gacelle.report", ["torch", "nipype", "bids"]),
        ("bids_gacelle.group", ["torch", "nipype", "bids"]),
        ("bids_gacelle.cli.main", ["torch", "nipype", "bids", "nibabel", "pandas"]),
    ],
)
def test_an_import_stays_light(module, unwanted):
    """Also through what others import; a command line that only parses answers at once."""
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({unwanted})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_declared_dependencies_are_those_that_are_imported():
    declared = {
        canonicalize_name(Requirement(text).name) for text in PYPROJECT["project"]["dependencies"]
    }
    distributions = importlib.metadata.packages_distributions()
    imported = set()
    for name in MODULES:
        for target, line in imports(name):
            top = target.split(".")[0]
            if top in sys.stdlib_module_names or top == "bids_gacelle":
                continue
            owners = {canonicalize_name(owner) for owner in distributions.get(top, [])}
            assert owners & declared, f"{name}:{line} imports {top}, which is not declared"
            imported |= owners & declared
    assert declared == imported


def functions() -> Iterator[tuple[str, int]]:
    """Every function as ``module:line name``, with the lines of its body below the docstring."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[ast.get_docstring(node) is not None :]
                lines = node.end_lineno - first[0].lineno + 1 if first else 0
                yield f"{module}:{node.lineno} {node.name}", lines


def test_functions_are_short():
    long = [f"{name}: {lines} lines" for name, lines in functions() if lines >= MAX_LINES]
    assert not long, "\n".join(long)


def test_workflow_factories_only_wire():
    factories = {
        name: lines
        for name, lines in functions()
        if name.startswith("bids_gacelle.workflows") and name.split(" ")[1].startswith("init_")
    }
    assert factories
    assert {n: lines for n, lines in factories.items() if lines >= MAX_FACTORY_LINES} == {}
