"""Folders and files that other users of this machine must not read or change."""

import logging
import os
import stat
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path

UMASK = 0o077  # the umask of processes that write such files: all permissions of other users
OWN_FOLDER = ".imstream"  # the folder in the working directory for everything that imstream writes by default

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger(__name__)


def close_to_others(folder: Path, contents: Collection[str]) -> None:
    """Remove the permissions of other users from a folder; log a warning if that is not possible.

    `contents` are the names (shell patterns) of imstream's files and folders in it. A folder that holds anything else,
    such as /tmp named by mistake, keeps its permissions: only `contents` are closed, with the files in those.
    """
    own_parents = [parent for parent in folder.absolute().parents if parent.name == OWN_FOLDER]
    for path in (*own_parents, *_to_close(folder, contents)):
        _close(path)
    for path in (*own_parents, folder):
        if problem := others_can_write(path):
            log.warning("%s %s: other users can replace its contents", path, problem)


def _to_close(folder: Path, contents: Collection[str]) -> Iterator[Path]:
    found = sorted(folder.iterdir())
    own = [path for path in found if any(fnmatch(path.name, pattern) for pattern in contents)]
    if own == found:
        yield folder.resolve()
    for path in own:
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from path.iterdir()


def _close(path: Path) -> None:
    """Remove all permissions of other users. Links are not followed: they may lead to files of others."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or not found.st_mode & UMASK:
        return
    try:
        path.chmod(stat.S_IMODE(found.st_mode) & ~UMASK)
    except PermissionError:
        log.warning("%s is open to other users and belongs to one of them: choose another folder", path)
    else:
        log.warning("%s was open to other users of this machine and is now closed to them", path)


def others_can_write(path: Path) -> str | None:
    """How a user other than this one and root can change a file, or the contents of a folder; None if none can."""
    found = path.stat()
    if found.st_uid not in {os.geteuid(), 0}:
        return "belongs to another user"
    return "can be written by other users" if found.st_mode & _OTHERS_WRITE else None
