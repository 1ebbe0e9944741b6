"""What tests of several tiers share: waiting, processes to start and to kill, hand-made input."""
