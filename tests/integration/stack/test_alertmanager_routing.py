"""Alertmanager: the rendered configuration, its routes, and alerts that really arrive.

The delivery tests run the shipped Prometheus and Alertmanager configuration as local processes, on
copies whose clocks are faster and in which nothing else differs: ``sped_up`` turns minutes of
patience into seconds. The targets are small HTTP servers that stand in for vLLM servers.
"""

from __future__ import annotations

import email
import http.server
import itertools
import json
import os
import re
import shutil
import socketserver
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.places import ROOT
from support.waiting import until
from support.worker_process import free_ports

ALERTMANAGER = ROOT / "alertmanager"
RENDER = ALERTMANAGER / "render"

pytestmark = pytest.mark.needs("alertmanager")

CHANNELS = {
    "slack": {"slack_url": "https://hooks.example.com/services/SECRET1\n"},
    "webhook": {"webhook_url": "http://127.0.0.1:9/SECRET2\r\n"},
    "watchdog": {"watchdog_url": "https://dms.example.com/SECRET3"},
    "email": {
        "smtp_host": "mail.example.com:587\n",
        "smtp_from": "Watch O'Neil <watch@example.com>\n",
        "smtp_to": "a@example.com, b@example.com\n",
    },
    "login": {"smtp_user": "o'neil\n", "smtp_password": "SECRET4\n"},
}
SHELLS = [
    pytest.param(["sh"], id="sh"),
    pytest.param(["busybox", "sh"], id="busybox", marks=pytest.mark.needs("busybox")),
]


