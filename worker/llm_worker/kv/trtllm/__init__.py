"""TensorRT-LLM: its events asked for, translated and published as vLLM does it."""
