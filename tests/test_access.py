# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may do what by the API."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.api.access import OVERFLOW_ID, Access, Peer, Policy, decide, refusal

POLICY = Policy(own_uid=1000, group=50, read_only_group=60, group_name="vmadmin")
NONE, READ, WRITE = Access.NONE, Access.READ, Access.WRITE


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (Peer(1, 0, 0), WRITE),
        (Peer(1, 1000, 1000), WRITE),
        (Peer(1, 1001, 50), WRITE),
        (Peer(1, 1001, 1001, (7, 50)), WRITE),
        (Peer(1, 1001, 60), READ),
        (Peer(1, 1001, 1001, (60,)), READ),
        (Peer(1, 1001, 60, (50,)), WRITE),
        (Peer(1, 1001, 1001, (7,)), NONE),
        (Peer(1, 1001, 0, (0, 1000)), NONE),  # root's group and the user's own are no users
        (Peer(0, 50, 1001), NONE),  # a user who has a group's number
    ],
)
def test_decisions(peer: Peer, expected: Access) -> None:
    """Root, the serving user, and members of the groups, be it by their first group or by another."""
    assert expected is decide(POLICY, peer)


def test_no_groups() -> None:
    """Where no group is named, nobody else may do anything."""
    peer = Peer(1, 1001, 0, (0, 50))
    assert NONE is decide(Policy(1000), peer)


def test_a_group_that_the_namespace_does_not_know() -> None:
    """In a user namespace all foreign groups look the same: that number grants nothing."""
    peer = Peer(1, 1001, OVERFLOW_ID, (OVERFLOW_ID,))
    assert NONE is decide(Policy(1000, group=OVERFLOW_ID, read_only_group=OVERFLOW_ID), peer)


ids = st.integers(0, 5)
groups = st.none() | ids
peers = st.builds(Peer, ids, ids, ids, st.lists(ids).map(tuple))
policies = st.builds(Policy, ids, groups, groups)


@given(policies, peers)
def test_a_right_has_a_reason(policy: Policy, peer: Peer) -> None:
    """Whoever may do something is root, the serving user, or in a group that the policy names."""
    mine = {peer.gid, *peer.groups}
    owner = peer.uid in {0, policy.own_uid}
    assert (decide(policy, peer) is WRITE) == (owner or policy.group in mine)
    looks_on = owner or bool({policy.group, policy.read_only_group} & mine)
    assert (decide(policy, peer) >= READ) == looks_on


@pytest.mark.parametrize(
    ("policy", "needed", "words"),
    [
        (Policy(0), WRITE, "the user 7 may not do this: only root may change things"),
        (Policy(1000), READ, "the user 7 may not do this: only root and the user 1000 may look on"),
        (
            POLICY,
            WRITE,
            "the user 7 may not do this: "
            "only root, the user 1000 and members of the group vmadmin (50) may change things",
        ),
        (
            POLICY,
            READ,
            "the user 7 may not do this: only root, the user 1000, members of the group vmadmin (50) and "
            "members of the group 60 may look on",
        ),
    ],
)
def test_refusals(policy: Policy, needed: Access, words: str) -> None:
    """A refusal says who it was, and who may."""
    assert words == refusal(policy, Peer(1, 7, 7), needed)