def secrets_of(directory: Path, files: dict[str, str]) -> Path:
    """A directory of secret files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_bytes(text.encode())
    return directory


def render(
    shell: list[str], output: Path, secrets: Path, script: Path = RENDER
) -> subprocess.CompletedProcess[str]:
    """alertmanager/render, writing only. Under busybox, PATH has busybox's tools and no others."""
    environment = {"ALERTMANAGER_SECRETS": str(secrets), "PATH": os.environ["PATH"]}
    if shell[0] == "busybox":
        tools = output.parent / "busybox-tools"
        if not tools.exists():
            tools.mkdir()
            subprocess.run(["busybox", "--install", "-s", str(tools)], check=True, timeout=30)
        environment["PATH"] = str(tools)
        shell = [str(tools / "sh")]
    return subprocess.run(
        [*shell, str(script), str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def amtool(*arguments: str) -> str:
    done = subprocess.run(
        ["amtool", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def receivers(config: Path) -> dict[str, set[str]]:
    """Receiver name to the kinds of integration it has."""
    parsed = yaml.safe_load(config.read_text(encoding="utf-8"))
    return {r["name"]: {key for key in r if key != "name"} for r in parsed["receivers"]}


def test_the_shipped_file_is_valid_as_it_is_and_notifies_nobody() -> None:
    """Whoever starts Alertmanager on it without the renderer gets the routes and no surprise."""
    amtool("check-config", str(ALERTMANAGER / "alertmanager.yml"))
    assert set().union(*receivers(ALERTMANAGER / "alertmanager.yml").values()) == set()


@pytest.mark.parametrize("shell", SHELLS)
def test_every_combination_of_channels_gives_a_valid_configuration(
    shell: list[str], tmp_path: Path
) -> None:
    """All 24 (a login only with e-mail), each channel where it belongs and nowhere else."""
    combinations = [
        chosen
        for size in range(len(CHANNELS) + 1)
        for chosen in itertools.combinations(CHANNELS, size)
        if "login" not in chosen or "email" in chosen
    ]
    assert len(combinations) == 24
    for number, chosen in enumerate(combinations):
        files = {name: text for channel in chosen for name, text in CHANNELS[channel].items()}
        output = tmp_path / f"{number}.yml"
        done = render(shell, output, secrets_of(tmp_path / str(number), files))
        assert done.returncode == 0, done.stderr
        amtool("check-config", str(output))
        everyone = {f"{c}_configs" for c in ("slack", "webhook") if c in chosen}
        people = everyone | ({"email_configs"} if "email" in chosen else set())
        assert receivers(output) == {
            "unrouted": everyone,
            "critical": people,
            "warning": people,
            "info": everyone,
            "watchdog": {"webhook_configs"} if "watchdog" in chosen else set(),
        }
        assert "SECRET" not in output.read_text(encoding="utf-8")
        assert "@S" not in output.read_text(encoding="utf-8")
        assert output.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_email_values_survive_quoting_and_windows_line_ends(
    shell: list[str], tmp_path: Path
) -> None:
    """An apostrophe in a name is common; so is a file saved by Notepad."""
    files = {
        name: text.replace("\n", "\r\n")
        for channel in ("email", "login")
        for name, text in CHANNELS[channel].items()
    } | {"smtp_require_tls": "false\r\n"}
    secrets = secrets_of(tmp_path / "it's a directory", files)
    assert render(shell, tmp_path / "am.yml", secrets).returncode == 0
    parsed = yaml.safe_load((tmp_path / "am.yml").read_text(encoding="utf-8"))
    (critical,) = (r for r in parsed["receivers"] if r["name"] == "critical")
    (mail,) = critical["email_configs"]
    assert mail["smarthost"] == "mail.example.com:587"
    assert mail["from"] == "Watch O'Neil <watch@example.com>"
    assert mail["to"] == "a@example.com, b@example.com"
    assert mail["require_tls"] is False
    assert mail["auth_username"] == "o'neil"
    assert mail["auth_password_file"] == f"{secrets}/smtp_password"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("files", "problems"),
    [
        ({"slack_url": "SECRET"}, ["slack_url: not an http:// or https:// URL"]),
        ({"webhook_url": "ftp://SECRET"}, ["webhook_url: not an http"]),
        ({"smtp_to": "a@SECRET"}, ["smtp_host: missing", "smtp_from: missing"]),
        (CHANNELS["email"] | {"smtp_host": "mail"}, ["smtp_host: not host:port"]),
        (CHANNELS["email"] | {"smtp_user": "u"}, ["smtp_password: missing"]),
        (CHANNELS["email"] | {"smtp_password": "SECRET"}, ["smtp_user: missing"]),
        (CHANNELS["email"] | {"smtp_require_tls": "no"}, ["smtp_require_tls: neither"]),
        (
            {"slack_url": "x", "watchdog_url": "y", "smtp_host": "z"},
            ["slack_url:", "watchdog_url:", "smtp_from:", "smtp_to:", "smtp_host:"],
        ),
    ],
)
def test_unusable_secret_files_are_all_named_and_nothing_is_written(
    shell: list[str], files: dict[str, str], problems: list[str], tmp_path: Path
) -> None:
    """Exit code 78, every problem in one message, none of the contents."""
    done = render(shell, tmp_path / "am.yml", secrets_of(tmp_path / "s", files))
    assert done.returncode == 78
    for problem in problems:
        assert problem in done.stderr
    assert "SECRET" not in done.stderr
    assert not (tmp_path / "am.yml").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_secret_that_alertmanager_may_not_read_is_named(tmp_path: Path) -> None:
    """In the image it runs as uid 65534; a file with mode 0600 is the likeliest mistake."""
    home = Path(tempfile.mkdtemp())  # not tmp_path: its parents are closed to others
    try:
        shutil.copytree(ALERTMANAGER, home / "alertmanager")
        secret = secrets_of(home / "s", CHANNELS["slack"]) / "slack_url"
        secret.chmod(0o600)
        for path in (home, home / "s"):
            path.chmod(0o777)
        done = subprocess.run(
            [
                *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh"),
                str(home / "alertmanager" / "render"),
                str(home / "am.yml"),
            ],
            env={"ALERTMANAGER_SECRETS": str(home / "s"), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        shutil.rmtree(home)
    assert done.returncode == 78
    assert "slack_url: not readable by uid 65534; try chmod 644" in done.stderr


def test_an_empty_secret_file_leaves_its_channel_off(tmp_path: Path) -> None:
    """That is how Compose and people make placeholders."""
    files = dict.fromkeys(["slack_url", "webhook_url", "watchdog_url", "smtp_host"], "")
    done = render(["sh"], tmp_path / "am.yml", secrets_of(tmp_path / "s", files))
    assert done.returncode == 0
    assert "channels on: none" in done.stderr
    amtool("check-config", str(tmp_path / "am.yml"))


def alert_labels() -> list[dict[str, str]]:
    """The static labels of every alert that the rules can fire."""
    return [
        {"alertname": rule["alert"], **rule["labels"]}
        for path in sorted((ROOT / "prometheus" / "rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]


def route_of(labels: dict[str, str]) -> str:
    pairs = [f"{name}={value}" for name, value in labels.items()]
    config = f"--config.file={ALERTMANAGER / 'alertmanager.yml'}"
    return amtool("config", "routes", "test", config, *pairs).strip()


def test_every_alert_goes_to_the_receiver_of_its_severity() -> None:
    """By amtool, for each alert in the rules; the Watchdog goes to its own."""
    for labels in alert_labels():
        expected = "watchdog" if labels["alertname"] == "Watchdog" else labels["severity"]
        assert route_of(labels) == expected


def test_an_alert_of_an_unknown_severity_is_not_lost() -> None:
    """A typo in a rule reaches the same channels as everything else."""
    assert route_of({"alertname": "Mine", "severity": "criticle"}) == "unrouted"


def test_every_alert_named_in_an_inhibition_exists() -> None:
    """A renamed alert would silently stop being silenced."""
    config = yaml.safe_load((ALERTMANAGER / "alertmanager.yml").read_text(encoding="utf-8"))
    names = {labels["alertname"] for labels in alert_labels()}
    for rule in config["inhibit_rules"]:
        for matcher in [*rule["source_matchers"], *rule["target_matchers"]]:
            found = re.fullmatch(r'alertname(?:=~|!=|=)"([^"]+)"', matcher)
            if found:
                assert set(found[1].split("|")) <= names


# ---- delivery -----------------------------------------------------------------------------------


def sped_up(text: str) -> str:
    """A configuration or rule file with a faster clock: the documented difference to production.

    Every ``*_interval``, ``*_timeout``, ``group_wait`` and ``for`` shrinks: seconds to one second,
    minutes to as many seconds, hours to minutes; and by flag Prometheus' resend delay.
    """

    def faster(match: re.Match[str]) -> str:
        unit = {"s": "1s", "m": f"{match[2]}s", "h": f"{match[2]}m"}[match[3]]
        return f"{match[1]}{unit}"

    return re.sub(r"\b((?:\w+_(?:interval|timeout|wait)|for): )(\d+)([smh])\b", faster, text)


def get(url: str) -> Any:
    """The JSON (or the text, where it is none) at an address."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    try:
        return json.loads(text)
    except ValueError:
        return text


class Server:
    """An HTTP server on loopback: ``page`` on GET, and what was POSTed in ``received``."""

    def __init__(self, port: int = 0) -> None:
        self.page = ""
        self.received: list[Any] = []
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(owner.page.encode())

            def do_POST(self) -> None:
                owner.received.append(
                    json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"ok")  # Slack's answer; Alertmanager insists on it

            def log_message(self, *_: object) -> None:
                """Silence."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.port = self._server.server_port
        self.address = f"127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def alerts(self, name: str, status: str) -> list[Any]:
        """Alerts of a name and status (firing, resolved) in what was received."""
        return [
            alert
            for message in list(self.received)
            for alert in message["alerts"]
            if alert["labels"]["alertname"] == name and alert["status"] == status
        ]


class Mailbox:
    """As much of an SMTP server as it takes to be handed a message; ``messages`` are raw."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        owner = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"220 here\r\n")
                while line := self.rfile.readline().decode().strip():
                    if line == "DATA":
                        self.wfile.write(b"354 go on\r\n")
                        lines = iter(lambda: self.rfile.readline().decode(), ".\r\n")
                        owner.messages.append("".join(lines))
                    self.wfile.write(b"221 bye\r\n" if line == "QUIT" else b"250 ok\r\n")

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Stack:
    """Prometheus and Alertmanager, as scripts/up runs them without Docker, and every channel."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.webhook, self.slack, self.watchdog = Server(), Server(), Server()
        self.plain, self.worker = Server(), Server()
        self.mailbox = Mailbox()
        self.prometheus, self.alertmanager = (f"127.0.0.1:{port}" for port in free_ports(2))
        for name in ("prometheus", "alertmanager"):
            shutil.copytree(ROOT / name, home / name)
        files = [home / "prometheus" / "prometheus.yml", home / "alertmanager" / "alertmanager.yml"]
        for path in [*files, *(home / "prometheus" / "rules").glob("*.yml")]:
            path.write_text(sped_up(path.read_text(encoding="utf-8")), encoding="utf-8")
        secrets = {
            "webhook_url": f"http://{self.webhook.address}/hook\n",
            "watchdog_url": f"http://{self.watchdog.address}/beat\n",
            "slack_url": f"http://{self.slack.address}/services/x\n",
            "smtp_host": f"{self.mailbox.address}\n",
            "smtp_from": "Watch <watch@example.com>\n",
            "smtp_to": "oncall@example.com\n",
            "smtp_require_tls": "false\n",
        }
        secrets_of(home / "alertmanager" / "secrets", secrets)
        for job in ("prometheus", "alertmanager", "worker"):
            self.local(job, getattr(self, job) if job != "worker" else self.worker.address)
        target = [{"targets": [self.plain.address], "labels": {"environment": "prod"}}]
        (home / "prometheus" / "targets" / "plain.yml").write_text(json.dumps(target))
        self.processes = [
            self.start(
                "alertmanager",
                *("sh", str(home / "alertmanager" / "render"), str(home / "am" / "rendered.yml")),
                f"--storage.path={home / 'am' / 'data'}",
                f"--web.listen-address={self.alertmanager}",
                "--cluster.listen-address=",
            ),
            self.start(
                "prometheus",
                "prometheus",
                f"--config.file={home / 'prometheus' / 'prometheus.yml'}",
                f"--storage.tsdb.path={home / 'data'}",
                f"--web.listen-address={self.prometheus}",
                # An alert that fired before Alertmanager was found is sent again after this (1m).
                "--rules.alert.resend-delay=2s",
            ),
        ]
        for address in (self.alertmanager, self.prometheus):
            until(f"{address} is ready", lambda a=address: get(f"http://{a}/-/ready"))  # type: ignore[misc]

    def local(self, job: str, address: str) -> None:
        """What ``scripts/up`` writes without Docker."""
        directory = self.home / ".local" / "prometheus"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{job}.yml").write_text(json.dumps([{"targets": [address]}]))

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        (self.home / "am").mkdir(exist_ok=True)
        with (self.home / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd="/")

    def query(self, expr: str) -> list[Any]:
        query = urllib.parse.urlencode({"query": expr})
        result = get(f"http://{self.prometheus}/api/v1/query?{query}")["data"]["result"]
        assert isinstance(result, list)
        return result

    def in_alertmanager(self, name: str) -> list[Any]:
        """Alerts of a name that Alertmanager holds, silenced ones included."""
        alerts = get(f"http://{self.alertmanager}/api/v2/alerts")
        return [alert for alert in alerts if alert["labels"]["alertname"] == name]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)
        for server in (self.webhook, self.slack, self.watchdog, self.plain, self.worker):
            server.close()
        self.mailbox.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One for all delivery tests: each uses a target of its own."""
    started = Stack(tmp_path_factory.mktemp("stack"))
    yield started
    started.close()


READY = (
    'llm_worker_state{{state="ready"}} {ready}\nllm_worker_state{{state="starting"}} {starting}\n'
)


@pytest.mark.needs("prometheus")
def test_a_target_that_dies_is_notified_with_its_labels_and_resolved_when_it_is_back(
    stack: Stack,
) -> None:
    """Rule, route, renderer and webhook in one: what a person would get, and when it is over."""
    until("the target is scraped", lambda: stack.query('up{job="vllm"} == 1'))
    assert not stack.webhook.alerts("TargetDown", "firing")
    stack.plain.close()
    until("TargetDown is notified", lambda: stack.webhook.alerts("TargetDown", "firing"))
    (alert, *_) = stack.webhook.alerts("TargetDown", "firing")
    assert alert["labels"] == {
        "alertname": "TargetDown",
        "environment": "prod",
        "instance": stack.plain.address,
        "job": "vllm",
        "scope": "serving",
        "severity": "critical",
    }
    assert alert["annotations"]["runbook_url"].endswith("/runbooks/TargetDown.md")
    message = next(m for m in stack.webhook.received if alert in m["alerts"])
    assert message["receiver"] == "critical"
    reads_well = f"{stack.plain.address} (job vllm) has failed every scrape"
    title = "[FIRING:1] critical: TargetDown (vllm, prod)"

    def told() -> list[dict[str, Any]]:
        posts = [post["attachments"][0] for post in list(stack.slack.received)]
        return [attachment for attachment in posts if attachment["title"] == title]

    def mailed() -> list[str]:
        return [text for text in list(stack.mailbox.messages) if f"Subject: {title}" in text]

    until("Slack is told", told)
    attachment = told()[0]
    assert attachment["color"] == "danger"
    assert attachment["text"].startswith("A vLLM server does not answer Prometheus.")
    assert reads_well in attachment["text"]
    assert "Runbook: https://" in attachment["text"]
    until("a mail is sent", mailed)
    mail = email.message_from_string(mailed()[0])
    assert (mail["From"], mail["To"]) == ("Watch <watch@example.com>", "oncall@example.com")
    bodies = [part.get_payload(decode=True) for part in mail.walk() if not part.is_multipart()]
    assert any(isinstance(body, bytes) and reads_well in body.decode() for body in bodies)
    stack.plain = Server(stack.plain.port)
    until("TargetDown is resolved", lambda: stack.webhook.alerts("TargetDown", "resolved"))


@pytest.mark.needs("prometheus")
def test_a_dead_engine_pages_once_and_silences_what_follows_from_it(stack: Stack) -> None:
    """EngineDied arrives; WorkerNotReady of the same worker fires, is inhibited, never arrives."""
    stack.worker.page = READY.format(ready=0, starting=1) + (
        f'llm_worker_last_exit_timestamp_seconds{{reason="engine_dead"}} {time.time():.0f}\n'
    )
    until("EngineDied is notified", lambda: stack.webhook.alerts("EngineDied", "firing"))
    firing = 'ALERTS{alertname="WorkerNotReady",alertstate="firing"}'
    until("WorkerNotReady fires in Prometheus", lambda: stack.query(firing))
    until("Alertmanager holds WorkerNotReady", lambda: stack.in_alertmanager("WorkerNotReady"))
    (source,) = stack.in_alertmanager("EngineDied")
    (silenced,) = stack.in_alertmanager("WorkerNotReady")
    assert silenced["status"]["state"] == "suppressed"
    assert source["fingerprint"] in silenced["status"]["inhibitedBy"]
    time.sleep(3)  # longer than group_wait and group_interval are here
    assert not stack.webhook.alerts("WorkerNotReady", "firing")


@pytest.mark.needs("prometheus")
def test_the_watchdog_beats_on_its_own_receiver_and_nowhere_else(stack: Stack) -> None:
    """Again and again: a dead man's switch needs a beat, and people need none."""
    until("two beats", lambda: len(stack.watchdog.received) >= 2)
    assert {message["receiver"] for message in stack.watchdog.received} == {"watchdog"}
    assert not stack.webhook.alerts("Watchdog", "firing")


@pytest.mark.needs("prometheus")
def test_the_metrics_about_alerting_have_the_names_that_the_rules_ask_for(stack: Stack) -> None:
    """On the pages of the real programs, once they talk to each other."""
    pages = {
        "alertmanager": str(get(f"http://{stack.alertmanager}/metrics")),
        "prometheus": str(get(f"http://{stack.prometheus}/metrics")),
    }
    rules = "\n".join(
        re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
        for path in (ROOT / "prometheus" / "rules").glob("*.yml")
    )
    for program, page in pages.items():
        asked = set(re.findall(rf"\b{program}_[a-z_]+", rules))
        assert asked
        missing = {n for n in asked if not re.search(rf"^{n}[ {{]", page, re.MULTILINE)}
        assert not missing
