"""The page and other processes: shared .db files, promtool, a real Prometheus."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Summary

from llm_worker.exposition.exposition import Exposition
from llm_worker.exposition.negotiation import OPENMETRICS
from llm_worker.metrics import Metrics
from support.places import ROOT
from support.waiting import until

# What every script below starts with. `shown` and `values` use prometheus_client's strict parser.
PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from llm_worker.exposition.multiprocess import MultiprocessError, prepare_multiprocess

def exposition(directory, registry=None):
    from prometheus_client import CollectorRegistry
    from llm_worker.exposition.exposition import Exposition
    from llm_worker.metrics import Metrics
    page = Exposition(Metrics(CollectorRegistry()))
    if registry is not None:
        page.register("memory", registry)
    page.register_multiprocess(directory)
    return page

def values(page, prefix="t_"):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
    families = list(parse(page.render("application/openmetrics-text").body.decode()))
    assert len({f.name for f in families}) == len(families)
    return {
        s.name + repr(sorted(s.labels.items())): s.value
        for f in families for s in f.samples if s.name.startswith(prefix)
    }
"""

# A process that has metrics of every kind, and then waits to be killed.
WRITER = """
import sys, time
from prometheus_client import Counter, Gauge, Histogram
amount = float(sys.argv[1])
Counter("t_requests", "R.", ["x"]).labels("1").inc(amount)
Histogram("t_seconds", "S.", buckets=(1, 2)).observe(amount)
for mode in ("livesum", "sum", "liveall"):
    Gauge(f"t_{mode}", "G.", multiprocess_mode=mode).set(amount)
print("written", flush=True)
if len(sys.argv) < 3:
    time.sleep(60)
"""


def start(script: str, *arguments: str, directory: Path | None = None) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k.lower() != "prometheus_multiproc_dir"}
    if directory is not None:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    environment["PYTHONPATH"] = str(ROOT / "worker")
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *arguments: str, directory: Path | None = None) -> str:
    """What the script printed; fails with what it said if it failed."""
    process = start(PRELUDE + textwrap.dedent(script), *arguments, directory=directory)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that counted 1 and 2 into ``tmp_path`` and live until they are killed."""
    processes = [start(WRITER, amount, directory=tmp_path) for amount in ("1", "2")]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_one_process_prepares_nothing_and_imports_nothing() -> None:
    """Without a setting there is no directory, no variable, and prometheus_client is not loaded."""
    run("""
        assert prepare_multiprocess(None) is None
        assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
        import llm_worker.exposition.exposition
        assert not [m for m in sys.modules if m.startswith("prometheus_client")]
    """)


def test_our_own_directory_is_shared_by_two_processes_and_gone_afterwards() -> None:
    """What a child counts is on the parent's page, and the directory's name says whose it was."""
    path = run(
        """
        with prepare_multiprocess("auto") as directory:
            assert directory.owned and os.environ["PROMETHEUS_MULTIPROC_DIR"] == str(directory.path)
            from prometheus_client import Counter
            Counter("t_requests", "R.", ["x"]).labels("1").inc(3)
            subprocess.run([sys.executable, "-c", sys.argv[1], "4", "exit"], check=True)
            found = values(exposition(directory))
            assert found["t_requests_total[('x', '1')]"] == 7, found
        assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
        print(directory.path)
        """,
        WRITER,
    ).split()[-1]
    assert Path(path).name.startswith("llm_worker_prometheus_")
    assert not Path(path).exists()


def test_our_own_directory_is_removed_when_nobody_closed_it() -> None:
    """The interpreter's exit is enough; a forked child's is not."""
    path = run("""
        directory = prepare_multiprocess("auto")
        child = os.fork()
        if child == 0:
            directory.close()
            sys.exit(0)
        os.waitpid(child, 0)
        assert directory.path.is_dir()
        print(directory.path)
    """).strip()
    assert not Path(path).exists()


def test_what_a_killed_worker_left_is_removed_by_the_next_but_never_a_living_ones(
    tmp_path: Path,
) -> None:
    """The owner's lock tells: free after SIGKILL, held while it or a child it forked lives."""
    script = PRELUDE + textwrap.dedent("""
        import tempfile
        tempfile.tempdir = sys.argv[1]
        directory = prepare_multiprocess("auto")
        print(directory.path, flush=True)
        time.sleep(60)
    """)
    killed, alive = (start(script, str(tmp_path)) for _ in range(2))
    try:
        assert killed.stdout is not None
        assert alive.stdout is not None
        left = Path(killed.stdout.readline().strip())
        kept = Path(alive.stdout.readline().strip())
        killed.kill()
        killed.wait()
        for path in (left, kept):
            os.utime(path, (time.time() - 3600,) * 2)
        run(
            """
            import tempfile
            tempfile.tempdir = sys.argv[1]
            prepare_multiprocess("auto").close()
            """,
            str(tmp_path),
        )
        assert not left.exists()
        assert kept.is_dir()
    finally:
        for process in (killed, alive):
            process.kill()
            process.communicate()


