"""Leaves never look up: the import direction of the rooms, read from the source."""

import ast
import re
import sys
from pathlib import Path

import pytest
import tomlkit

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "entangle_fast"
# room → rooms that it may import, itself aside
BELOW = {
    "kernels": set(),
    "reference": set(),
    "backends": {"kernels", "_C"},
    "dispatch": {"backends", "reference", "kernels"},
    "ops": {"dispatch", "reference"},
    "capture": {"ops", "reference"},
    "weights": {"ops", "reference"},
    "optim": {"weights", "ops", "reference"},
}
BELOW["methods"] = {"capture", "weights", "optim", "ops", "metrics", "storage", "tasks", "distributed"}
TOP = {"tasks", "metrics", "report", "methods", "cli"}


def room(path: Path) -> str:
    return "kernels" if path.is_relative_to(ROOT / "kernels") else path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files():
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def imports(path: Path):
    """(module, name) of every import, absolute."""
    base = ["entangle_fast", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else ["entangle_fast", "kernels"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*stem, *([node.module] if node.module else [])])
            yield from (f"{module}.{a.name}" for a in node.names)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    here = room(path)
    for name in imports(path):
        if not name.startswith("entangle_fast."):
            continue
        there = name.split(".")[1]
        if here in BELOW and there != here:
            assert there in BELOW[here], f"{path.relative_to(ROOT)} imports {name}: {here} stands below {there}"
        if here != "cli" and here != "__main__":
            assert there != "cli", f"{path.relative_to(ROOT)} imports the command line"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_torch_and_triton_only(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top in ("torch", "triton") or name.startswith("entangle_fast.kernels") or top in sys.stdlib_module_names, name


def test_kernels_are_no_package_of_their_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_ops_and_dispatch_call_the_registered_operations():
    for path in files():
        if room(path) not in ("ops", "dispatch"):
            code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
            code = re.sub(r'"""[\s\S]*?"""', "", code)
            assert "torch.ops.entangle_fast" not in code, path


def test_every_schema_is_there_in_every_room():
    from entangle_fast import dispatch, reference
    from entangle_fast.ops import registration

    served = "\n".join(p.read_text() for p in (PACKAGE / "ops").glob("*.py"))
    for name, schema in dispatch.ops().items():
        assert callable(getattr(reference, name, None)), f"{name}: no reference"
        assert f'call("{name}"' in served or f"torch.ops.entangle_fast.{name}(" in served, f"{name}: nobody calls it"
        assert name in registration.FAKES, f"{name}: no fake"
        assert schema.startswith(name + "(")
    assert sorted(reference.__all__) == sorted(dispatch.ops())


def test_every_package_is_installed():
    listed = set(tomlkit.parse((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert there <= listed, f"pyproject.toml leaves out {sorted(there - listed)}"
