"""The system server and what it tells; never imports vLLM."""
