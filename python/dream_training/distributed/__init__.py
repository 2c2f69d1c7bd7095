"""Training in several processes: ranks, one pool for all of them, and sharding."""
