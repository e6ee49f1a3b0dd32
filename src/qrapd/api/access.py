# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may do what by the API: decided by the user and the groups that the kernel says a peer has.

Who may write can have QEMU started with any arguments, and so has all that the serving user has: for root's agent the
group is one of administrators, as libvirt's or docker's is.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["OVERFLOW_ID", "Access", "Peer", "Policy", "decide", "refusal"]

OVERFLOW_ID = 65534
"""What the kernel shows for a group that this user namespace does not know (user_namespaces(7)). It is not one group,
so it never grants anything."""


class Access(enum.IntEnum):
    """What a peer may do; each level includes those below."""

    NONE = 0
    """Ask whether anybody is there, and for the API's description: neither tells of any VM."""
    READ = 1
    """See every VM, events and metrics."""
    WRITE = 2
    """Change things, and type at a guest's console."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a UNIX socket, as of the moment when it connected (unix(7))."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    """The supplementary ones."""


@dataclass(frozen=True)
class Policy:
    """Who may do what. Root and the serving user may do everything."""

    own_uid: int
    group: int | None = None
    """Its members may do everything; None: nobody else may."""
    read_only_group: int | None = None
    """Its members may look on."""
    group_name: str | None = None
    read_only_group_name: str | None = None
    """What messages call the groups; None: by their numbers."""


def decide(policy: Policy, peer: Peer) -> Access:
    """What a peer may do."""
    if peer.uid in (0, policy.own_uid) or _is_in(policy.group, peer):
        return Access.WRITE
    if _is_in(policy.read_only_group, peer):
        return Access.READ
    return Access.NONE


def _is_in(group: int | None, peer: Peer) -> bool:
    return group is not None and group != OVERFLOW_ID and group in (peer.gid, *peer.groups)


def refusal(policy: Policy, peer: Peer, needed: Access) -> str:
    """The words for a peer that may not: who it is, and who may."""
    may = ["root"]
    if policy.own_uid != 0:
        may.append(f"the user {policy.own_uid}")
    if policy.group is not None:
        may.append(f"members of the group {_name(policy.group, policy.group_name)}")
    if needed <= Access.READ and policy.read_only_group is not None:
        may.append(f"members of the group {_name(policy.read_only_group, policy.read_only_group_name)}")
    who = ", ".join(may[:-1]) + f" and {may[-1]}" if len(may) > 1 else may[0]
    what = "look on" if needed <= Access.READ else "change things"
    return f"the user {peer.uid} may not do this: only {who} may {what}"


def _name(gid: int, name: str | None) -> str:
    return f"{name} ({gid})" if name else str(gid)
