"""Training in several processes: who is who, one pool for all of them, and what is sharded."""
