"""What the job writes: shards, journal, model card."""
