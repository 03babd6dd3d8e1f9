"""Models: load or build, shard, score, adapt, export, and the memory that they need."""
