"""The directory through which several processes share their metrics, and its files' lives.

prometheus_client writes every value of a process into ``<type>_<pid>.db`` files, memory-mapped, in
the directory that ``PROMETHEUS_MULTIPROC_DIR`` names *when it is imported*. Hence the order this
module keeps: it never imports prometheus_client at its top, `prepare_multiprocess` is the first
thing a process does, and it refuses to go on where it comes too late.

Whose files count:

* In a directory of our own nobody else ever wrote; it goes when we go. What a killed worker left
  behind is removed by the next one: the lock its owner held is free.
* In a directory given to us, files of dead processes are from an earlier run unless a living
  process uses the directory. prometheus_client wants it "wiped between runs": kept gauges of a dead
  run would be shown for ever, and a process that gets a used pid would go on counting on top of
  strangers' numbers. So an abandoned directory is wiped.
* While the directory is in use, a dead process's counters, histograms and summaries stay, or the
  totals would fall and Prometheus would see a reset that never was; so do the gauges whose mode
  says "alive or dead". Its ``live*`` gauges go, before every collection.

Writes one environment variable, the one prometheus_client reads; never decides by it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import mmap
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

from llm_worker.exposition.direct import collectors

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
AUTO = "auto"
PREFIX = "llm_worker_prometheus_"

_LOCK = "owner.lock"
_FILE_BYTES = 1 << 16  # what prometheus_client allocates for a new file
_SETTLED_SECONDS = 60.0  # a directory this young may not have taken its lock yet
# What reading one damaged file raises: cut short, overwritten, misnamed, gone.
_DAMAGE = (OSError, ValueError, TypeError, IndexError, RuntimeError, struct.error)


class MultiprocessError(ValueError):
    """The directory cannot be used. At the start: handled by ``__main__``, exit 78.

    While collecting: handled by `exposition.Exposition`, which counts it and goes on.
    """

    def __init__(self, path: Path, problem: str, fix: str) -> None:
        super().__init__(f"multiprocess directory {path}: {problem}. To fix it: {fix}")
        self.path = path
        self.problem = problem
        self.fix = fix


class MultiprocessDirectory:
    """A usable directory that prometheus_client writes to, from `prepare_multiprocess`.

    A context manager; leaving it (or the interpreter's exit) removes a directory of our own, and
    this process's ``live*`` gauges from one given to us. A forked child leaves it alone.
    """

    def __init__(self, path: Path, *, owned: bool, removed: int, lock: int | None) -> None:
        self.path = path
        self.owned = owned  # ours, removed on exit
        self.removed = removed  # files of earlier runs removed at the start
        self._lock = lock
        self._pid = os.getpid()
        self._closed = False
        atexit.register(self.close)

    def __enter__(self) -> MultiprocessDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take this process out of the directory, or the directory off the disk. Idempotent."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self.owned:
            shutil.rmtree(self.path, ignore_errors=True)
            os.environ.pop(VARIABLE, None)
        else:
            _drop_live_gauges(self.path, self._pid)
        if self._lock is not None:
            os.close(self._lock)

    def forget_dead(self) -> int:
        """Remove the ``live*`` gauges of processes that ended; how many processes that were."""
        dead = {
            pid
            for file in self.path.glob("gauge_live*.db")
            if (pid := _pid_of(file)) is not None and not _alive(pid)
        }
        for pid in dead:
            _drop_live_gauges(self.path, pid)
        return len(dead)

    def collect(self) -> Iterator[Metric]:
        """All processes' families, aggregated by prometheus_client, each once.

        Never through a registry: one that also holds a process's own metrics would call every
        family a duplicate.

        Raises:
            MultiprocessError: the directory is gone; or, after every family that can be read, some
                file cannot.
        """
        if not self.path.is_dir():
            raise MultiprocessError(
                self.path, "it was removed while in use", "restart the worker; keep cleaners out"
            )
        self.forget_dead()
        files = sorted(str(file) for file in self.path.glob("*.db"))
        damaged: list[str] = []
        try:
            families = _merge(files)
        except _DAMAGE:
            readable = [file for file in files if _readable(file)]
            damaged = [Path(file).name for file in sorted(set(files) - set(readable))]
            families = _merge(readable)
        yield from families
        damaged = [name for name in damaged if (self.path / name).exists()]
        if damaged:
            raise MultiprocessError(
                self.path,
                f"cannot read {', '.join(damaged)}; shown without",
                "stop the worker, empty the directory, start again",
            )


class NotInFiles:
    """A registry's collectors that keep no values of their own, and so none in the files."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Their families."""
        from prometheus_client.metrics import MetricWrapperBase

        for collector in collectors(self._registry):
            if not isinstance(collector, MetricWrapperBase):
                yield from collector.collect()


def prepare_multiprocess(setting: str | None) -> MultiprocessDirectory | None:
    """Make ready where processes share their metrics. Before anything imports prometheus_client.

    ``setting`` is None for one process, where there is nothing to do, or ``"auto"`` for a temporary
    directory of our own; otherwise a directory that exists, such as the one that
    ``PROMETHEUS_MULTIPROC_DIR`` named already.

    Raises:
        MultiprocessError: prometheus_client was imported already and keeps its values elsewhere; or
            the directory is missing, not writable, full, or cannot hold memory-mapped files.
    """
    if setting is None:
        return None
    if setting == AUTO:
        _sweep(Path(tempfile.gettempdir()))
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            lock = _take_lock(path)
            _require_usable(path)
            _publish(path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return MultiprocessDirectory(path, owned=True, removed=0, lock=lock)
    path = Path(setting).absolute()
    _require_usable(path)
    _publish(path)
    return MultiprocessDirectory(path, owned=False, removed=_wipe_abandoned(path), lock=None)


def _publish(path: Path) -> None:
    """Tell prometheus_client the directory, or say why it cannot hear us any more."""
    ours = VARIABLE not in os.environ
    before = os.environ.setdefault(VARIABLE, str(path))
    values = sys.modules.get("prometheus_client.values")
    if values is not None:
        shared = bool(values.ValueClass._multiprocess)
        if not shared or os.path.realpath(before) != os.path.realpath(path):
            if ours:
                del os.environ[VARIABLE]
            raise MultiprocessError(
                path,
                "prometheus_client was imported before it was set and keeps its values "
                + (f"in {before}" if shared else "in memory"),
                f"start the worker with {VARIABLE}={path}, or call prepare_multiprocess before "
                "anything imports prometheus_client (vllm does)",
            )
    os.environ[VARIABLE] = str(path)


def _require_usable(path: Path) -> None:
    """Do what prometheus_client will do: allocate a file, write through a map, read it back.

    The zeros are written, not skipped over: on a full file system a write into a hole of a mapped
    file is a SIGBUS, not an error.
    """
    another = f"or choose another directory on a local file system, or {AUTO!r}"
    if not path.exists():
        raise MultiprocessError(path, "it does not exist", f"create it (mkdir -p), {another}")
    if not path.is_dir():
        raise MultiprocessError(path, "it is not a directory", another.removeprefix("or "))
    probe = path / f".probe_{os.getpid()}"
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
    except OSError as error:
        raise MultiprocessError(
            path,
            f"it is not writable ({error.strerror})",
            f"let user id {os.geteuid()} write there, {another}",
        ) from error
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(bytes(_FILE_BYTES))  # all of it, or ENOSPC
        os.fsync(descriptor)
        with mmap.mmap(descriptor, _FILE_BYTES) as mapped:
            mapped[:8] = b"llm_work"
        seen = os.pread(descriptor, 8, 0)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MultiprocessError(
            path,
            f"it cannot hold a memory-mapped file of {_FILE_BYTES} bytes ({reason})",
            f"free some space if it is full, {another}",
        ) from error
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            probe.unlink()
    if seen != b"llm_work":
        raise MultiprocessError(
            path,
            "what is written through a memory map is not there when the file is read",
            another.removeprefix("or "),
        )


def _take_lock(path: Path) -> int | None:
    """Hold the directory for as long as this process, or a child it forked, lives."""
    descriptor = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # no locks on this file system: then nobody can mistake it for abandoned
        os.close(descriptor)
        return None
    return descriptor


def _sweep(parent: Path) -> None:
    """Remove our own temporary directories whose owner was killed: nobody holds their lock."""
    for lock in parent.glob(f"{PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # another user's, another sweeper's, or held
            facts = lock.parent.lstat()
            young = time.time() - facts.st_mtime < _SETTLED_SECONDS
            if facts.st_uid != os.geteuid() or young or lock.parent.is_symlink():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
            finally:
                os.close(descriptor)


def _wipe_abandoned(path: Path) -> int:
    """Remove what an earlier run left, if no living process uses the directory; how many files."""
    files = {file: pid for file in path.glob("*.db") if (pid := _pid_of(file)) is not None}
    if any(_in_use(file, pid) for file, pid in files.items()):
        return 0
    removed = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            removed += 1
    return removed


def _drop_live_gauges(path: Path, pid: int) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    with contextlib.suppress(FileNotFoundError):  # another process cleans up, too
        mark_process_dead(pid, str(path))  # type: ignore[no-untyped-call]


def _merge(files: list[str]) -> Iterable[Metric]:
    from prometheus_client.multiprocess import MultiProcessCollector

    merged = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
    return cast("Iterable[Metric]", merged)


def _readable(file: str) -> bool:
    try:
        _merge([file])
    except _DAMAGE:
        return False
    return True


def _pid_of(file: Path) -> int | None:
    """The process that wrote ``counter_12.db``; None where the name holds no pid."""
    tail = file.stem.rpartition("_")[2]
    return int(tail) if tail.isdecimal() else None


def _alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return False
    try:  # no /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _in_use(file: Path, pid: int) -> bool:
    """Whether the process that the name speaks of has the file mapped: pids are used again.

    A process whose maps we may not read is taken at its pid's word.
    """
    if not _alive(pid):
        return False
    try:
        return f"/{file.name}" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return True
