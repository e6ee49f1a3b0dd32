# SPDX-License-Identifier: GPL-2.0-or-later
"""What is read out of a request, and the faults that it may have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import pydantic_core
import tomli_w
from pydantic import BaseModel, ValidationError
from starlette.requests import HTTPConnection, Request

from qrapd.api.problems import Failure
from qrapd.config import NAME_PATTERN
from qrapd.errors import Problem
from qrapd.vm_files import SIZE_LIMIT

__all__ = [
    "file_text",
    "flag",
    "is_name",
    "media_type",
    "name_in_query",
    "only_if_none",
    "read_body",
    "read_model",
]

_JSON, _TOML = "application/json", "application/toml"

_Model = TypeVar("_Model", bound=BaseModel)


def media_type(request: Request, *allowed: str) -> str:
    """The type of the body, without its parameters.

    :raise Failure: 415, if it is none of ``allowed``.
    """
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in allowed:
        words = f"the body is {found}" if found else "the body has no content-type"
        takes = " or ".join(allowed)
        # RFC 9110 has Accept in a 415 for this.
        raise Failure(415, f"{words}; this takes {takes}", headers={"Accept": ", ".join(allowed)})
    return found


async def read_body(request: Request) -> bytes:
    """The body; as long as what is announced or comes is not more than a VM's file may have.

    :raise Failure: 413
    """
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdecimal() and int(announced[:20]) > SIZE_LIMIT:
        raise _too_large()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > SIZE_LIMIT:
            raise _too_large()
    return bytes(body)


def _too_large() -> Failure:
    # The rest is still to come, and nobody is going to read it.
    headers = {"Connection": "close"}
    return Failure(413, f"the body is larger than {SIZE_LIMIT} bytes, as no VM's file is", headers=headers)


async def read_model(request: Request, model: type[_Model]) -> _Model:
    """The body as JSON by a model.

    :raise Failure: 400 if it is no JSON, 422 if the model does not have it so; and as the functions above.
    """
    media_type(request, _JSON)
    data = _parse(await read_body(request))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [
            Problem(_key(each["loc"]), each["msg"].removeprefix("Value error, "), _shown(each["input"]))
            for each in error.errors(include_url=False)
        ]
        raise Failure(422, "the body is not as it has to be", problems=problems) from None


async def file_text(request: Request) -> str:
    """A VM's file as text. What JSON says of it is written as TOML, so that the same checks follow.

    :raise Failure: 400, 413, 415 and 422
    """
    kind = media_type(request, _TOML, _JSON)
    body = await read_body(request)
    if kind == _TOML:
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            raise Failure(400, f"the body is not UTF-8, as TOML must be (byte {error.start + 1})") from None
    data = _parse(body)
    if not isinstance(data, dict):
        problem = Problem("", "is not an object", _shown(data), "GET /openapi.json describes it")
        raise Failure(422, "the body is not as it has to be", problems=[problem])
    if nulls := [
        Problem(key, "is null, which TOML does not have", hint="leave it out") for key in _nulls(data, "")
    ]:
        raise Failure(422, "the body is not as it has to be", problems=nulls)
    return tomli_w.dumps(_without_nulls(data))


def _parse(body: bytes) -> Any:
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Failure(400, f"the body is not JSON: {error}") from None


def _nulls(value: Any, key: str) -> Iterator[str]:
    """Where lists hold null. As a table's value it means the default, as if the key were not there."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _nulls(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            if each is None:
                yield f"{key}[{index}]"
            yield from _nulls(each, f"{key}[{index}]")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _key(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(
        "."
    )


def _shown(value: object) -> str:
    text = pydantic_core.to_json(value).decode()
    return text if len(text) <= 100 else f"{text[:99]}…"


def is_name(text: str) -> bool:
    """Whether a VM can have this name."""
    return re.fullmatch(NAME_PATTERN, text) is not None and not text.endswith("\n")


def name_in_query(request: HTTPConnection, key: str) -> str | None:
    """A VM's name; there need be no such VM (yet).

    :raise Failure: 422, if none could have it.
    """
    text = request.query_params.get(key)
    if text is not None and not is_name(text):
        raise _wrong(key, text, "is not a VM's name", "1 to 63 characters of a-z, 0-9 and -")
    return text


def only_if_none(request: Request) -> bool:
    """Whether there is to be nothing yet in the place of what is sent.

    :raise Failure: 422 for a condition of another kind: there are no entity tags here.
    """
    text = request.headers.get("if-none-match")
    if text not in (None, "*"):
        raise _wrong("If-None-Match", text, "is not *", None)
    return text is not None


def flag(request: HTTPConnection, key: str, *, default: bool) -> bool:
    """A value that is true or false.

    :raise Failure: 422, if it is neither.
    """
    text = request.query_params.get(key)
    if text is None:
        return default
    if text not in ("true", "false"):
        raise _wrong(key, text, "is neither true nor false", None)
    return text == "true"


def _wrong(key: str, text: str, reason: str, hint: str | None) -> Failure:
    return Failure(422, f"{key} is not as it has to be", problems=[Problem(key, reason, _shown(text), hint)])
