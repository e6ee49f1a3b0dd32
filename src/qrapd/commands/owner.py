# SPDX-License-Identifier: GPL-2.0-or-later
"""Root at work in the directory of somebody else's VM."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["become_owner"]


def become_owner(directory: Path) -> None:
    """As root, go on as the user whose VM it is: what a user can put into their directory, root does not follow."""
    import pwd

    try:
        status = directory.lstat()
        if os.geteuid() != 0 or status.st_uid == 0:
            return
        user = pwd.getpwuid(status.st_uid)
    except (FileNotFoundError, KeyError):
        return  # what is in the way is said where the directory is claimed
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
