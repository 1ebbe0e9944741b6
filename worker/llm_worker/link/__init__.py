"""What supervisor, serving and observer say to each other: a board in shared memory, and calls."""
