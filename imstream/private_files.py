"""Folders and files that other users of this machine must not read or change."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path

UMASK = 0o077
"""What a process that writes such files takes away from their permissions."""

OWN_FOLDER = ".imstream"
"""The folder, in the working directory, that holds everything imstream writes by default."""

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger(__name__)


def close_to_others(folder: Path, contents: Collection[str]) -> None:
    """Let nobody but the owner into a folder. What cannot be done is a warning.

    A folder is closed only if it holds nothing but `contents`: one that was named by mistake, such as /tmp, stays as it
    is, and only the `contents` in it are closed, with the files in those.

    Args:
        folder: The folder.
        contents: The names of the files and folders that imstream keeps in it, as patterns of the shell.

    Raises:
        OSError: The folder cannot be read.
    """
    own_parents = [parent for parent in folder.absolute().parents if parent.name == OWN_FOLDER]
    for path in (*own_parents, *_to_close(folder, contents)):
        _close(path)
    for path in (*own_parents, folder):
        if problem := others_can_write(path):
            log.warning("%s %s: other users can replace what is in it", path, problem)


def _to_close(folder: Path, contents: Collection[str]) -> Iterator[Path]:
    there = sorted(folder.iterdir())
    ours = [path for path in there if any(fnmatch(path.name, pattern) for pattern in contents)]
    if ours == there:
        yield folder.resolve()
    for path in ours:
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from path.iterdir()


def _close(path: Path) -> None:
    """Take all permissions from other users. A link is left alone: it may have been made to lead elsewhere."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or not found.st_mode & _OTHERS:
        return
    try:
        path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
    except PermissionError:
        log.warning("%s is open to other users and belongs to one of them: choose another folder", path)
    else:
        log.warning("%s was open to other users of this machine and is now closed to them", path)


def others_can_write(path: Path) -> str | None:
    """How somebody else than this user and root can change a file, or what is in a folder; None if nobody can.

    Raises:
        OSError: It cannot be looked at.
    """
    found = path.stat()
    if found.st_uid not in {os.geteuid(), 0}:
        return "belongs to another user"
    return "can be written by other users" if found.st_mode & _OTHERS_WRITE else None
