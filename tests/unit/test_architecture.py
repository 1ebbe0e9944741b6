"""Who may import whom, as a table. A new arrow is a decision: change the table with the code."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

# module -> modules of ours that it may import
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "logs": set(),
    "processes": set(),
    "multiprocess": {"direct"},
    "tiny": set(),
    "settings": set(),
    "config": {"errors", "settings"},
    "metrics": {"config"},
    "negotiation": set(),
    "series": set(),
    "direct": {"series"},
    "source": {"direct", "series"},
    "page": {"direct", "series", "source"},
    "exposition": {"direct", "multiprocess", "negotiation", "page", "series", "source"},
    "lifecycle": {"metrics"},
    "health": {"lifecycle", "metrics"},
    "startup": {"config", "kv.truth"},
    "ledger": {"metrics"},
    "stats": {"config", "ledger", "metrics", "startup"},
    "kv.__init__": set(),
    "kv.stats": set(),
    "kv.events": {"kv.stats"},
    "kv.index": {"kv.events", "kv.stats"},
    "kv.stream": {"kv.events", "kv.index", "kv.stats"},
    "kv.listener": {"kv.index", "kv.stats", "kv.stream", "kv.transport"},
    "kv.truth": set(),
    "kv.audit": {"kv.events", "kv.index", "kv.stats"},
    "kv.consolidator": {"kv.events", "kv.stats"},
    "kv.merge": {"kv.consolidator", "kv.events", "kv.index", "kv.stats", "kv.stream"},
    "kv.pipeline": {"kv.index", "kv.listener", "kv.merge", "kv.stats", "kv.stream"},
    "kv.transport": {"kv.stats"},
    "kv.publisher": {"kv.events", "kv.stats", "kv.transport"},
    "kv.trtllm": {"kv.events", "kv.publisher"},
    "kv.poller": {"kv.events", "kv.publisher", "kv.trtllm"},
    "kv.topics": {"kv.events", "kv.index"},
    "kv.plane": {"kv.events", "kv.index", "kv.stats", "kv.topics", "kv.transport"},
    "kv.nats_connection": set(),
    "kv.nats_plane": {"kv.events", "kv.index", "kv.nats_connection", "kv.stats", "kv.topics"},
    "kv.nats_source": {
        "kv.index", "kv.nats_connection", "kv.nats_plane", "kv.stats", "kv.stream", "kv.topics",
    },
    "kv.routes": {"kv.events", "kv.index", "kv.stats"},
    "kv.metrics": {"kv.index", "kv.stats"},
    "kv.worker": {
        "errors", "kv.audit", "kv.index", "kv.merge", "kv.metrics", "kv.nats_plane", "kv.pipeline",
        "kv.plane", "kv.routes", "kv.stats", "settings",
    },
    "api": {"errors", "exposition", "health", "kv.routes"},
    "engine": {
        "config", "errors", "kv.truth", "kv.worker", "ledger", "metrics", "processes", "startup",
        "stats", "tiny",
    },
    "app": {
        "__init__", "api", "config", "engine", "errors", "exposition", "health", "kv.worker",
        "lifecycle", "metrics", "multiprocess", "processes",
    },
    "kv.fleet_config": {"errors", "settings"},
    "kv.fleet": {
        "errors", "kv.fleet_config", "kv.index", "kv.listener", "kv.nats_source", "kv.pipeline",
        "kv.stats", "kv.topics", "kv.transport",
    },
    "kv.service": {
        "__init__", "api", "errors", "exposition", "health", "kv.fleet", "kv.fleet_config",
        "kv.metrics", "kv.routes", "logs", "metrics",
    },
    "__main__": {"app", "config", "errors", "logs", "multiprocess"},
}  # fmt: skip
MAY_IMPORT_VLLM = {"engine", "ledger", "stats", "startup", "app"}  # app: for its version
MAY_READ_ENVIRONMENT = {"config", "kv.fleet_config"}  # one for each program
# Writes what a library reads from there, and reads whether the user set it.
MAY_WRITE_ENVIRONMENT = {"engine", "multiprocess"}


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


def ours(names: set[str], known: set[str]) -> set[str]:
    """Modules of ours among dotted names, which may go on into what a module holds."""
    found = set()
    for name in names:
        if name in {"llm_worker", "llm_worker.kv"}:  # what was taken from it comes with it
            continue
        parts = name.removeprefix("llm_worker.").split(".")
        if name.startswith("llm_worker."):
            heads = [".".join(parts[:length]) for length in (2, 1)]
            found.add(next((head for head in heads if head in known), "__init__"))
    return found


def test_every_module_imports_only_what_its_row_allows(repository: Path) -> None:
    """Data flows left to right; health, lifecycle and exposition never see the engine."""
    modules = package(repository)
    assert set(modules) == set(MAY_IMPORT), "a module without a row, or a row without a module"
    for name, tree in modules.items():
        extra = ours(imports(tree), set(modules)) - MAY_IMPORT[name] - {name}
        assert not extra, f"{name} imports {extra}"


def test_the_table_has_no_cycle() -> None:
    """Modules can be read in an order in which nothing is mentioned before it was seen."""
    left = {name: set(needs) for name, needs in MAY_IMPORT.items()}
    while left:
        free = [name for name, needs in left.items() if not needs & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        for name in free:
            del left[name]


def test_vllm_is_imported_behind_its_boundary_only(repository: Path) -> None:
    """A vLLM upgrade touches these files and nothing else."""
    users = {
        name
        for name, tree in package(repository).items()
        if any(imported.split(".")[0] == "vllm" for imported in imports(tree))
    }
    assert users <= MAY_IMPORT_VLLM


def environment_uses(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        for node in ast.walk(tree)
    )


def test_only_config_reads_the_environment(repository: Path) -> None:
    """One place to look for what a variable does."""
    users = {name for name, tree in package(repository).items() if environment_uses(tree)}
    assert users <= MAY_READ_ENVIRONMENT | MAY_WRITE_ENVIRONMENT


@pytest.mark.parametrize("module", ["config", "errors", "processes", "multiprocess", "lifecycle"])
def test_modules_of_the_early_start_import_without_vllm(module: str, repository: Path) -> None:
    """What runs before, or without, the engine pulls in nothing of it."""
    import subprocess

    code = f"import sys, llm_worker.{module}; assert 'vllm' not in sys.modules"
    if module in ("config", "errors", "processes", "multiprocess"):
        code += "; assert 'prometheus_client' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository / "worker",
        check=True,
        timeout=60,
    )
