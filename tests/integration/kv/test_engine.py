"""The KV pipeline on the real engine: its index is what the engine says that it holds."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_worker.kv.follow.listener import Listener
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.pipeline import Pipeline
from llm_worker.kv.records import Hash
from llm_worker.serving.tiny import CONFIG
from support.waiting import until
from support.worker_process import WorkerProcess, free_ports

pytestmark = pytest.mark.needs("vllm")

BLOCK_TOKENS = 32
KV_CACHE_BYTES = 3 * 2**20  # 192 blocks: a prompt of 4,096 tokens fills two thirds


def held(listener: Listener) -> set[Hash]:
    """The hashes that the index has of this rank."""
    assert isinstance(listener.source, Source)
    return listener.source.hashes()


def make_adapter(directory: Path) -> Path:
    """A LoRA adapter of random weights for the tiny model."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    rank, hidden = 8, CONFIG["hidden_size"]
    prefix = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    weights = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        for projection in ("q_proj", "v_proj"):
            weights[prefix.format(layer, projection, "A")] = torch.randn(rank, hidden)
            weights[prefix.format(layer, projection, "B")] = torch.randn(hidden, rank)
    save_file(weights, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"], "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """One engine with a small KV cache, an adapter, KV events and vLLM's development routes."""
    directory = tmp_path_factory.mktemp("kv")
    events, replay, plane = free_ports(3)
    if plane > 65_435:
        plane -= 1000
    running = WorkerProcess(
        directory / "log",
        (
            "--worker-kv-events-port", str(events), "--worker-kv-replay-port", str(replay),
            "--worker-kv-plane", f"zmq://127.0.0.1:{plane}", "--worker-id", "one",
            "--block-size", str(BLOCK_TOKENS), "--kv-cache-memory-bytes", str(KV_CACHE_BYTES),
            "--enable-lora", "--max-loras", "1", "--max-lora-rank", "8",
            "--lora-modules", f"adapter={make_adapter(directory / 'adapter')}",
        ),
        {"VLLM_SERVER_DEV_MODE": "1"},
    )  # fmt: skip
    running.plane_port = plane  # type: ignore[attr-defined]
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


def status(worker: WorkerProcess) -> dict[str, Any]:
    return dict(worker.get("/kv/status").json())


def source(worker: WorkerProcess) -> dict[str, Any]:
    (only,) = status(worker)["sources"]
    return dict(only)


def audit(worker: WorkerProcess) -> dict[str, Any]:
    (only,) = httpx.post(f"{worker.system}/kv/audit", timeout=30).json()["audits"]
    return dict(only)


def match(worker: WorkerProcess, **question: Any) -> httpx.Response:
    return httpx.post(f"{worker.system}/kv/match", json=question, timeout=30)


def matched(worker: WorkerProcess, **question: Any) -> int:
    """Blocks held of the prefix."""
    found = match(worker, **question).json()["matches"]
    return found[0]["blocks"] if found else 0


def dumped(worker: WorkerProcess) -> set[int]:
    lines = worker.get("/kv/dump").text.splitlines()
    return {value for line in map(json.loads, lines) for value in line.get("hashes", ())}


def tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(10, CONFIG["vocab_size"]) for _ in range(count)]


def test_under_eviction_with_adapter_salt_and_aborts_the_index_is_what_the_engine_holds(
    worker: WorkerProcess,
) -> None:
    """Shared prefixes, the same prompt twice at a time, tenants, an adapter, and hang-ups."""
    chance = random.Random(7)
    prefixes = [tokens(chance, 300) for _ in range(4)]

    def body(number: int) -> dict[str, Any]:
        # Neighbours are the same: run together, they hold the same blocks twice.
        own = random.Random(number // 2)
        asked: dict[str, Any] = {
            "prompt": own.choice(prefixes) + tokens(own, own.randrange(500)),
            "max_tokens": own.randrange(1, 80),
            "ignore_eos": True,
        }
        if own.random() < 0.3:
            asked["cache_salt"] = own.choice(["tenant a", "tenant b"])
        if own.random() < 0.3:
            asked["model"] = "adapter"
        return asked

    def run(number: int) -> None:
        asked = {"model": "tiny", **body(number)}
        if number % 9 == 0:
            address = f"{worker.api}/v1/completions"
            asked |= {"stream": True, "max_tokens": 500}
            with httpx.stream("POST", address, json=asked, timeout=120) as answer:
                next(answer.iter_lines())  # and hang up
            return
        assert worker.complete(**asked).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(120)))
    found: dict[str, Any] = {}

    def quiet() -> bool:
        found.update(audit(worker))
        return bool(found["outcome"] != "busy")

    until("no more events", quiet)
    assert found["outcome"] == "equal", found
    assert found["engine_blocks"] == found["index_blocks"] > 50
    entry = source(worker)
    assert entry["ok"]
    assert entry["batches"]["lost"] == 0
    samples = worker.samples()
    labels = '{engine="0",worker="one"}'
    assert samples[f"llm_worker_kv_audit_drift_blocks{labels}"] == 0
    assert samples[f"llm_worker_kv_blocks_removed_total{labels}"] > 100
    assert samples[f"llm_worker_kv_blocks_duplicate_total{labels}"] > 0
    assert samples[f"llm_worker_kv_blocks_unknown_removed_total{labels}"] == 0


