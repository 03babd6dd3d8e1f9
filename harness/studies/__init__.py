"""Toy studies of the papers, one file each; `python harness/studies/NAME.py` in a minute or less on one core."""
