"""How long tests wait for a process before they take it to hang: seconds, for all tests that start one.

They are no measure of speed. The slowest process takes two minutes on two idle cores, and on a busy machine ten times that is
nothing unusual; one that hangs never ends. `--timeout` in pyproject.toml is the limit of a whole test.
"""

from datetime import timedelta

PROCESS = 1200
"""A process that a test started, from its start to its end."""
EVENT = 600
"""Something that another thread or process is about to do: a line in a file, a lock, an answer."""
RANK = 900
"""A case of a rank, which then says where it hangs; under PROCESS, so that the launcher still tells."""
COLLECTIVE = timedelta(seconds=300)
"""A rank that waits for the others, which started late or are slow."""
