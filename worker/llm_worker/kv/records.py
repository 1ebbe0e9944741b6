"""What a KV event is: the three records that everything here is about.

Their field names on the wire stand with them, because a decoder builds them without a step between;
every other spelling is `wire`'s. Pure: no I/O, no clock, no logging.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

Hash: TypeAlias = int | bytes  # integers are unsigned, 64 bits
GPU = "gpu"  # the medium of the engine's own block pool; connectors keep others
# The medium of a clear that is of all on purpose. One that names none may be of the GPU's blocks
# only: vLLM 0.32 says nothing of what a connector keeps.
ALL_MEDIA = "all"
HASH_MASK = (1 << 64) - 1
MAX_HASH_BYTES = 64  # sha256 has 32

if TYPE_CHECKING:
    _Hash: TypeAlias = Hash
    _Medium: TypeAlias = str
else:  # what a decoder takes
    _BYTES = Annotated[bytes, Meta(min_length=1, max_length=MAX_HASH_BYTES)]
    _Hash = Annotated[int, Meta(ge=0)] | _BYTES
    _Medium = Literal["GPU", "CPU", "STORAGE"]  # the decoder makes no string of its own for these


class BlockStored(
    Struct,
    tag_field="type",
    tag="BlockStored",
    gc=False,
    kw_only=True,
    rename={
        "hashes": "block_hashes",
        "parent": "parent_block_hash",
        "adapter": "lora_name",
        "group": "group_idx",
        "kind": "kv_cache_spec_kind",
        "sliding_window": "kv_cache_spec_sliding_window",
        # A name that no payload has: what is no field of a struct is skipped, not decoded.
        "token_ids": "token_ids:unread",
    },
):
    """Blocks that became reusable, oldest first.

    ``token_ids`` holds ``len(hashes) * block_size`` entries when they were asked for and the
    publisher has them, else None. ``extra_keys`` has one entry per block, or is None.
    """

    hashes: list[_Hash]
    parent: _Hash | None = None
    block_size: int = 0  # tokens per block; 0: the publisher does not say
    medium: _Medium = "gpu"  # "gpu", "cpu", "storage", …: lower case
    adapter: str | None = None  # LoRA name, else its number as text; None is the base model
    group: int = 0  # KV-cache group; hybrid models have several
    extra_keys: list[Any] | None = None
    kind: str | None = None
    locality: str | None = None  # LOCAL or REMOTE as seen from the publisher
    sliding_window: int | None = None  # tokens
    ownership: str | None = None
    lora_id: int | None = None
    token_ids: Any = None


class BlockRemoved(
    Struct,
    tag_field="type",
    tag="BlockRemoved",
    gc=False,
    kw_only=True,
    rename={"hashes": "block_hashes", "group": "group_idx"},
):
    """Blocks that are gone. The wire does not say of which adapter: the hash does."""

    hashes: list[_Hash]
    medium: _Medium = "gpu"
    group: int = 0
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(Struct, tag_field="type", tag="AllBlocksCleared", gc=False, kw_only=True):
    """Nothing is held any more: on one medium, or on none (``medium`` is None)."""

    medium: str | None = None


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared
