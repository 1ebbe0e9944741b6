"""Who may import whom: a folder is a promise, and each promise is a line. Change the line with the
code: a new arrow is a decision.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# Modules at the top of the package, and folders → what of ours they may import beside themselves.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "logs": set(),
    "processes": set(),
    "listening": set(),
    "lifecycle": set(),
    "exit_record": {"errors"},
    "settings": {"errors"},
    "metrics": {"lifecycle", "settings"},
    "link": set(),
    "exposition": set(),
    "kv": {"errors", "settings"},
    "serving": {
        "__init__", "errors", "exposition", "lifecycle", "link", "logs", "metrics", "processes",
        "settings",
    },
    "observer": {
        "__init__", "errors", "exit_record", "exposition", "kv", "lifecycle", "link", "logs",
        "metrics", "processes", "settings",
    },
    "fleet": {
        "__init__", "errors", "exposition", "kv", "listening", "logs", "metrics", "observer",
        "settings",
    },
    "supervisor": {
        "errors", "exit_record", "lifecycle", "link", "listening", "processes", "settings",
    },
    "__main__": {"errors", "logs", "settings", "supervisor"},
}  # fmt: skip
# The same within a folder that has rooms of its own.
KV_MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "stats": set(),
    "records": set(),
    "wire": {"records"},
    "index": {"records", "stats"},
    "follow": {"index", "plane", "records", "stats", "wire"},
    "plane": {"index", "records", "stats", "wire"},
    "trtllm": {"plane", "records", "stats"},
    "pipeline": {"follow", "index", "stats"},
    "routes": {"index", "records", "stats"},
    "collector": {"index", "plane", "stats"},
    "worker": {"collector", "follow", "index", "pipeline", "plane", "routes", "stats"},
}
MAY_IMPORT_VLLM = {"serving"}
MAY_READ_ENVIRONMENT = {"settings"}
# Writes what a library reads from there, and reads whether the user set it.
MAY_WRITE_ENVIRONMENT = {"serving.launch", "exposition.multiprocess"}


def package(repository: Path) -> dict[str, ast.Module]:
    root = repository / "worker/llm_worker"
    return {
        ".".join(file.relative_to(root).with_suffix("").parts): ast.parse(
            file.read_text(encoding="utf-8")
        )
        for file in sorted(root.rglob("*.py"))
    }


def imports(module: ast.Module) -> set[str]:
    """Every imported name, dotted, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def targets(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of ours that this one imports, by dotted name; "__init__" is the package itself."""
    found = set()
    for name in imports(tree):
        if not name.startswith("llm_worker"):
            continue
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in known:
            parts.pop()
        # A folder's own name only says where to look for what was taken from it.
        if parts or name.startswith("llm_worker.__"):
            found.add(".".join(parts) or "__init__")
    return found


def rooms(modules: dict[str, ast.Module], under: str = "") -> dict[str, set[str]]:
    """Room → rooms that it imports, of the folder ``under``; its own left out."""
    inside = {name for name in modules if name.startswith(under)}
    found: dict[str, set[str]] = {}
    for name in inside:
        room = name.removeprefix(under).split(".")[0]
        arrows = {
            target.removeprefix(under).split(".")[0]
            for target in targets(modules[name], set(modules))
            if target.startswith(under)
        }
        found.setdefault(room, set()).update(arrows - {room})
    return found


@pytest.mark.parametrize(("under", "rules"), [("", MAY_IMPORT), ("kv.", KV_MAY_IMPORT)])
def test_every_room_imports_only_what_its_line_allows(
    repository: Path, under: str, rules: dict[str, set[str]]
) -> None:
    """What is not on the line is a new arrow."""
    found = rooms(package(repository), under)
    assert set(found) == set(rules), "a room without a line, or a line without a room"
    for room, arrows in found.items():
        assert arrows <= rules[room], f"{room} imports {arrows - rules[room]}"
        assert rules[room] <= arrows, f"{room} needs no {rules[room] - arrows} any more"


def test_no_module_is_imported_in_a_circle(repository: Path) -> None:
    """Modules can be read in an order in which nothing is mentioned before it was seen."""
    modules = package(repository)
    left = {name: targets(tree, set(modules)) - {name} for name, tree in modules.items()}
    while left:
        free = [name for name, needs in left.items() if not needs & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_vllm_is_imported_behind_its_boundary_only(repository: Path) -> None:
    """A vLLM upgrade opens this folder and the wire format, no other."""
    users = {
        name.split(".")[0]
        for name, tree in package(repository).items()
        if any(imported.split(".")[0] == "vllm" for imported in imports(tree))
    }
    assert users == MAY_IMPORT_VLLM


def environment_uses(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        for node in ast.walk(tree)
    )


def test_only_settings_reads_the_environment(repository: Path) -> None:
    """One place to look for what a variable does."""
    users = {name for name, tree in package(repository).items() if environment_uses(tree)}
    others = {name for name in users if name.split(".")[0] not in MAY_READ_ENVIRONMENT}
    assert others == MAY_WRITE_ENVIRONMENT


def test_a_long_module_says_why(repository: Path) -> None:
    """Over 450 lines a module's docstring has a reason, behind the word Long."""
    for name, tree in package(repository).items():
        lines = max((getattr(node, "end_lineno", 0) or 0 for node in ast.walk(tree)), default=0)
        about = ast.get_docstring(tree) or ""
        assert lines <= 450 or "Long: " in about, f"{name} has {lines} lines and gives no reason"


def test_the_supervisor_loads_the_standard_library_alone(repository: Path) -> None:
    """There is nothing in it that can crash, and it costs what a Python costs."""
    code = (
        "import sys; before = set(sys.modules); import llm_worker.__main__; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=repository / "worker",
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert set(loaded) - {"llm_worker"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("observer.app", {"vllm", "torch"}),
        ("fleet.__main__", {"vllm", "torch"}),
        ("settings.worker", {"vllm", "prometheus_client"}),
        ("errors", {"vllm", "prometheus_client"}),
        ("processes", {"vllm", "prometheus_client"}),
        ("exposition.multiprocess", {"vllm", "prometheus_client"}),
        ("lifecycle", {"vllm"}),
    ],
)
def test_what_runs_early_loads_nothing_late(
    module: str, unwanted: set[str], repository: Path
) -> None:
    """What runs before, or without, the engine pulls in nothing of it."""
    code = f"import sys, llm_worker.{module}; print(*{unwanted!r} & set(sys.modules))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository / "worker",
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert not told.stdout.split()
