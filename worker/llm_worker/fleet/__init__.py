"""The second program: one index of many workers' KV blocks, `python -m llm_worker.fleet`."""
