# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's own file, agent.toml beside the directory of the VMs' files: its model and its checks."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qrapd.errors import ConfigurationError, Problem

__all__ = ["AgentFile", "parse"]


class AgentFile(BaseModel):
    """agent.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    group: str | None = Field(
        None,
        min_length=1,
        description="a group whose members may do everything, beside root and the agent's own user",
    )
    read_only_group: str | None = Field(None, min_length=1, description="a group whose members may look")
    starts_at_once: int = Field(
        4,
        ge=1,
        le=1000,
        description="VMs that may be on their way up at the same time; others wait, for ten seconds at most each",
    )


def parse(text: str, path: Path) -> AgentFile:
    """Read the agent's file.

    :param path: where the text is from, for messages.
    :raise ConfigurationError: with all problems that it has.
    """
    try:
        return AgentFile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        problems = [Problem("", f"is not TOML: {error}", hint="see https://toml.io")]
    except ValidationError as error:
        known = ", ".join(AgentFile.model_fields)
        problems = [
            Problem(
                ".".join(map(str, details["loc"])),
                "is no key of this file"
                if details["type"] == "extra_forbidden"
                else details["msg"][0].lower() + details["msg"][1:],
                value=repr(details["input"]),
                hint=f"keys are: {known}",
            )
            for details in error.errors()
        ]
    raise ConfigurationError(str(path), problems)
