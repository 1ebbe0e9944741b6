"""KV events out again: over ZMQ or NATS, with replay and snapshots."""
