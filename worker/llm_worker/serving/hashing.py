"""A prompt's block hashes, by the engine's own functions.

Source: vllm/v1/core/kv_cache_utils.py, 0.32.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from llm_worker.serving.core_truth import Hashing

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

# No tokenizer known makes one token of more characters: a longer text cannot fit the model.
MAX_TOKEN_CHARACTERS = 256


def hash_blocks(
    llm: AsyncLLM,
    hashing: Hashing | None,
    asked: str | Sequence[int],
    lora_request: Any,
    cache_salt: str | None,
) -> list[int | bytes]:
    """The hashes of the full blocks of ``asked``, a prompt or its token ids; any thread.

    Raises:
        ValueError: it cannot be a prompt of this engine.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    if hashing is None or not hashing.none_hash:
        raise ValueError("the engine hashes no blocks: is prefix caching on?")
    tokens = _tokens(llm, asked)
    request: Any = SimpleNamespace(
        mm_features=[], prompt_embeds=None, cache_salt=cache_salt, lora_request=lora_request
    )
    function = get_hash_fn_by_name(llm.vllm_config.cache_config.prefix_caching_hash_algo)
    size = hashing.hash_block_size
    hashes: list[int | bytes] = []
    # The engine may have been given another seed than this process.
    parent = hashing.none_hash
    for start in range(0, len(tokens) - size + 1, size):
        extra, _ = kv_cache_utils.generate_block_hash_extra_keys(request, start, start + size, 0)
        parent = kv_cache_utils.hash_block_tokens(
            function, parent, tokens[start : start + size], extra
        )
        hashes.append(
            int.from_bytes(parent, "big") & ((1 << 64) - 1) if hashing.integers else parent
        )
    step = hashing.block_size // size
    return hashes[step - 1 :: step]


def _tokens(llm: AsyncLLM, asked: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt that the model could take; what cannot be one is not tokenised."""
    limit = llm.model_config.max_model_len
    if isinstance(asked, str):
        if len(asked) > limit * MAX_TOKEN_CHARACTERS:
            raise ValueError(f"a prompt of {len(asked)} characters is more than {limit} tokens")
        tokens: list[int] = llm.get_tokenizer().encode(asked)
    else:
        tokens = list(asked)
    if len(tokens) > limit:
        raise ValueError(f"{len(tokens)} tokens are more than the model's {limit}")
    vocabulary = llm.model_config.get_vocab_size()
    if any(type(token) is not int or not 0 <= token < vocabulary for token in tokens):
        raise ValueError(f"token ids are integers from 0 to {vocabulary - 1}")
    return tokens
