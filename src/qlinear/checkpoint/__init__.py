"""Files only: reading tensors one at a time, writing shards as they come."""
