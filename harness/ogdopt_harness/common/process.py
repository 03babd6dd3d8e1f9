"""What a launcher says to a process in its environment, for those that need no torch to act on it."""

from __future__ import annotations

import os

FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this is the first process, the one that prints."""
SEVERAL = int(os.environ.get("WORLD_SIZE", "1")) > 1
"""Whether there are others."""
