# SPDX-License-Identifier: GPL-2.0-or-later
"""An OpenAPI 3.1 document from a table of operations and the pydantic models that they use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from qrapd.api.access import Access
from qrapd.api.problems import MEDIA_TYPE, TITLES

__all__ = ["Answer", "Content", "Operation", "Parameter", "document"]

Model = type[BaseModel]
_REFERENCE = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Content:
    """A body: a model or a list of it as JSON, or something else."""

    media_type: str = "application/json"
    model: Model | None = None
    """None: what ``kind`` says"""
    kind: Literal["string", "object"] = "string"
    many: bool = False
    examples: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What comes back when all went well."""

    description: str
    content: Sequence[Content] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    """names and descriptions"""


@dataclass(frozen=True)
class Parameter:
    """A part of the path, the query or the headers."""

    name: str
    place: Literal["path", "query", "header"]
    description: str
    schema: Mapping[str, Any]
    example: Any = None


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    name: str
    """the operationId"""
    method: Literal["GET", "PUT", "POST", "DELETE"]
    path: str
    summary: str
    access: Access
    answers: Mapping[int, Answer]
    faults: Sequence[int] = ()
    """statuses of problems, beside 403 where access is limited, and 500 and 503, which every operation has"""
    parameters: Sequence[Parameter] = ()
    body: Sequence[Content] = ()
    """one of these is needed; none: the body is not looked at"""
    description: str = ""


def document(
    operations: Iterable[Operation], problem: Model, *, title: str, version: str, description: str
) -> dict[str, Any]:
    """The whole document.

    :param problem: the model of every answer that is an error.
    """
    operations = list(operations)
    references, definitions = _schemas(operations, problem)
    problems = {MEDIA_TYPE: {"schema": references[problem, "serialization"]}}
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, references)
    statuses = sorted({status for each in operations for status in _faults(each)})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": version,
            "description": description,
            "license": {"name": "GPL-2.0-or-later", "identifier": "GPL-2.0-or-later"},
        },
        "servers": [{"url": "http://localhost", "description": "on a UNIX socket: the name does not matter"}],
        "paths": paths,
        "components": {
            "schemas": definitions,
            "responses": {
                _fault_name(status): {"description": TITLES[status], "content": problems}
                for status in statuses
            },
        },
    }


def _schemas(
    operations: Iterable[Operation], problem: Model
) -> tuple[Mapping[tuple[Model, JsonSchemaMode], Any], dict[str, Any]]:
    """How to refer to each model, and the definitions of all. What is sent to us may be without what has a default."""
    used: dict[tuple[Model, JsonSchemaMode], None] = {(problem, "serialization"): None}
    for each in operations:
        for content in each.body:
            if content.model is not None:
                used[content.model, "validation"] = None
        for answer in each.answers.values():
            for content in answer.content:
                if content.model is not None:
                    used[content.model, "serialization"] = None
    references, definitions = models_json_schema(list(used), ref_template=_REFERENCE)
    return references, definitions["$defs"]  # type: ignore[return-value]  # Model is narrower than pydantic's type


def _faults(operation: Operation) -> list[int]:
    limited = [403] if operation.access > Access.NONE else []
    return sorted({*limited, *operation.faults, 500, 503})


def _fault_name(status: int) -> str:
    return TITLES[status].replace(" ", "")


def _operation(
    operation: Operation, references: Mapping[tuple[Model, JsonSchemaMode], Any]
) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        response: dict[str, Any] = {"description": answer.description}
        responses[str(status)] = response
        if answer.content:
            response["content"] = _content(answer.content, references, "serialization")
        if answer.headers:
            response["headers"] = {
                name: {"description": words, "schema": {"type": "string"}}
                for name, words in answer.headers.items()
            }
    for status in _faults(operation):
        responses[str(status)] = {"$ref": f"#/components/responses/{_fault_name(status)}"}
    made: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    needs = {
        Access.NONE: "",
        Access.READ: "Needs the right to look on.",
        Access.WRITE: "Needs the right to write.",
    }
    if words := " ".join(filter(None, [operation.description, needs[operation.access]])):
        made["description"] = words
    if operation.parameters:
        made["parameters"] = [_parameter(each) for each in operation.parameters]
    if operation.body:
        content = _content(operation.body, references, "validation")
        made["requestBody"] = {"required": True, "content": content}
    return made | {"responses": responses}


def _parameter(parameter: Parameter) -> dict[str, Any]:
    made = {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.place == "path",
        "description": parameter.description,
        "schema": dict(parameter.schema),
    }
    return made if parameter.example is None else made | {"example": parameter.example}


def _content(
    contents: Iterable[Content],
    references: Mapping[tuple[Model, JsonSchemaMode], Any],
    mode: JsonSchemaMode,
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for each in contents:
        schema: Any = {"type": each.kind} if each.model is None else references[each.model, mode]
        made[each.media_type] = entry = {
            "schema": {"type": "array", "items": schema} if each.many else schema
        }
        if each.examples:
            entry["examples"] = {name: {"value": value} for name, value in each.examples.items()}
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]  # its own copy: nothing is shared
