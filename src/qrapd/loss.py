# SPDX-License-Identifier: GPL-2.0-or-later
"""The loss of a passt: why and since when a link is without one. Decides, and does nothing else."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Loss"]


@dataclass
class Loss:
    """One outage of a link, from the loss of its passt until another one serves."""

    reason: str
    """``hangup``, ``exited``, ``stalled`` or ``requested``"""
    at: float
    """monotonic seconds"""
    detail: str | None = None
    told: bool = False
    """a new passt that is lost again before the NIC had it prolongs the outage, which is told of once"""

    @classmethod
    def while_nobody_watched(
        cls, now: float, *, hidden: bool, died: bool, swapping: bool, whole: bool
    ) -> Loss | None:
        """What has become of a link that another supervisor has left; None: it can go on as it is.

        :param hidden: its passt may live, and cannot be told from other processes.
        :param died: the passt that served it does not live any more.
        :param swapping: QEMU was being given another stream: which one it has is not known.
        :param whole: all else is there that it needs to go on.
        """
        if hidden:
            return cls("requested", now, "its passt cannot be told from other processes")
        if died:
            return cls("exited", now, "while there was no supervisor")
        if swapping or not whole:
            return cls("requested", now, "its stream could not be taken over")
        return None

    @property
    def needs_kill(self) -> bool:
        """Whether the passt is not to be asked to go: it hangs, or has hung up and stays."""
        return self.reason in {"stalled", "hangup"}

    def note_exit(self) -> None:
        """The passt has ended by itself: that is why it hung up."""
        if self.reason == "hangup":
            self.reason = "exited"
