"""A disk with no room left, which libraries report in many ways."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

# The third is where a process may write no larger file, which serves tests.
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full_disk(error: BaseException) -> str | None:
    """What to say of an error that comes of a full disk; None of others."""
    for cause in _causes(error):
        for code in CODES:
            if getattr(cause, "errno", None) == code or os.strerror(code) in str(cause):
                where = f"{name}: " if isinstance(name := getattr(cause, "filename", None), str) else ""
                return f"{where}{os.strerror(code)}; what was being written is not whole, what was there before is"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came of or while dealing with; the first one last."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        now = todo.pop()
        if now is not None and now not in found:
            found.append(now)
            todo += [now.__cause__, now.__context__]
    yield from reversed(found)
