"""Which files and folders are closed to other users of the machine."""

import os
from pathlib import Path

import pytest

from imstream.private_files import close_to_others, others_can_write

CONTENTS = ("data", "lock")


def opened(path: Path, *, folder: bool = False) -> Path:
    """Create a path with all permissions for all users."""
    if folder:
        path.mkdir()
    else:
        path.touch()
    path.chmod(0o777 if folder else 0o666)
    return path


def is_closed(path: Path) -> bool:
    """Whether only the owner has permissions."""
    return not path.stat().st_mode & 0o077


def test_a_folder_with_nothing_else_in_it_is_closed_and_so_is_all_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = opened(tmp_path / ".imstream", folder=True)
    folder = opened(own / "redis", folder=True)
    data = opened(folder / "data", folder=True)
    paths = [own, folder, data, opened(data / "file"), opened(folder / "lock")]
    close_to_others(folder, CONTENTS)
    assert all(map(is_closed, paths))
    closed = "was open to other users of this machine and is now closed to them"
    assert sorted(caplog.messages) == sorted(f"{path} {closed}" for path in paths)
    assert not is_closed(tmp_path) or tmp_path.stat().st_mode & 0o777 == 0o700
    caplog.clear()
    close_to_others(folder, CONTENTS)
    assert not caplog.records


def test_a_folder_with_foreign_files_stays_open_and_our_files_in_it_are_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = opened(tmp_path / "shared", folder=True)
    other, data = opened(folder / "other"), opened(folder / "data", folder=True)
    close_to_others(folder, CONTENTS)
    assert (is_closed(folder), is_closed(other), is_closed(data)) == (False, False, True)
    assert f"{folder} can be written by other users: other users can replace its contents" in caplog.messages


def test_targets_of_links_are_not_changed(tmp_path: Path) -> None:
    elsewhere, folder = opened(tmp_path / "elsewhere"), opened(tmp_path / "folder", folder=True)
    (folder / "lock").symlink_to(elsewhere)
    opened(tmp_path / "there", folder=True)
    (folder / "data").symlink_to(tmp_path / "there")
    opened(tmp_path / "there" / "file")
    close_to_others(folder, CONTENTS)
    assert is_closed(folder)
    assert not any(map(is_closed, (elsewhere, tmp_path / "there", tmp_path / "there" / "file")))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_another_user_can_be_changed_by_that_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder := tmp_path / ".imstream" / "redis").mkdir(mode=0o700, parents=True)
    folder.parent.chmod(0o700)
    close_to_others(folder, CONTENTS)
    assert (others_can_write(folder), caplog.messages) == (None, [])
    for path in (folder.parent, folder):
        os.chown(path, 65534, -1)
        close_to_others(folder, CONTENTS)
        assert caplog.messages[-1] == f"{path} belongs to another user: other users can replace its contents"
