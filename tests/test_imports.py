"""The directions of DESIGN.md section 3, held against the imports that stand in the code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ray_rl", "actors", "learner", "benchmarks")
KERNEL = (
    "ray_rl.types",
    "ray_rl.config",
    "ray_rl.tasks",
    "ray_rl.tokenizer",
    "ray_rl.tokenizer_files",
    "ray_rl.weight_file",
    "ray_rl.weight_manifest",
    "ray_rl.deadlines",
    "ray_rl.errors",
    "ray_rl.garbage",
    "ray_rl.inventory",
    "ray_rl.object_store",
    "ray_rl.store_connection",
    "ray_rl.stacks",
    "ray_rl.wording",
    "ray_rl.redaction",
    "ray_rl.run_logs",
    "ray_rl.metrics",
    "ray_rl.sinks",
    "ray_rl.embedded",
)
PROTOCOLS = "ray_rl.protocols"
"""The interface between the orchestrator and the rooms, and the records that cross it: both sides may know it."""
COMMANDS = ("ray_rl.cli", "ray_rl.__main__")
LAUNCH = "ray_rl.launch"
PURE = ("actors.segmentation", "actors.values", "learner.advantages", "learner.packing", "learner.samples")
HEAVY = {"torch", "vllm", "deepspeed", "transformers", "ray"}


@dataclass(frozen=True)
class Import:
    target: str
    at_module_level: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_below(node: ast.AST, at_module_level: bool = True) -> Iterator[Import]:
    """All imports, those for type checkers too; these and those in functions are not at module level."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_module_level) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield Import(full if full in SOURCES else child.module, at_module_level)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(child)
            yield from imports_below(child, at_module_level and not inside)


IMPORTS = {name: list(imports_below(ast.parse(path.read_text()))) for name, path in SOURCES.items()}


def within(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def offenders(importers: tuple[str, ...], forbidden, but: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{name} imports {target.target}"
        for name, targets in IMPORTS.items()
        if within(name, *importers) and not within(name, *but)
        for target in targets
        if forbidden(target.target)
    ]


def is_ours(target: str) -> bool:
    return within(target, *PACKAGES, "tests")


def test_the_reader_of_imports_sees_what_it_should():
    assert Import("actors.pool", True) in IMPORTS["ray_rl.launch.actors"]
    assert Import("ray_rl.launch", False) in IMPORTS["ray_rl.cli"]
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ntry:\n    import ray\nexcept E: pass"
    )
    assert list(imports_below(ast.parse(source)))[1:] == [Import("torch", False), Import("ray", True)]


def test_the_kernel_imports_nothing_above_itself():
    assert not offenders(KERNEL, lambda target: is_ours(target) and not within(target, *KERNEL))


@pytest.mark.parametrize("room", ["actors", "learner"])
def test_a_room_imports_itself_and_the_kernel_only(room):
    assert not offenders((room,), lambda target: is_ours(target) and not within(target, room, PROTOCOLS, *KERNEL))


def test_the_protocols_import_the_kernel_only():
    assert not offenders((PROTOCOLS,), lambda target: is_ours(target) and not within(target, *KERNEL))


def test_only_the_composition_root_imports_actors_and_learner():
    assert not offenders(("ray_rl",), lambda target: within(target, "actors", "learner"), but=(LAUNCH,))


def test_only_the_commands_import_the_composition_root():
    assert not offenders(PACKAGES, lambda target: within(target, LAUNCH), but=(*COMMANDS, LAUNCH, "benchmarks"))


def test_nothing_imports_benchmarks_or_tests():
    assert not offenders(PACKAGES, lambda target: within(target, "benchmarks", "tests"), but=("benchmarks",))


def test_no_cycle_between_modules():
    graph = {
        name: {target.target for target in targets if target.at_module_level and target.target in SOURCES} - {name}
        for name, targets in IMPORTS.items()
    }
    while free := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"among these modules there is a cycle: {sorted(graph)}"


@pytest.mark.parametrize("module", [name for name in SOURCES if within(name, *KERNEL, *COMMANDS, *PURE)])
def test_a_light_module_imports_nothing_heavy(module):
    heavy = [t.target for t in IMPORTS[module] if t.at_module_level and t.target.partition(".")[0] in HEAVY]
    assert not heavy


def test_the_command_line_and_the_pure_modules_bring_nothing_heavy_with_them():
    """What `ast` cannot see: a light third-party package that pulls a heavy one."""
    present = [name for name in ("ray_rl.cli", *PURE, "ray_rl.tasks.dataset", "ray_rl.sinks") if name in SOURCES]
    program = f"import sys, {', '.join(present)}\nprint(*{HEAVY!r} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.split() == []
