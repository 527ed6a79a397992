"""Replacing a checkpoint by another in one step: the old one stays whole until the new one is.

    staging_dir   the new checkpoint is written beside the old one, into a hidden folder with a fixed name, so that an
                  interrupted run can be resumed
    swap          the two folders exchange their names, and the old checkpoint is deleted

Files in the old folder that belong to no checkpoint are linked into the new one first, so nothing of the user's is lost
at any moment.
"""

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

from .output_dir import checkpoint_files, sync_folder, writing_to

STAGING_SUFFIX = ".qlinear-new"
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2
# What a system answers that cannot exchange two names in one step.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def staging_dir(out: Path) -> Path:
    """The folder beside `out` in which the new checkpoint is made."""
    real = out.resolve()
    return real.with_name(f".{real.name}{STAGING_SUFFIX}")


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a finished checkpoint, which must not be touched before there is another."""
    return (folder / "config.json").is_file()


def swap(new: Path, out: Path) -> None:
    """Put the checkpoint in `new` in the place of the one in `out`, which is deleted.

    Raises OutputError where the folders cannot be renamed, as where `out` is a mount point; both are unchanged then.
    """
    out = out.resolve()
    with writing_to(out):
        _link_other_files(out, new)
        _exchange(new, out)
        sync_folder(out.parent)
    shutil.rmtree(new, ignore_errors=True)


def _link_other_files(old: Path, new: Path) -> None:
    """Link every file of the old folder that belongs to no checkpoint into the new one."""
    replaced = {*checkpoint_files(old), old / ".qlinear"}
    for entry in sorted(old.iterdir()):
        target = new / entry.name
        if entry in replaced or target.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(entry, target)


def _link(file: Path | str, target: Path | str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(file, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, target, follow_symlinks=False)


def _exchange(a: Path, b: Path) -> None:
    """Exchange the names of two folders: in one step where the system can, else in three renames."""
    code = _exchange_at_once(os.fsencode(a), os.fsencode(b))
    if code == 0:
        return
    if code not in _UNSUPPORTED:
        raise OSError(code, os.strerror(code), str(b))
    aside = a.with_name(f"{a.name}-old")
    b.rename(aside)
    a.rename(b)
    aside.rename(a)


def _exchange_at_once(a: bytes, b: bytes) -> int:
    """The error number of the system call, 0 for success."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(a, b, _RENAME_SWAP)
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE)
    else:
        return errno.ENOSYS
    return ctypes.get_errno() if failed else 0