def test_a_directory_set_in_the_environment_is_used_and_left_in_place(tmp_path: Path) -> None:
    """It is not ours: only this process's live gauges leave it."""
    run(
        """
        import prometheus_client  # earlier than us is fine: it saw the same directory
        with prepare_multiprocess(sys.argv[1]) as directory:
            assert not directory.owned
            prometheus_client.Counter("t_c", "C.").inc()
            prometheus_client.Gauge("t_g", "G.", multiprocess_mode="livesum").set(1)
            assert values(exposition(directory)) == {"t_c_total[]": 1, "t_g[]": 1}
        """,
        str(tmp_path),
        directory=tmp_path,
    )
    left = {file.name.rpartition("_")[0] for file in tmp_path.iterdir()}
    assert "counter" in left
    assert not [name for name in left if name.startswith("gauge_live")]


def test_two_processes_add_up_and_a_killed_ones_live_gauges_go(
    tmp_path: Path, writers: list[subprocess.Popen[str]]
) -> None:
    """Its counters, histograms and plain gauges stay: totals must not fall during a run."""
    script = """
        with prepare_multiprocess(sys.argv[1]) as directory:
            assert directory.removed == 0
            page = exposition(directory)
            before = values(page)
            victim = int(sys.argv[2])
            os.kill(victim, signal.SIGKILL)
            while not Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].startswith(" Z"):
                time.sleep(0.01)
            after = values(page)
        alls = [k for k in before if k.startswith("t_liveall")]
        assert len(alls) == 2 and len([k for k in after if k.startswith("t_liveall")]) == 1
        for found, live in ((before, 3), (after, 2)):
            assert found["t_requests_total[('x', '1')]"] == 3, found
            assert found["t_seconds_count[]"] == 2 and found["t_seconds_sum[]"] == 3, found
            assert found["t_sum[]"] == 3 and found["t_livesum[]"] == live, found
    """
    run(script, str(tmp_path), str(writers[0].pid), directory=tmp_path)
    assert not (tmp_path / f"gauge_livesum_{writers[0].pid}.db").exists()
    assert (tmp_path / f"counter_{writers[0].pid}.db").exists()


def test_what_an_earlier_run_left_in_a_reused_directory_is_not_counted_again(
    tmp_path: Path,
) -> None:
    """Also under our own pid, as after a container's restart; other files stay."""
    writer = start(WRITER, "5", "exit", directory=tmp_path)
    writer.communicate(timeout=60)
    (tmp_path / "mine.txt").write_text("not a metric")
    run(
        """
        left = list(Path(sys.argv[1]).glob("counter_*.db"))
        left[0].rename(left[0].with_name(f"counter_{os.getpid()}.db"))
        with prepare_multiprocess(sys.argv[1]) as directory:
            assert directory.removed == 5, directory.removed
            from prometheus_client import Counter
            Counter("t_requests", "R.", ["x"]).labels("1").inc(1)
            assert values(exposition(directory)) == {"t_requests_total[('x', '1')]": 1}
        """,
        str(tmp_path),
    )
    assert (tmp_path / "mine.txt").exists()


def test_a_dead_processs_counts_stay_where_others_of_its_run_live(
    tmp_path: Path, writers: list[subprocess.Popen[str]]
) -> None:
    """A directory in use: an early death looks like an earlier run, and both are kept."""
    writers[0].kill()
    writers[0].communicate()
    run(
        """
        with prepare_multiprocess(sys.argv[1]) as directory:
            found = values(exposition(directory))
        assert directory.removed == 0
        assert found["t_requests_total[('x', '1')]"] == 3 and found["t_livesum[]"] == 2, found
        """,
        str(tmp_path),
    )


