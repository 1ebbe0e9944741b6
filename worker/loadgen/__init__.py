"""A load that makes the panels move: mixed traffic on a worker, for demonstrations and tests."""
