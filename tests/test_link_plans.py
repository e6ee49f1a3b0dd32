# SPDX-License-Identifier: GPL-2.0-or-later
"""The three plans of a link: which one the next passt comes up by, and which one is gone back to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qrapd.forwards import Changed
from qrapd.link_plans import LinkPlans
from qrapd.plan import LinkPlan
from qrapd.record import LinkRecord

PLAN = LinkPlan(
    index=0,
    source="managed",
    mac="52:54:00:00:00:01",
    hub=0,
    nic="nic0",
    passt=("passt", "--tcp-ports", "2222:22", "--quiet"),
)
OTHER_MTU = replace(PLAN, passt=(*PLAN.passt, "--mtu", "1400"))
OTHER_PORT = replace(PLAN, passt=("passt", "--quiet", "--tcp-ports", "2223:22"))
RECORD = LinkRecord(index=0, mode="swap", generation=3, number=3, argv=PLAN.passt)


def served(plan: LinkPlan = PLAN) -> LinkPlans:
    """Of a link that a passt serves."""
    plans = LinkPlans(plan)
    plans.note_serving()
    return plans


def test_nothing_has_served() -> None:
    """Then there is nothing to go back to."""
    plans = LinkPlans(PLAN)
    assert not plans.is_outdated
    plans.remember_serving()
    assert (False, False) == (plans.is_on_trial, plans.go_back())
    assert (PLAN, None) == (plans.wanted, plans.serving)


@pytest.mark.parametrize(
    ("change", "outdated"),
    [
        ({}, False),
        ({"passt": OTHER_MTU.passt}, True),
        ({"passt": OTHER_PORT.passt}, True),
        ({"passt": ("passt", "--quiet", "--tcp-ports", "2222:22")}, False),
        ({"source": "/run/passt.socket", "passt": ()}, True),
        ({"pattern": "/run/passt_{n}"}, True),
        ({"allowed_uids": frozenset({7}), "stall_timeout": 1.0, "guest_addresses": ("10.0.0.2",)}, False),
        ({"pesto": "/usr/bin/pesto", "changed": Changed((), ())}, False),
    ],
)
def test_what_takes_another_passt(change: dict[str, object], outdated: bool) -> None:
    """Whatever is passt's own, but not the place that its forwards have among its options."""
    plans, plan = served(), replace(PLAN, **change)  # type: ignore[arg-type]
    plans.change(plan)
    assert (plan, outdated) == (plans.wanted, plans.is_outdated)
    plans.note_serving()
    assert not plans.is_outdated


def test_the_machine_keeps_its_nic() -> None:
    """What a file says of that holds for the next QEMU only."""
    plans = served()
    plans.change(replace(OTHER_MTU, mac="52:54:00:00:00:09", hub=7, nic="another", mode="native"))
    assert OTHER_MTU == plans.wanted


def test_no_passt_comes_up_by_the_new_plan() -> None:
    """What had served is wanted again, but for what is not passt's; once."""
    plans = served(replace(PLAN, changed=Changed((("tcp", "1"),), ())))
    plans.change(replace(OTHER_MTU, stall_timeout=1.0))
    plans.remember_serving()
    assert (True, False) == (plans.is_on_trial, plans.fell_back)
    assert plans.go_back()
    assert replace(PLAN, changed=Changed((("tcp", "1"),), ()), stall_timeout=1.0) == plans.wanted
    assert (True, False, False) == (plans.fell_back, plans.is_on_trial, plans.is_outdated)
    assert not plans.go_back()
    plans.change(OTHER_MTU)
    assert not plans.fell_back


def test_a_change_of_a_change() -> None:
    """What is gone back to is what has served, and not what was wanted in between."""
    plans = served()
    plans.change(OTHER_MTU)
    plans.remember_serving()
    plans.change(OTHER_PORT)
    assert plans.go_back()
    assert PLAN == plans.wanted


def test_other_forwards_are_noticed() -> None:
    """When another passt serves, and not with the first."""
    plans = LinkPlans(PLAN)
    assert not plans.note_serving()
    plans.change(OTHER_MTU)
    assert not plans.note_serving()
    plans.change(OTHER_PORT)
    assert plans.note_serving()
    assert (OTHER_PORT, False) == (plans.serving, plans.is_on_trial)


def test_a_passt_is_told_of_other_forwards() -> None:
    """It can be told of nothing else; what has served holds until it has heard."""
    plans = served()
    wanted, now = ({"tcp": (port,), "udp": ()} for port in ("2223:22", "2222:22"))
    assert (wanted, now) == plans.change_of_forwards(OTHER_PORT)
    assert plans.change_of_forwards(OTHER_MTU) is None
    assert LinkPlans(PLAN).change_of_forwards(OTHER_PORT) is None
    before = plans.try_out(OTHER_PORT)
    assert (PLAN, OTHER_PORT, PLAN) == (before, plans.wanted, plans.serving)
    assert (True, True) == (plans.is_on_trial, plans.is_outdated)
    plans.note_serving()
    assert (OTHER_PORT, False, False) == (plans.serving, plans.is_on_trial, plans.is_outdated)


def test_a_passt_refuses_other_forwards() -> None:
    """All is as it was."""
    plans = served()
    plans.withdraw(plans.try_out(OTHER_PORT))
    assert (PLAN, PLAN, False, False) == (plans.wanted, plans.serving, plans.is_on_trial, plans.is_outdated)


@pytest.mark.parametrize(
    ("record", "wanted", "serving"),
    [
        (RECORD, PLAN, PLAN),
        (RECORD, OTHER_PORT, PLAN),
        (replace(RECORD, argv=None), OTHER_PORT, OTHER_PORT),
        (
            replace(RECORD, argv=(), socket="/run/a"),
            replace(PLAN, source="/run/b", passt=()),
            replace(PLAN, source="/run/a", passt=()),
        ),
        (
            replace(RECORD, argv=(), socket="/run/a"),
            replace(PLAN, source="probe", passt=()),
            replace(PLAN, source="probe", passt=()),
        ),
    ],
    ids=["the same", "the file has changed", "not known", "another socket", "any socket will do"],
)
def test_a_link_that_was_left(record: LinkRecord, wanted: LinkPlan, serving: LinkPlan) -> None:
    """What it was started by is told by the record; where the file says something else now, that is on trial."""
    plans = LinkPlans(wanted)
    plans.adopt(record)
    assert (serving, wanted) == (plans.serving, plans.wanted)
    assert wanted != serving or not plans.is_on_trial
    assert (wanted != serving) == plans.is_on_trial == plans.is_outdated
