# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes over the API beside a VM's status and a VM's file."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Forward",
    "Forwards",
    "ForwardsChange",
    "ForwardsChanged",
    "Health",
    "ProblemDocument",
    "ProblemOfKey",
    "ServerEvent",
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProblemOfKey(_Model):
    """One thing that is wrong in what was sent."""

    key: str = Field(description='the path to the value, as in `link[0].mac`; "": all of it')
    reason: str
    value: str | None = Field(None, description="what it is now")
    hint: str | None = Field(None, description="what would be right")


class ProblemDocument(_Model):
    """An error: RFC 9457, with more members."""

    type: str = Field("about:blank", description="always that: the title says all that the status does")
    title: str
    status: int = Field(ge=400, lt=600)
    detail: str = Field(description="what was the matter, for people")
    hint: str | None = Field(None, description="what to do next")
    problems: list[ProblemOfKey] | None = Field(None, description="of a file or a value: all that is wrong")
    reference: str | None = Field(None, description="of a bug in qrapd: what the log has it under")


class Health(_Model):
    """Somebody is there."""

    status: Literal["ok"]
    version: str


class ServerEvent(_Model):
    """One event of a stream, as the HTML standard has them."""

    id: str | None = Field(None, description="by which to resume after it; `events.missed` has none")
    event: str = Field(description="its name")
    data: str = Field(description="the event as it is in the JSON log, on one line")


_MOST = 256
"""Forwards in one request: more than anybody writes, fewer than would keep the process busy for long."""


class Forward(_Model):
    """A forward, or several, as passt's -t and -u have them."""

    protocol: Literal["tcp", "udp"]
    ports: str = Field(
        min_length=1, max_length=1000, description="as passt(1) has them: `8080:80`, `127.0.0.1/2222:22`"
    )


class ForwardsChange(_Model):
    """Which forwards are to come and to go. What goes goes first."""

    # Pydantic does not check defaults, so that these say: if it is there, it holds something.
    add: list[Forward] = Field(default=[], min_length=1, max_length=_MOST)
    remove: list[Forward] = Field(default=[], min_length=1, max_length=_MOST)

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    @model_validator(mode="after")
    def _has_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("asks for nothing: give add, remove or both")
        return self


class Forwards(_Model):
    """What is forwarded now, in passt's own words."""

    tcp: list[str]
    udp: list[str]


class ForwardsChanged(Forwards):
    """What came of the change, and what is forwarded now."""

    by: Literal["pesto", "swap", "nothing"] = Field(
        description="pesto: passt was told, nothing was interrupted; swap: another passt takes its place; "
        "nothing: it was so already"
    )
