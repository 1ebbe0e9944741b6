"""A model small enough for any machine: a two-layer Llama with a 512-token byte-level tokenizer.

Owns the files of ``--model tiny``: configuration, tokenizer and chat template, made on the spot
and never downloaded. There are no weights; vLLM fills them in (``--load-format dummy``), so the
engine, its scheduler and its KV cache are real and the text is noise.

As a command: ``python -m llm_worker.serving.tiny DIRECTORY``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

BOS, EOS, ROLE_START, ROLE_END = "<s>", "</s>", "<|start|>", "<|end|>"
VOCABULARY_SIZE = 512

# Llama shapes that vLLM's CPU attention accepts: head size 32, two KV heads.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY_SIZE,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    f"{ROLE_START}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{ROLE_END}\n"
    "{% endfor %}{% if add_generation_prompt %}"
    f"{ROLE_START}assistant\n"
    "{% endif %}"
)

# Enough plain English for the 252 merges that fill the vocabulary; the words do not matter.
CORPUS = (
    "The scheduler takes waiting requests, gives each the blocks that its prompt needs, and puts "
    "them into the running batch. Every step computes one token for each decoding request and as "
    "many prompt tokens as the budget allows. When no block is free, the youngest request is "
    "preempted: its blocks return to the pool and its tokens are computed again later. A prefix "
    "that was seen before is not computed at all. The time to the first token is the wait in the "
    "queue and the prefill together; the time between tokens is what a reader feels. Numbers that "
    "nobody looks at are worth nothing, and an alert that cries at night without reason is worth "
    "less. What can be measured can be understood, what is understood can be changed, and what "
    "changes should be measured again. Good engineers write things down, keep promises small, and "
    "check them often; great teams do the same with machines."
)


def directory_name() -> str:
    """A name that changes with this module, so that files of an older one are not kept for it."""
    return f"tiny-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"


def make(directory: Path) -> Path:
    """Write the tiny model's files into ``directory`` and return it.

    Files that are already there are kept, so calling it again costs nothing.

    Raises:
        OSError: the directory cannot be created or written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 1}
    for name, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
        ("config.json", CONFIG),
    ):
        if not (directory / name).exists():
            _write(directory / name, json.dumps(content, indent=2) + "\n")
    if not (directory / "tokenizer.json").exists():
        _write(directory / "tokenizer.json", _tokenizer().to_str(pretty=True))
    return directory


def _write(path: Path, text: str) -> None:
    """Make a file, whole or not at all: another worker may be starting, or this one be killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[BOS, EOS, ROLE_START, ROLE_END],  # ids 0 to 3
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    size = tokenizer.get_vocab_size()
    if size != VOCABULARY_SIZE:
        raise AssertionError(f"the corpus fills {size} of {VOCABULARY_SIZE} tokens: extend CORPUS")
    return tokenizer


def main() -> int:
    """Make the model in the directory named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m llm_worker.serving.tiny DIRECTORY", file=sys.stderr)
        return 64
    directory = make(Path(sys.argv[1]))
    print(f"{directory}: serve it with  vllm serve {directory} --load-format dummy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
