"""What the tests of engines share: the checkpoints that are served, and how one is read by our own runtime."""
