# SPDX-License-Identifier: GPL-2.0-or-later
"""The OpenAPI document is made of the table of operations, whole and consistent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator

from qrapd.api.access import Access
from qrapd.api.app import _Api
from qrapd.api.openapi import Operation
from qrapd.api.operations import CONSOLE_PATH, OPERATIONS, openapi_document, openapi_json
from qrapd.api.problems import TITLES

DOCUMENT = openapi_document()


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """All objects of a document."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from walk(each)


def resolve(reference: str) -> Any:
    """What a reference of the document refers to."""
    found: Any = DOCUMENT
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def test_references() -> None:
    """Each refers to something in the document, and every component is used by something."""
    references = {each["$ref"] for each in walk(DOCUMENT) if "$ref" in each}
    assert all(resolve(each) for each in references)
    components = DOCUMENT["components"]
    assert references == {f"#/components/{kind}/{name}" for kind, each in components.items() for name in each}


def test_all_operations_are_there() -> None:
    """Each once, with a name of its own, and with somebody who does it."""
    found = {(method.upper(), path) for path, each in DOCUMENT["paths"].items() for method in each}
    assert {(each.method, each.path) for each in OPERATIONS} == found
    assert len(OPERATIONS) == len(found) == len({each.name for each in OPERATIONS})
    assert [] == [each.name for each in OPERATIONS if not hasattr(_Api, f"_{each.name}")]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
def test_one_operation(operation: Operation) -> None:
    """Its parameters are those of its path, it says what right it needs, and its faults have names."""
    made = DOCUMENT["paths"][operation.path][operation.method.lower()]
    in_path = [each["name"] for each in made.get("parameters", []) if each["in"] == "path"]
    assert in_path == [step[1:-1] for step in operation.path.split("/") if step.startswith("{")]
    assert ("403" in made["responses"]) == (operation.access > Access.NONE)
    assert (operation.access is Access.WRITE) == (operation.method != "GET")
    assert set(operation.faults) <= TITLES.keys()
    assert any(status.startswith("2") for status in made["responses"])


def test_as_it_is_sent() -> None:
    """It is the same, and is written once: everybody may ask for it, and as often as they like."""
    assert openapi_document() == json.loads(openapi_json())
    assert openapi_json() is openapi_json()


def test_examples() -> None:
    """Every example is as its schema wants it."""
    found = 0
    for each in walk(DOCUMENT["paths"]):
        for example in [*(one["value"] for one in each.get("examples", {}).values()), each.get("example")]:
            if example is not None:
                schema = {**each["schema"], "components": DOCUMENT["components"]}
                Draft202012Validator(json.loads(json.dumps(schema))).validate(example)
                found += 1
    assert found > 10


def test_the_console_is_told_of() -> None:
    """OpenAPI has no words for a WebSocket, so words of ours are there."""
    assert CONSOLE_PATH in DOCUMENT["info"]["description"]


def test_nothing_is_shared() -> None:
    """The document survives JSON as it is."""
    assert DOCUMENT == json.loads(json.dumps(DOCUMENT))