def test_a_used_pid_does_not_keep_an_earlier_runs_files_alive(tmp_path: Path) -> None:
    """Some process has the number; none has the file mapped."""
    writer = start(WRITER, "5", "exit", directory=tmp_path)
    writer.communicate(timeout=60)
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        for file in tmp_path.glob("*.db"):
            file.rename(tmp_path / f"{file.stem.rpartition('_')[0]}_{stranger.pid}.db")
        run("assert prepare_multiprocess(sys.argv[1]).removed == 5", str(tmp_path))
    finally:
        stranger.kill()
        stranger.wait()


def test_a_family_in_memory_and_in_the_files_is_on_the_page_once_with_everyones_values(
    tmp_path: Path, writers: list[subprocess.Popen[str]]
) -> None:
    """prometheus_client calls it a duplicate and vLLM's own share alone would be wrong.

    Also a gauge that has a pid label in the files and none in memory: one of the two, not both.
    """
    run(
        """
        with prepare_multiprocess(sys.argv[1]) as directory:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
            from prometheus_client.multiprocess import MultiProcessCollector
            registry = CollectorRegistry(auto_describe=True)
            Counter("t_requests", "R.", ["x"], registry=registry).labels("1").inc(10)
            Gauge("t_liveall", "G.", multiprocess_mode="liveall", registry=registry).set(10)
            try:
                MultiProcessCollector(registry)
                raise SystemExit("the conflict this is about is gone")
            except ValueError as error:
                assert "Duplicated timeseries" in str(error)
            page = exposition(directory, registry)
            found = values(page)
            assert found["t_requests_total[('x', '1')]"] == 13, found
            alls = [k for k in found if k.startswith("t_liveall")]
            assert len(alls) == 3 and all("pid" in k for k in alls), found
            own = values(page, "llm_worker_exporter")
            name = "llm_worker_exporter_families_dropped_total"
            assert own[f"{name}[('reason', 'duplicate'), ('source', 'memory')]"] >= 2, own
            page.unregister("memory")
            page.register("memory", registry, exclude=("t_",))
            before = values(page, name)
            assert before == values(page, name)
        """,
        str(tmp_path),
    )


def test_a_damaged_file_costs_its_process_and_not_the_page(
    tmp_path: Path, writers: list[subprocess.Popen[str]]
) -> None:
    """A process killed between creating a file and filling it leaves one that cannot be read."""
    (tmp_path / "counter_999999.db").write_bytes(b"")
    (tmp_path / "histogram_999999.db").write_bytes(b"\x00\x10\x00\x00" + b"\xff" * 60)
    run(
        """
        with prepare_multiprocess(sys.argv[1]) as directory:
            page = exposition(directory)
            found = values(page)
            assert found["t_requests_total[('x', '1')]"] == 3, found
            own = values(page, "llm_worker_exporter_source")
            assert own["llm_worker_exporter_source_up[('source', 'multiprocess')]"] == 0, own
            for name in ("counter_999999.db", "histogram_999999.db"):
                (directory.path / name).unlink()
            own = values(page, "llm_worker_exporter_source")
            assert own["llm_worker_exporter_source_up[('source', 'multiprocess')]"] == 1, own
        """,
        str(tmp_path),
    )


def test_a_directory_that_vanishes_takes_its_source_down_and_not_the_page() -> None:
    """A cleaner of /tmp must not look like an engine without requests."""
    run("""
        import shutil
        with prepare_multiprocess("auto") as directory:
            from prometheus_client import CollectorRegistry, Gauge
            registry = CollectorRegistry()
            gauge = Gauge("t_g", "G.", multiprocess_mode="sum", registry=registry)
            page = exposition(directory, registry)
            shutil.rmtree(directory.path)
            assert values(page) == {"t_g[]": 0}
            own = values(page, "llm_worker_exporter_source_up")
            assert own["llm_worker_exporter_source_up[('source', 'multiprocess')]"] == 0, own
    """)


