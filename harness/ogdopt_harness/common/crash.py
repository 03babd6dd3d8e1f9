"""What to say of an error that no message of ours explains: of the system's in words, of others where their traceback is."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback

REMEDIES = {
    errno.ENOSPC: "make room, and the same command goes on from what is saved",
    errno.EDQUOT: "make room, and the same command goes on from what is saved",
    errno.EACCES: "change the rights of that path, or choose another",
    errno.EPERM: "change the rights of that path, or choose another",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.EIO: "the disk or its network fails: look at the system's log",
}
OTHERWISE = "correct the path, or move what is in its place"


def of_system(error: OSError) -> str:
    """The message of an error of the operating system: which file, what, what to do."""
    names = [str(name) for name in (error.filename, error.filename2) if name]
    where = f"{' -> '.join(names)}: " if names else ""
    said = error.strerror or str(error) or type(error).__name__
    return f"{where}{said}; {REMEDIES.get(error.errno or 0, OTHERWISE)}"


def of_memory(error: MemoryError) -> str:
    """The message of a machine without memory left."""
    return f"the memory of this machine does not suffice ({error or 'no more to be had'}); take smaller batches or rows"


def unexpected(error: BaseException) -> str:
    """One line about an error that is our mistake. Its traceback goes into a file that only its owner can read."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    said = f"unexpected {type(error).__name__}{': ' + first if first else ''}"
    text = "".join(traceback.format_exception(error))
    try:
        number, path = tempfile.mkstemp(prefix="ogdopt-error-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"Python {sys.version}\n\n{text}")
    except OSError as failure:
        return f"{said}; its traceback could not be saved ({failure.strerror}): OGDOPT_TRACEBACK=1 shows it"
    return (
        f"{said}. This is a mistake of ogdopt. The traceback is in {path}: please report it with the command, "
        "after a look at whether it holds anything private"
    )
