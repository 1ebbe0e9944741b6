"""A listener whose publisher is killed while it answers, again and again.

Run as a program, so that an abort of libzmq ends this process and not the tests':
``python tests/kv_killed_answer.py ROUNDS``. The publisher is another process, and does no more than
a PUB and a ROUTER must. The exit code is 0 where the listener lived through all rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "worker"))

from llm_worker.kv.follow.listener import Listener
from llm_worker.kv.index.index import Index
from llm_worker.kv.pipeline import Pipeline
from llm_worker.kv.records import BlockStored
from llm_worker.kv.wire import encode

BATCHES = 50_000  # of an answer: more than is read at once
WAIT_SECONDS = 20.0


def end_with_parent() -> None:
    """Nobody else ends the publisher of a listener that aborted."""
    sys.stdin.read()
    os._exit(0)


def publish(events: str, answers: str) -> None:
    """The publisher: it answers each question with all from there on, until it is killed."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    context = zmq.Context()
    publisher, router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
    router.setsockopt(zmq.SNDHWM, 0)
    publisher.bind(events)
    router.bind(answers)
    payload = encode(time.time(), [BlockStored(hashes=[1], block_size=16)], 0)
    while True:
        client, _, start = router.recv_multipart()
        for number in range(int.from_bytes(start, "big"), BATCHES):
            router.send_multipart([client, b"", b"", number.to_bytes(8, "big"), payload])


def wait(listener: Listener, batches: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while listener.stats.batches_replayed < batches:
        assert time.monotonic() < deadline, "no answer"
        time.sleep(0.0005)


def main(rounds: int) -> None:
    with zmq.Context() as context, context.socket(zmq.PUB) as first, context.socket(zmq.PUB) as two:
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (first, two)]
    endpoints = [f"tcp://127.0.0.1:{port}" for port in ports]
    pipeline = Pipeline(Index())
    pipeline.start()
    listener = pipeline.listen(*endpoints, worker="w", rank=0)
    for each in range(rounds):
        already = listener.stats.batches_replayed
        process = subprocess.Popen([sys.executable, __file__, *endpoints], stdin=subprocess.PIPE)
        try:
            wait(listener, already + 1 + 997 * (each % 7))
        finally:
            process.kill()
            process.wait()
        print(each + 1, flush=True)
    assert pipeline.crashes == listener.stats.crashes == 0
    pipeline.close()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(int(sys.argv[1]))
    else:
        publish(*sys.argv[1:])