def test_it_is_an_error_to_be_later_than_prometheus_clients_import(tmp_path: Path) -> None:
    """Otherwise the .db files would stay empty and the page without a word of it.

    And the variable is not left set: vLLM would take it for a working directory.
    """
    out = run(
        """
        import prometheus_client
        for setting in ("auto", sys.argv[1]):
            try:
                prepare_multiprocess(setting)
                raise SystemExit("accepted")
            except MultiprocessError as error:
                print(error)
            assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
        """,
        str(tmp_path),
    )
    assert out.count("imported before") == 2
    assert out.count("keeps its values in memory") == 2
    assert out.count("start the worker with PROMETHEUS_MULTIPROC_DIR=") == 2


def test_it_is_an_error_when_values_already_go_to_another_directory(tmp_path: Path) -> None:
    """Two directories would each have a part of the truth."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    out = run(
        """
        import prometheus_client
        try:
            prepare_multiprocess(sys.argv[1])
            raise SystemExit("accepted")
        except MultiprocessError as error:
            print(error)
        assert os.environ["PROMETHEUS_MULTIPROC_DIR"].endswith("first")
        """,
        str(second),
        directory=first,
    )
    assert f"keeps its values in {first}" in out


REFUSED = """
    def refused(path):
        try:
            prepare_multiprocess(str(path))
        except MultiprocessError as error:
            assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
            print(error.problem, "|", error.fix)
        else:
            raise SystemExit("accepted")
"""


@pytest.mark.parametrize(
    ("kind", "problem", "fix"),
    [
        ("missing", "it does not exist", "mkdir -p"),
        ("file", "it is not a directory", "'auto'"),
        ("unwritable", "it is not writable (Permission denied)", "let user id 65534 write there"),
    ],
)
def test_a_directory_that_cannot_be_used_is_refused_with_what_to_do(
    tmp_path: Path, kind: str, problem: str, fix: str
) -> None:
    """At the start, where someone reads it, not as an empty page later."""
    path = tmp_path / kind
    if kind == "file":
        path.touch()
    elif kind == "unwritable":
        path.mkdir(mode=0o555)
        for parent in path.parents[:3]:
            parent.chmod(0o755)
        if os.geteuid() != 0:
            fix = f"let user id {os.geteuid()}"
    out = run(
        textwrap.dedent(REFUSED)
        + textwrap.dedent("""
        if sys.argv[2] == "unwritable" and os.geteuid() == 0:
            os.seteuid(65534)
        refused(sys.argv[1])
        """),
        str(path),
        kind,
    )
    assert problem in out
    assert fix in out


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("ENODEV", "cannot hold a memory-mapped file of 65536 bytes (No such device)"),
        ("", "what is written through a memory map is not there when the file is read"),
    ],
    ids=["no mmap", "mmap not seen by read"],
)
def test_a_file_system_without_working_memory_maps_is_refused(
    tmp_path: Path, code: str, problem: str
) -> None:
    """As some FUSE, 9p and network file systems are. The one call they fail is replaced here."""
    out = run(
        textwrap.dedent(REFUSED)
        + textwrap.dedent("""
        import contextlib, errno, mmap
        def broken(*_):
            if sys.argv[2]:
                code = getattr(errno, sys.argv[2])
                raise OSError(code, os.strerror(code))
            return contextlib.nullcontext(bytearray(65536))
        mmap.mmap = broken
        refused(sys.argv[1])
        """),
        str(tmp_path),
        code,
    )
    assert problem in out
    assert "another directory on a local file system" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("type_", "options", "problem"),
    [
        ("tmpfs", "size=32k", "No space left on device"),
        ("hugetlbfs", "", "cannot hold a memory-mapped file"),
    ],
)
def test_a_real_file_system_that_is_full_or_cannot_is_refused(
    tmp_path: Path, type_: str, options: str, problem: str
) -> None:
    """A full one would kill the process with SIGBUS later, without a message."""
    mount = ["mount", "-t", type_, *(["-o", options] if options else []), "none", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"may not mount {type_} here: {mounted.stderr.strip()}")
    try:
        out = run(textwrap.dedent(REFUSED) + "\nrefused(sys.argv[1])\n", str(tmp_path))
        assert problem in out
        assert "free some space if it is full" in out
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- readers that are not Python ----------------------------------------------------------------


@pytest.fixture
def page() -> Exposition:
    """Every type there is, vLLM's names among them, and a source that fails."""

    class Broken:
        def collect(self) -> Iterator[Any]:
            raise RuntimeError("gone")

    registry = CollectorRegistry()
    labels = ["model_name", "engine"]
    for name in ("vllm:iteration_tokens_total", "vllm:time_to_first_token_seconds"):
        Histogram(name, 'A "histogram" \\ of\nsorts.', labels, registry=registry).labels(
            'm"\\\n', "0"
        ).observe(0.3)
    Counter("vllm:prompt_tokens", "P.", labels, registry=registry).labels("m", "0").inc(7)
    Gauge("vllm:kv_cache_usage_perc", "K.", labels, registry=registry).labels("m", "0").set(0.5)
    Gauge("t_memory", "M.", unit="bytes", registry=registry).set(1e12)
    Summary("t_summary", "S.", registry=registry).observe(1)
    Enum("t_state", "S.", states=["up", "down"], registry=registry)
    made = Exposition(Metrics(CollectorRegistry()), {"llm_namespace": "n"})
    made.register("vllm", registry)
    made.register("broken", Broken())
    made.register("trtllm", registry, add_prefix="trtllm_")
    return made


