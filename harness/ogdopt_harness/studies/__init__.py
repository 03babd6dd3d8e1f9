"""Toy studies of the papers, one file each; `ogdopt study NAME` runs one in a minute or less on one core."""
