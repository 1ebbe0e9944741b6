"""KV-cache events: engine → listener → index → plane, and the fleet's index over many workers."""
