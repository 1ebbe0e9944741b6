"""What the unit tier promises, and that a machine without vLLM can run it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS_VLLM = "pytest.mark.needs('vllm')"


@pytest.mark.parametrize(
    "command",
    [["nats-server", "--version"], ["/usr/bin/prometheus"], [sys.executable, "-m", "llm_worker"]],
)
def test_a_unit_test_cannot_start_an_engine_or_a_daemon(command: list[str]) -> None:
    """Whether it is installed or not."""
    with pytest.raises(AssertionError, match="a unit test starts no engine and no daemon"):
        subprocess.run(command, check=False)


def test_who_imports_vllm_says_that_it_needs_it(repository: Path) -> None:
    """Without it the test is skipped by name, and does not fail."""
    silent = []
    for file in sorted((repository / "tests/unit").rglob("test_*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        if any(NEEDS_VLLM in ast.unparse(node) for node in module.body if _is_mark(node)):
            continue
        for node in module.body:
            marks = getattr(node, "decorator_list", [])
            if _imports_vllm(node) and not any(NEEDS_VLLM in ast.unparse(mark) for mark in marks):
                silent.append(f"{file.name}:{node.lineno}")
    assert not silent


def _is_mark(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"


def _imports_vllm(node: ast.AST) -> bool:
    names = [
        name
        for part in ast.walk(node)
        for name in (
            [alias.name for alias in part.names]
            if isinstance(part, ast.Import)
            else [str(part.module)]
            if isinstance(part, ast.ImportFrom)
            else []
        )
    ]
    return any(name.split(".")[0] in {"vllm", "torch"} for name in names)


def test_the_light_lock_is_part_of_the_full_ones(repository: Path) -> None:
    """What passes without vLLM passes on the same versions with it."""
    full = {
        line
        for name in ("tests/requirements.txt", "worker/requirements/cpu.txt")
        for line in (repository / name).read_text(encoding="utf-8").splitlines()
    }
    light = (repository / "tests/requirements-light.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in light if not line.startswith("#")]
    assert set(pins) <= full
    assert not [pin for pin in pins if re.match("(vllm|torch)", pin)]
