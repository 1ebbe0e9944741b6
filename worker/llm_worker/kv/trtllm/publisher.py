"""An engine's KV events on ZMQ in vLLM's format, for engines that do not publish by themselves.

Block hashes and tokens → vLLM's events → `EventSocket`, which numbers, sends and replays them.
Never reads events, and knows no engine.
Source: vllm/distributed/kv_events.py, 0.32.0.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import msgspec
import zmq

from llm_worker.kv.plane.transport import EventSocket
from llm_worker.kv.records import ALL_MEDIA
from llm_worker.kv.stats import PlaneStats


def unsigned(block_hash: int | bytes) -> int | bytes:
    """A block hash as vLLM writes it: integers are unsigned 64-bit, two's complement if negative.

    Raises:
        ValueError: it has more than 64 bits.
    """
    if isinstance(block_hash, bytes):
        return block_hash
    if not -(1 << 63) <= block_hash < 1 << 64:
        raise ValueError(f"a block hash has 64 bits, which {block_hash} exceeds")
    return block_hash & 0xFFFF_FFFF_FFFF_FFFF


class ZmqKvEventPublisher:
    """An engine's KV events on ZMQ, as vLLM's ``ZmqEventPublisher`` would send them.

    One message for each call, or one for a whole `batch`. Any thread may call; calls from several
    during one's `batch` wait for it.
    """

    def __init__(
        self,
        zmq_endpoint: str,
        kv_block_size: int,
        topic: str = "",
        *,
        replay_endpoint: str | None = None,
        data_parallel_rank: int = 0,
        buffer_batches: int = 10_000,
        high_water_mark_batches: int = 100_000,
        stats: PlaneStats | None = None,
        clock: Callable[[], float] = time.time,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """``kv_block_size`` is in tokens; only full blocks can be published.

        ``data_parallel_rank`` (attention-DP rank in TensorRT-LLM) is what batches are marked with
        unless the event says otherwise. Each rank wants a publisher of its own, at its own port
        (`offset_port`), as in vLLM. Both endpoints are bound, unlike vLLM's, which connects one
        that names a host.

        Raises:
            zmq.ZMQError: an endpoint cannot be bound.
            ValueError: the block size or a bound is not positive.
        """
        if kv_block_size < 1:
            raise ValueError(f"a block has at least one token, not {kv_block_size}")
        self.kv_block_size = kv_block_size
        self.data_parallel_rank = data_parallel_rank
        self._topic = topic.encode()
        self._clock = clock
        self._encode = msgspec.msgpack.Encoder().encode
        self._lock = threading.RLock()
        self._batched: list[tuple[int, dict[str, Any]]] | None = None
        self.socket = EventSocket(
            zmq_endpoint,
            replay_endpoint,
            buffer_batches=buffer_batches,
            high_water_mark_batches=high_water_mark_batches,
            stats=stats,
            context=context,
        )
        self.stats = self.socket.stats

    def publish_stored(  # noqa: PLR0917 - the peer's callers pass them by position
        self,
        event_id: int | None,
        token_ids: Sequence[int],
        num_block_tokens: Sequence[int],
        block_hashes: Sequence[int | bytes],
        lora_id: int | None = None,
        parent_hash: int | bytes | None = None,
        *,
        lora_name: str | None = None,
        extra_keys: Sequence[Sequence[Any] | None] | None = None,
        medium: str | None = "GPU",
        group: int | None = None,
        attention_dp_rank: int | None = None,
    ) -> None:
        """Blocks became reusable, oldest first: the first continues ``parent_hash``.

        ``event_id`` is the engine's and not sent: the wire has its own sequence. Whoever filters
        events has to judge gaps in the engine's ids before that, as `trtllm.Translator` does.
        ``num_block_tokens`` has an entry for each block, all equal to the block size. ``token_ids``
        is that long in all, or empty for blocks that only changed their medium. ``lora_id`` 0 is
        TensorRT-LLM's way to say none.

        Raises:
            ValueError: lengths that contradict each other, a partial block, a hash of over 64 bits.
            RuntimeError: it is shut down.
        """
        wrong = {n for n in num_block_tokens if n != self.kv_block_size}
        if wrong:
            raise ValueError(
                f"blocks of {sorted(wrong)} tokens, where {self.kv_block_size} fill one"
            )
        if len(num_block_tokens) != len(block_hashes):
            raise ValueError(f"{len(num_block_tokens)} sizes for {len(block_hashes)} blocks")
        if token_ids and len(token_ids) != len(block_hashes) * self.kv_block_size:
            raise ValueError(f"{len(token_ids)} tokens for {len(block_hashes)} full blocks")
        event: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": [unsigned(block) for block in block_hashes],
            "parent_block_hash": None if parent_hash is None else unsigned(parent_hash),
            "token_ids": list(token_ids),
            "block_size": self.kv_block_size,
            "lora_id": lora_id or None,
            "medium": medium,
            "lora_name": lora_name,
        }
        if extra_keys is not None:
            event["extra_keys"] = list(extra_keys)
        if group is not None:
            event["group_idx"] = group
        self._publish(event, attention_dp_rank)

    def publish_removed(
        self,
        event_id: int | None,
        block_hashes: Sequence[int | bytes],
        *,
        medium: str | None = "GPU",
        group: int | None = None,
        attention_dp_rank: int | None = None,
    ) -> None:
        """Blocks can be found no more; ``event_id`` as in `publish_stored`.

        Raises:
            ValueError: a hash of over 64 bits.
            RuntimeError: it is shut down.
        """
        event: dict[str, Any] = {
            "type": "BlockRemoved",
            "block_hashes": [unsigned(block) for block in block_hashes],
            "medium": medium,
        }
        if group is not None:
            event["group_idx"] = group
        self._publish(event, attention_dp_rank)

    def publish_all_cleared(self, *, attention_dp_rank: int | None = None) -> None:
        """No block can be found any more.

        Raises:
            RuntimeError: it is shut down.
        """
        self._publish(_CLEARED, attention_dp_rank)

    def publish_lost(self, *, attention_dp_rank: int | None = None) -> None:
        """Events of the engine were lost: what it holds is not known any more.

        The wire has no word for it. Readers are told to forget everything, so that they never claim
        what is not there; then a sequence number is left out, so that they do not take what they
        get from now on for all there is; then an empty batch, so that they notice at once.

        Raises:
            RuntimeError: it is shut down.
        """
        rank = self.data_parallel_rank if attention_dp_rank is None else attention_dp_rank
        with self._lock:
            if self._batched is not None:
                batched, self._batched = self._batched, []
                self._send_runs(batched)
            self._send([_CLEARED], rank)
            self.socket.skip(self._topic)
            self._send([], rank)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Send what is published inside as one message (one for each run of events of a rank).

        What was published before an exception inside is sent as well: it has happened.
        """
        with self._lock:
            if self._batched is not None:  # within another
                yield
                return
            self._batched = []
            try:
                yield
            finally:
                batched, self._batched = self._batched, None
                self._send_runs(batched)

    def shutdown(self) -> None:
        """Close the sockets; what is queued is sent for at most a second. May be repeated."""
        self.socket.close()

    def _publish(self, event: dict[str, Any], rank: int | None) -> None:
        rank = self.data_parallel_rank if rank is None else rank
        with self._lock:
            if self._batched is not None:
                self._batched.append((rank, event))
            else:
                self._send([event], rank)

    def _send_runs(self, batched: list[tuple[int, dict[str, Any]]]) -> None:
        for rank, events in groupby(batched, key=lambda pair: pair[0]):
            self._send([event for _, event in events], rank)

    def _send(self, events: list[dict[str, Any]], rank: int) -> None:
        self.socket.publish(self._encode((self._clock(), events, rank)), self._topic)


# vLLM's event has no medium, and its readers ignore one; ours take it for "on all media".
_CLEARED = {"type": "AllBlocksCleared", "medium": ALL_MEDIA.upper()}


def offset_port(endpoint: str, rank: int) -> str:
    """The endpoint of a rank, by vLLM's rule: the port plus the rank; port 0 stays."""
    if rank == 0 or not endpoint.startswith("tcp://"):
        return f"{endpoint}_dp{rank}" if rank and endpoint.startswith("inproc://") else endpoint
    address, _, port = endpoint.rpartition(":")
    return endpoint if port in ("0", "*") else f"{address}:{int(port) + rank}"
