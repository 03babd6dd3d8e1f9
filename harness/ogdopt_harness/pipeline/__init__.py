"""The stages of a seed, one after the other, each skipped when its files are there."""
