# SPDX-License-Identifier: GPL-2.0-or-later
"""What one link is to go by: the plan that is wanted, the one by which its passt serves, and the one to go back to.

All three are one and the same as long as nobody changes anything. A changed file makes another plan the wanted one, and
the next passt has to show that one can come up by it: until then the plan that has served is remembered. Nothing here
does any I/O.
"""

from __future__ import annotations

from dataclasses import replace

from qrapd import forwards
from qrapd.forwards import Ports
from qrapd.plan import LinkPlan
from qrapd.record import LinkRecord

__all__ = ["LinkPlans"]

_PASSTS = ("source", "passt", "pattern", "listen_addresses")
"""What of a plan is passt's; another one takes another passt."""

_RELOADABLE = (*_PASSTS, "allowed_uids", "stall_timeout", "guest_addresses", "pesto", "changed")
"""What of a plan can change while the NIC is there."""


class LinkPlans:
    """The plans of one link. Whoever carries them out says what has served."""

    def __init__(self, wanted: LinkPlan) -> None:
        self.wanted = wanted
        """the one that the next passt comes up by"""
        self.serving: LinkPlan | None = None
        """the one by which the last passt served; None: none has"""
        self.fell_back = False
        """whether the wanted one is not what somebody has asked for last, but what had served before"""
        self._fallback: LinkPlan | None = None

    @property
    def is_outdated(self) -> bool:
        """Whether the last passt served by another plan than the wanted one."""
        return self.serving is not None and not _is_same_passt(self.serving, self.wanted)

    @property
    def is_on_trial(self) -> bool:
        """Whether no passt has come up by the wanted plan yet, and there is another one to go back to."""
        return self._fallback is not None

    def adopt(self, record: LinkRecord) -> None:
        """Take note of the passt that another supervisor has left; the file may have changed since."""
        self.serving = _read(record, self.wanted)
        if self.is_outdated:
            self.remember_serving()

    def change(self, plan: LinkPlan) -> None:
        """Want another plan, as far as the NIC that is there allows it."""
        self.wanted = _take_over(_RELOADABLE, plan, self.wanted)
        self.fell_back = False

    def remember_serving(self) -> None:
        """Go back to what has served, should no passt come up by the wanted plan."""
        self._fallback = self.serving

    def go_back(self) -> bool:
        """Want what had served, once; returns whether there is such a plan."""
        if self._fallback is None:
            return False
        self.wanted = _take_over((*_PASSTS, "changed"), self._fallback, self.wanted)
        self._fallback = None
        self.fell_back = True
        return True

    def note_serving(self) -> bool:
        """A passt serves by the wanted plan. Returns whether the one before had other forwards."""
        served, self.serving, self._fallback = self.serving, self.wanted, None
        return served is not None and forwards.given(served.passt) != forwards.given(self.wanted.passt)

    # --- other forwards for a passt that runs -------------------------------------------------------------

    def change_of_forwards(self, plan: LinkPlan) -> tuple[Ports, Ports] | None:
        """What the passt that serves is to forward for it to serve by this plan, and what it does forward.

        None: none serves, or the plan differs in more than that.
        """
        if self.serving is None or _but_for_forwards(self.serving) != _but_for_forwards(plan):
            return None
        return forwards.given(plan.passt), forwards.given(self.serving.passt)

    def try_out(self, plan: LinkPlan) -> LinkPlan:
        """Want a plan that the passt which serves is about to be told of; returns what was wanted before."""
        before, self.wanted = self.wanted, plan
        self.remember_serving()
        return before

    def withdraw(self, before: LinkPlan) -> None:
        """It could not be told: all is as it was."""
        self.wanted, self._fallback = before, None


def _take_over(names: tuple[str, ...], source: LinkPlan, plan: LinkPlan) -> LinkPlan:
    return replace(plan, **{name: getattr(source, name) for name in names})


def _but_for_forwards(plan: LinkPlan) -> object:
    """What of a plan is passt's and cannot change while passt runs."""
    return plan.source, plan.pattern, forwards.without(plan.passt)


def _is_same_passt(plan: LinkPlan, other: LinkPlan) -> bool:
    """Whether a passt by one plan serves by the other. Where its forwards stand among its options is all the same."""
    same_forwards = forwards.given(plan.passt) == forwards.given(other.passt)
    return same_forwards and _but_for_forwards(plan) == _but_for_forwards(other)


def _read(record: LinkRecord, plan: LinkPlan) -> LinkPlan:
    """The plan by which a passt that was left had been started, as far as that is known."""
    if record.argv:
        return replace(plan, source="managed", passt=record.argv)
    if record.argv is not None and plan.source != "probe" and record.socket is not None:
        return replace(plan, source=record.socket, passt=())
    return plan
