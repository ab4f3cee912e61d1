"""A child process that ends when its parent does, however the parent ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when `parent`, which started it, ends; for instance by SIGKILL.

    Linux keeps this across `execve`, so it also holds for the Valkey that a child turns into: a pipe that the children
    watch would not, and nothing runs between `fork` and `exec` as a `preexec_fn` does. SIGKILL, because it cannot be
    delayed: what was accepted is in the append-only file by then. Elsewhere than on Linux nothing happens.

    Raises:
        SystemExit: The parent has gone already.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise SystemExit(1)