@pytest.mark.needs("prometheus")
def test_promtool_can_read_the_text_format(page: Exposition) -> None:
    """It may dislike names (exit 3: lint, vLLM's colons); it must not fail to parse (exit 1)."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=page.render().body,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert checked.returncode in (0, 3), checked.stderr.decode()
    assert b"error while linting" not in checked.stderr


@pytest.mark.needs("prometheus")
@pytest.mark.parametrize("protocol", ["OpenMetricsText1.0.0", "PrometheusText0.0.4"])
def test_a_real_prometheus_takes_every_series_in_both_formats(
    page: Exposition, protocol: str, tmp_path: Path
) -> None:
    """By its own negotiation, compressed; the same samples, and the failing source is visible."""
    answered: list[tuple[str, str | None, int]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown = page.render(self.headers["Accept"], self.headers["Accept-Encoding"])
            answered.append((shown.content_type, shown.content_encoding, len(shown.body)))
            self.send_response(200)
            self.send_header("Content-Type", shown.content_type)
            if shown.content_encoding:
                self.send_header("Content-Encoding", shown.content_encoding)
            self.end_headers()
            self.wfile.write(shown.body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = tmp_path / "prometheus.yml"
    config.write_text(
        json.dumps(
            {
                "scrape_configs": [
                    {
                        "job_name": "worker",
                        "scrape_interval": "200ms",
                        "scrape_timeout": "200ms",
                        "scrape_protocols": [protocol],
                        "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}],
                    }
                ]
            }
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prometheus = subprocess.Popen(
        [
            shutil.which("prometheus") or "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("wb"),
    )

    def query(expression: str) -> dict[str, float]:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/api/v1/query?"
            + urllib.parse.urlencode({"query": expression}),
            timeout=5,
        ) as answer:
            result = json.load(answer)["data"]["result"]
        return {json.dumps(r["metric"], sort_keys=True): float(r["value"][1]) for r in result}

    try:
        until(
            "a scrape of the worker",
            lambda: query('up{job="worker"} == 1'),
            process=prometheus,
            log=tmp_path / "log",
        )
        expected = OPENMETRICS if protocol.startswith("Open") else "text/plain; version=0.0.4"
        assert answered[-1][0].startswith(expected)
        assert answered[-1][1] == "gzip"
        lines = [line for line in page.render().body.splitlines() if not line.startswith(b"#")]
        (stored,) = query("scrape_samples_scraped").values()
        assert stored == len(lines)
        tokens = 'histogram_quantile(0.5, {__name__="vllm:iteration_tokens_total_bucket"})'
        assert len(query(tokens)) == 1
        assert len(query('{__name__="trtllm_vllm:iteration_tokens_total_count"} == 1')) == 1
        (down,) = query("llm_worker_exporter_source_up == 0")
        assert json.loads(down)["source"] == "broken"
    finally:
        prometheus.send_signal(signal.SIGTERM)
        prometheus.wait(20)
        server.shutdown()
        server.server_close()
