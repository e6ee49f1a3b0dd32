# SPDX-License-Identifier: GPL-2.0-or-later
"""How a VM is, as others see it: what `qrapd ps --json` and the API show."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["LinkStatus", "Origin", "VmState", "VmStatus"]

VmState = Literal["starting", "ready", "degraded", "stopping", "exited", "failed"]
Origin = Literal["agent", "unit", "shell"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LinkStatus(_Model):
    """One NIC's way to the host."""

    index: int = Field(ge=0, description="its place in the VM's file, from 0")
    mode: Literal["swap", "vhost-user", "native"]
    state: Literal["starting", "up", "down", "failed", "ended"] = Field(
        description="down: its passt is being replaced; failed: given up, until a reload or a swap"
    )
    passt_pid: int | None = Field(None, description="null where it is not known, or there is none")
    generation: int = Field(ge=0, description="grows with every new stream")
    outages: int = Field(0, ge=0, description="since this supervisor has had the VM")
    last_outage_ms: float | None = Field(None, ge=0, description="how long the last one took")
    unread_by_passt: int | None = Field(None, ge=0, description="bytes that wait in the stream for passt")
    unread_by_qemu: int | None = Field(None, ge=0, description="bytes that wait in the stream for QEMU")
    error: str | None = Field(None, description="what the last attempt to replace its passt ran into")


class VmStatus(_Model):
    """One VM."""

    name: str
    state: VmState = Field(description="degraded: the machine runs, and a link is down")
    origin: Origin = Field(description="who runs it: the agent, a unit of systemd, or a shell")
    qemu_pid: int | None = None
    since: datetime = Field(description="when it came to this state")
    restarts: int = Field(0, ge=0, description="by its supervisor, since that has had the VM")
    links: list[LinkStatus] = []
    error: str | None = Field(None, description="why it failed, or what its last attempt ran into")
    hint: str | None = Field(None, description="what to do about the error, where that is known")