def test_a_prompt_is_hashed_as_the_engine_hashes_it(worker: WorkerProcess) -> None:
    """Text and token ids, with and without salt and adapter; no other tenant's blocks match."""
    chance = random.Random(8)
    prompt = tokens(chance, 10 * BLOCK_TOKENS + 5)
    text = "Numbers that nobody looks at are worth nothing. " * 10
    asked: dict[str, Any] = {"max_tokens": 1}
    worker.complete(prompt=prompt, **asked)
    worker.complete(prompt=prompt, cache_salt="mine", **asked)
    worker.complete(prompt=prompt, model="adapter", **asked)
    worker.complete(prompt=text, **asked)
    until("a prefix of the prompt in the index", lambda: matched(worker, prompt=text) > 0)
    assert matched(worker, token_ids=prompt) == 10
    assert matched(worker, token_ids=prompt, cache_salt="mine") == 10
    assert matched(worker, token_ids=prompt, adapter="adapter") == 10
    assert matched(worker, token_ids=prompt, cache_salt="theirs") == 0
    assert matched(worker, token_ids=prompt, adapter="adapter", cache_salt="mine") == 0
    assert matched(worker, token_ids=[11, *prompt[1:]]) == 0
    assert match(worker, prompt=text).json()["blocks"] == matched(worker, prompt=text)
    assert "no adapter" in match(worker, token_ids=prompt, adapter="nope").json()["error"]
    assert match(worker, token_ids=[CONFIG["vocab_size"]]).status_code == 400


@pytest.mark.parametrize("route", ["/reset_prefix_cache", "/sleep?level=1"])
def test_a_reset_of_an_idle_engine_empties_the_index_at_once(
    worker: WorkerProcess, route: str
) -> None:
    """vLLM itself says so with the next step only, which an idle engine does not take."""
    worker.complete(prompt=tokens(random.Random(9), 200), max_tokens=1)
    until("the prompt's blocks in the index", lambda: status(worker)["held_blocks"] >= 6)
    httpx.post(worker.api + route, timeout=30).raise_for_status()
    until("an empty index", lambda: status(worker)["held_blocks"] == 0, 10)
    assert audit(worker)["outcome"] == "equal"
    if "sleep" in route:
        httpx.post(f"{worker.api}/wake_up", timeout=30).raise_for_status()
    worker.complete(prompt=tokens(random.Random(10), 200), max_tokens=1)
    until("the prompt's blocks in the index", lambda: status(worker)["held_blocks"] >= 6)
    assert audit(worker)["outcome"] == "equal"


def test_events_that_do_not_tell_the_truth_are_found_by_the_audit(worker: WorkerProcess) -> None:
    """vLLM reports reused blocks as stored once more where a request asks for that.

    Nothing on the wire tells such a report from a second copy, so they outlive their removal here,
    until the engine is asked: then the index is the engine's again.
    """
    chance = random.Random(12)
    prompt = tokens(chance, 10 * BLOCK_TOKENS)
    for _ in range(3):
        reporting = {"kv_cache_report_mode": "full"}
        worker.complete(prompt=prompt, max_tokens=1, vllm_xargs=reporting)
    for _ in range(25):  # more than the cache has room for
        worker.complete(prompt=tokens(chance, 10 * BLOCK_TOKENS), max_tokens=1)
    found = audit(worker)
    assert found["outcome"] == "drift"
    assert found["surplus_blocks"] > 0
    assert found["missing_blocks"] == 0
    assert source(worker)["ok"]
    assert audit(worker)["outcome"] == "equal"


def test_no_verdict_is_given_while_the_engine_computes(worker: WorkerProcess) -> None:
    """It would be one about another moment."""
    stream = worker.stream(max_tokens=2000)
    next(stream)
    found = audit(worker)
    stream.close()  # type: ignore[attr-defined]
    assert found["outcome"] == "busy"


def test_what_was_indexed_goes_out_on_the_plane(worker: WorkerProcess) -> None:
    """Somebody who starts late and listens to the plane has the same index."""
    port = worker.plane_port  # type: ignore[attr-defined]
    pipeline = Pipeline(Index())
    pipeline.start()
    try:
        listener = pipeline.listen(
            f"tcp://127.0.0.1:{port}",
            f"tcp://127.0.0.1:{port + 100}",
            worker="one",
            rank=0,
            topic="kv@one@0",
            epochs=True,
        )
        until("the index to be trusted", lambda: not listener.source.stale)
        worker.complete(prompt=tokens(random.Random(11), 500), max_tokens=1)
        until(
            "the listener and the worker to hold the same blocks",
            lambda: held(listener) == dumped(worker) and held(listener),
        )
        httpx.post(f"{worker.api}/reset_prefix_cache", timeout=30)
        until("the index to hold nothing", lambda: not held(listener))
        assert listener.stats.batches_lost == 0
    finally:
        pipeline.close()


def test_the_pipeline_does_not_outlive_the_worker_nor_hold_it_up(worker: WorkerProcess) -> None:
    """The last test: the worker ends in time, with code 0, and its plane's port is free."""
    stop = threading.Event()
    before = len(worker.log())

    def load() -> None:
        while not stop.is_set():
            try:
                worker.complete(prompt=tokens(random.Random(), 300), max_tokens=5)
            except httpx.HTTPError:
                return

    thread = threading.Thread(target=load)
    thread.start()
    try:
        time.sleep(0.5)
        worker.terminate()
        assert worker.wait(90) == 0
    finally:
        stop.set()
        thread.join()
    ours = [line for line in worker.log()[before:].splitlines() if "[llm_worker" in line]
    assert ours
    assert not [line for line in ours if "ERROR" in line or "CRITICAL" in line]
