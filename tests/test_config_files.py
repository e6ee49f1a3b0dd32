# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests for what is in config/: the example shows all that there is, and the schema is the models'."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from qrapd.config import Link, Qemu, Restart, VmConfiguration, VmFile, json_schema, parse
from qrapd.passt_options import PasstOptions
from qrapd.ports import PORTS_PATTERN, parse_ports

DIRECTORY = Path(__file__).resolve().parent.parent / "config"
EXAMPLE = (DIRECTORY / "example.toml").read_text()
SETTING = re.compile(r"^#(?=[a-z\[])", re.MULTILINE)
"""What makes a setting of a comment: prose has a space after its "#"."""

MODELS: dict[str, type[BaseModel]] = {
    "": VmFile,
    "qemu": Qemu,
    "restart": Restart,
    "link": Link,
    "passt": PasstOptions,
}
EVERY_KEY = SETTING.sub("", EXAMPLE)


def example(text: str) -> VmConfiguration:
    return parse(text, DIRECTORY / "example.toml")


# --- the example --------------------------------------------------------------------------------------


def test_the_example_is_right() -> None:
    """Somebody may copy it as it is."""
    vm = example(EXAMPLE)
    assert ("web", 1) == (vm.name, len(vm.links))
    assert ("8080:80", "127.0.0.1/2222:22") == vm.links[0].passt.tcp_ports


def test_the_example_is_right_with_every_setting() -> None:
    """Each commented-out setting can be used as it stands, all together too."""
    assert 2 == len(example(EVERY_KEY).links)


def test_each_setting_of_the_example_is_right_alone() -> None:
    """None of them leans on another that is commented out; the second link goes last, as one."""
    first, second = EXAMPLE.split("#[[link]]")
    places = [match.start() for match in SETTING.finditer(first)]
    assert len(places) > 30
    for place in places:
        example(EXAMPLE[:place] + EXAMPLE[place + 1 :])
    assert 2 == len(example(first + SETTING.sub("", "#[[link]]" + second)).links)


@pytest.mark.parametrize("table", MODELS)
def test_the_example_shows_every_key(table: str) -> None:
    """A key that is not in the example cannot be found."""
    data = tomllib.loads(EVERY_KEY)
    tables = {"": data, **data, "link": data["link"][0], "passt": data["link"][0]["passt"]}
    assert set() == set(MODELS[table].model_fields) ^ set(tables[table])


@pytest.mark.parametrize("table", ["", "qemu", "restart", "link"])
def test_what_is_commented_out_is_the_default(table: str) -> None:
    """Where the model has a default of its own, removing the "#" changes nothing."""
    vm = example(EVERY_KEY)
    shown = {"": vm, "qemu": vm.qemu, "restart": vm.restart, "link": vm.links[0]}[table]
    for name, field in MODELS[table].model_fields.items():
        if field.default_factory is None and field.default is not None and name not in {"args", "link"}:
            assert field.default == getattr(shown, name), name


def test_the_example_tells_editors_of_the_schema() -> None:
    """taplo and the editors that use it read this from the first line."""
    first_line = EXAMPLE.splitlines()[0]
    assert "#:schema ./qrapd-vm.schema.json" == first_line
    assert (DIRECTORY / first_line.partition(" ")[2]).is_file()


# --- the schema ---------------------------------------------------------------------------------------


def test_the_schema_is_that_of_the_models() -> None:
    """If this fails, `make schema` writes it anew."""
    assert json_schema() == json.loads((DIRECTORY / "qrapd-vm.schema.json").read_text())


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema within a schema."""
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from parts(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from parts(value)


def definitions() -> dict[str, dict[str, Any]]:
    schema = json_schema()
    named: dict[str, dict[str, Any]] = {**schema["$defs"], "VmFile": schema}
    return named


@pytest.mark.parametrize("model", MODELS.values())
def test_the_schema_describes_every_key(model: type[BaseModel]) -> None:
    """An editor shows the description while one types."""
    properties = definitions()[model.__name__]["properties"]
    assert set(model.model_fields) == set(properties)
    assert [] == [name for name, schema in properties.items() if not schema.get("description")]


def test_the_schema_is_free_of_noise() -> None:
    """No null, which TOML does not have; no titles but its own; unknown keys are marked."""
    schema = json_schema()
    assert "qrapd VM" == schema.pop("title")
    assert [] == [part for part in parts(schema) if "title" in part or part.get("type") == "null"]
    assert [] == [part for part in parts(schema) if "default" in part and part["default"] is None]
    tables = definitions()
    assert {"PasstOptions"} == {name for name in tables if tables[name]["additionalProperties"] is not False}


def test_the_schema_knows_what_can_be_chosen() -> None:
    """Enumerations and patterns are offered and checked while one types."""
    tables = definitions()
    assert ["auto", "kvm", "tcg", "args"] == tables["Qemu"]["properties"]["accel"]["enum"]
    assert ["swap", "vhost-user", "native"] == tables["Link"]["properties"]["mode"]["enum"]
    assert ["never", "on-failure", "always"] == tables["Restart"]["properties"]["policy"]["enum"]
    assert re.search(tables["VmFile"]["properties"]["name"]["pattern"], "web-2")
    assert re.search(tables["Link"]["properties"]["mac"]["pattern"], "52:54:00:12:34:56")
    assert "fd" in tables["PasstOptions"]["propertyNames"]["not"]["enum"]


def complaint(text: str) -> str:
    """What the parser of ports has to say of a text; nothing if it is right."""
    try:
        parse_ports(text)
    except ValueError as error:
        return str(error)
    return ""


@given(st.from_regex(PORTS_PATTERN.replace("[^/]", "[0-9a-f:.]"), fullmatch=True))
def test_what_the_ports_pattern_lets_pass_is_ports(text: str) -> None:
    """An editor underlines what has no port's form; which numbers go together is the parser's to say."""
    assert "which is no port and no range of ports" not in complaint(text)


@pytest.mark.parametrize("text", ["", "x", "22,", "22:", "~", "auto", "22 ", "22-", "1:2:3"])
def test_the_ports_pattern_stops_what_is_no_port(text: str) -> None:
    """These are the slips of a finger."""
    assert not re.search(PORTS_PATTERN, text)
