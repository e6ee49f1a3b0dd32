# SPDX-License-Identifier: GPL-2.0-or-later
"""Root at work in the directory of somebody else's VM."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["become_owner"]

NO_GROUP = 65534
"""nogroup: has no rights anywhere."""


def become_owner(directory: Path) -> None:
    """As root, go on as the user whose VM it is: what a user can put into their directory, root does not follow."""
    import pwd

    try:
        status = directory.lstat()
        if os.geteuid() != 0 or status.st_uid == 0:
            return
    except FileNotFoundError:
        return  # what is in the way is said where the directory is claimed
    try:
        user = pwd.getpwuid(status.st_uid)
    except KeyError:  # a user of a container, or one that was removed: by number, but never as root
        os.setgroups([])
        os.setgid(status.st_gid or NO_GROUP)
        os.setuid(status.st_uid)
        return
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
