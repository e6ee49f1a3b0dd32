# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's file: its model, its checks, and errors that name file, key, value, reason and a way out.

The text comes in, the configuration or every problem found comes out; nothing here opens a file or asks the
host anything. What only the host can tell (does the binary exist, has passt that option) is checked by
:mod:`qrapd.plan`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from qrapd.errors import ConfigurationError, Problem
from qrapd.passt_options import Mac, PasstOptions, Text, check_unicast, nearest, toml_key, toml_text
from qrapd.ports import find_clashes, read_forwards

__all__ = [
    "NAME_PATTERN",
    "Link",
    "Qemu",
    "Restart",
    "VmConfiguration",
    "VmFile",
    "check",
    "chooses_accelerator",
    "json_schema",
    "option_name",
    "parse",
]

NAME_PATTERN = r"^[a-z0-9-]{1,63}$"
"""A VM's name: what fits a host name's label (RFC 1123), a unit's instance and a file's name alike."""

_NAME_IN_WORDS = "1 to 63 characters of a-z, 0-9 and -"
_QEMU_OUI = "52:54:00"  # the prefix that QEMU's own default addresses have
_NETWORK_OPTIONS = ("-netdev", "-nic", "-net")
_ACCELERATOR_OPTIONS = ("-accel", "-enable-kvm")
_OWN_DEVICE_PROPERTIES = {
    "mac": "use the key `mac` of the link",
    "netdev": "leave it out",
    "id": "leave it out",
}

_DEEPEST = 20
"""Tables and lists within each other; a right file has at most link, its tables, passt, and a list there."""


def _check_device(text: str) -> str:
    model, *properties = text.split(",")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", model):
        raise ValueError(
            "does not begin with a QEMU device's name; write for example virtio-net-pci or e1000"
        )
    for key in (each.partition("=")[0] for each in properties):
        if key in _OWN_DEVICE_PROPERTIES:
            raise ValueError(f"sets {key}=, which qrapd sets itself; {_OWN_DEVICE_PROPERTIES[key]}")
    return text


def _check_source(text: str) -> str:
    if text not in ("managed", "probe") and "/" not in text:
        raise ValueError("is neither managed nor probe nor a socket's path; a path has a slash in it")
    if text.startswith("~"):
        raise ValueError("begins with ~, which only a shell understands; write the whole path")
    return text


class _Table(BaseModel):
    # strict: TOML has types, so a quoted number is a mistake that is told, not guessed at.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Qemu(_Table):
    """The table [qemu]."""

    binary: Text | None = Field(
        None, min_length=1, description="a program on PATH, or a path; default: qemu-system-ARCH of this host"
    )
    accel: Literal["auto", "kvm", "tcg", "args"] = Field(
        "auto", description="auto: KVM only where it can work; args: whatever `args` says"
    )
    directory: Text = Field(".", min_length=1, description="QEMU's working directory, relative to the file")
    args: list[Text] = Field(default=[], description="handed to QEMU as they are")
    console: Literal["journal", "none"] = Field(
        "journal", description="journal: the first serial port's lines become events; none: up to `args`"
    )
    sandbox: bool = Field(
        True, description="whether QEMU may start no programs and not change its user, by its -sandbox"
    )
    powerdown_timeout: float = Field(
        60, ge=0, le=86400, description="seconds for the guest to power down before QEMU is told to quit"
    )
    quit_timeout: float = Field(
        5, gt=0, le=3600, description="seconds for QEMU to quit, and again to obey SIGTERM, before SIGKILL"
    )


class Restart(_Table):
    """The table [restart]."""

    policy: Literal["never", "on-failure", "always"] = Field(
        "never", description="whether qrapd starts the VM again; under systemd the unit's Restart= does it"
    )
    limit: int = Field(5, ge=1, description="this many restarts in `window` seconds, then failed")
    window: float = Field(60, gt=0, description="seconds")


class Link(_Table):
    """One table [[link]]: one NIC and its way to the host."""

    mode: Literal["swap", "vhost-user", "native"] = Field(
        "swap", description="how QEMU reaches passt, and how a lost passt is replaced"
    )
    source: Annotated[Text, AfterValidator(_check_source)] = Field(
        "managed", description="managed: qrapd starts passt; probe: finds a free one; or a socket's path"
    )
    device: Annotated[Text, AfterValidator(_check_device)] = Field(
        "virtio-net-pci", description="QEMU's device, with further properties if wanted"
    )
    mac: Mac | None = Field(
        None, description="default: derived from the VM's name and the link's position, stable"
    )
    guest_addresses: list[Annotated[str, AfterValidator(check_unicast)]] = Field(
        default=[], description="of a guest that does not use its lease"
    )
    stall_timeout: float = Field(
        5, ge=0, le=3600, description="seconds that passt may leave bytes unread; 0: never replaced for that"
    )
    allow_uids: list[Annotated[int, Field(ge=0, lt=2**32 - 1)]] = Field(
        default=[],
        description="users whose sockets are trusted, beside our own, root's and passt's, where source is not managed",
    )
    passt_binary: Text = Field("passt", min_length=1, description="a program on PATH, or a path")
    passt: PasstOptions = Field(
        default_factory=PasstOptions, description="passt(1)'s long options, with underscores"
    )


class VmFile(_Table):
    """A VM's file."""

    name: str | None = Field(
        None, pattern=NAME_PATTERN, description=f"the VM's name: {_NAME_IN_WORDS}; default: the file's stem"
    )
    autostart: bool = Field(False, description="whether the host agent runs it")
    qemu: Qemu = Field(default_factory=Qemu, description="the machine")
    restart: Restart = Field(default_factory=Restart, description="what happens when the VM fails")
    link: list[Link] = Field(default=[], description="one per NIC, in order; none: no network")


class VmConfiguration:
    """A VM's file, checked, with every default filled in."""

    def __init__(self, path: Path, name: str, file: VmFile) -> None:
        self.path = path
        self.name = name
        self.file = file
        self.qemu = file.qemu
        self.restart = file.restart
        self.links = tuple(file.link)
        self.autostart = file.autostart

    @property
    def directory(self) -> Path:
        """QEMU's working directory."""
        return self.path.parent / self.qemu.directory

    def mac(self, index: int) -> str:
        """The MAC address of a link: the file's, or one made from the VM's name and the link's position."""
        if given := self.links[index].mac:
            return given
        digest = hashlib.sha256(f"{self.name}/{index}".encode()).hexdigest()
        return ":".join([_QEMU_OUI, digest[0:2], digest[2:4], digest[4:6]])


def parse(text: str, path: Path) -> VmConfiguration:
    """Read a VM's file.

    :param path: where the text is from: for messages, for the default name, and for relative paths.
    :raise ConfigurationError: with all problems that the file has.
    """
    try:
        data = tomllib.loads(text)
        _refuse_extremes(data)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(str(path), [_not_toml(error, text)]) from None
    return check(data, path)


def check(data: dict[str, Any], path: Path) -> VmConfiguration:
    """Check what a VM's file says.

    :param path: where it is from: for messages, for the default name, and for relative paths.
    :raise ConfigurationError: with all problems that it has.
    """
    problems: list[Problem] = []
    if isinstance(link := data.get("link"), dict):
        # [link] for [[link]] is soon written; what else is wrong in it is told at once, too.
        problems.append(Problem("link", "must be a list: [ ... ]", _show(link), "write it as [[link]]"))
        data = data | {"link": [link]}
    problems += _check_as_a_whole(data)
    file = None
    try:
        file = VmFile.model_validate(data)
    except ValidationError as error:
        problems = [_problem(details["loc"], dict(details), data) for details in error.errors()] + problems
    name = file.name if file and file.name else path.stem
    if "name" not in data and not re.fullmatch(NAME_PATTERN, name):
        problems.insert(
            0,
            Problem(
                "name",
                f"is missing, and the file's own name cannot serve, as it is not {_NAME_IN_WORDS}",
                value=toml_text(name),
                hint="add a line like name = 'web' at the top",
            ),
        )
    if problems or file is None:
        raise ConfigurationError(str(path), _in_order(problems, data))
    return VmConfiguration(path, name, file)


def _refuse_extremes(value: object, depth: int = 0) -> None:
    """Refuse what TOML's grammar allows and no key takes, but what would trouble whoever handles it later.

    Python refuses to write an integer of thousands of digits; TOML promises 64 bits only.
    """
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError("an integer does not fit into 64 bits")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_extremes(item, depth + 1)


def _not_toml(error: ValueError | RecursionError, text: str) -> Problem:
    if isinstance(error, RecursionError):
        return Problem("", "has tables or lists nested too deeply", hint="qrapd schema shows what goes where")
    lines = text.split("\n")
    words = _lower_first(str(error)).replace(
        "at end of document", f"at line {len(lines)}, column {len(lines[-1]) + 1}, the end of the file"
    )
    return Problem("", f"is not TOML: {words}", hint="see https://toml.io")


class _SchemaForEditors(GenerateJsonSchema):
    """Without what only pydantic's users want: a title for each key, and null, which TOML does not have."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False

    def nullable_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        made = super().default_schema(schema)
        if made.get("default") in (None, []):
            made.pop("default", None)
        return made


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a VM's file, for editors."""
    made = VmFile.model_json_schema(schema_generator=_SchemaForEditors)
    for table in made["$defs"].values():
        table.pop("title", None)
    return {"$schema": GenerateJsonSchema.schema_dialect, **made, "title": "qrapd VM"}


# --- what one key cannot know -------------------------------------------------------------------------


def _check_as_a_whole(data: dict[str, Any]) -> Iterator[Problem]:
    """Checks between keys, on the raw data, so that they are made even where some key is wrong by itself."""
    qemu, links = data.get("qemu"), data.get("link")
    qemu = qemu if isinstance(qemu, dict) else {}
    links = links if isinstance(links, list) else []
    tables = {index: link for index, link in enumerate(links) if isinstance(link, dict)}
    args = qemu.get("args")
    whole = [
        *_check_args(args if isinstance(args, list) else [], bool(links), qemu.get("accel")),
        *find_clashes(
            forward
            for index, link in tables.items()
            if isinstance(passt := link.get("passt"), dict)
            for forward in read_forwards(passt, f"link[{index}].passt")
        ),
        *_check_macs(tables),
        *_check_unmanaged(tables),
    ]
    for problem in whole:
        yield replace(problem, value=_show(_look_up(_steps(problem.key), data)))


def option_name(argument: object) -> str | None:
    """The name of a QEMU option, which may be written with one dash or two (QEMU's lookup_opt())."""
    if not isinstance(argument, str) or not argument.startswith("-"):
        return None
    return "-" + argument.lstrip("-")


def chooses_accelerator(args: Sequence[object]) -> bool:
    """Whether QEMU's arguments choose the accelerator themselves."""
    names = [option_name(argument) for argument in args]
    if any(name in _ACCELERATOR_OPTIONS for name in names):
        return True
    machines = (args[i + 1] for i, name in enumerate(names[:-1]) if name in ("-machine", "-M"))
    return any(re.search(r"(^|,)accel=", str(value)) for value in machines)


def _check_args(args: list[object], has_links: bool, accel: object) -> Iterator[Problem]:
    if accel in ("kvm", "tcg") and chooses_accelerator(args):
        yield Problem(
            "qemu.accel",
            "is set, and `args` chooses an accelerator too",
            hint="remove one of the two, or say accel = 'args'",
        )
    for index, argument in enumerate(args):
        name = option_name(argument)
        if name in _NETWORK_OPTIONS and has_links:
            yield Problem(
                f"qemu.args[{index}]",
                "makes a network of its own beside the [[link]] tables, which make the network",
                hint="remove it and what follows it; the NIC's model and properties go into the link's `device`",
            )
        if name == "-daemonize":
            yield Problem(
                f"qemu.args[{index}]",
                "would take QEMU out of qrapd's hands",
                hint="remove it; to run in the background, run qrapd there (systemd, or your shell's &)",
            )
        # No option of QEMU's has a blank in its name; of values, the kernel's command line alone may look like this.
        if name and " " in name and (index == 0 or option_name(args[index - 1]) != "-append"):
            words = ", ".join(map(toml_text, str(argument).split()))
            yield Problem(
                f"qemu.args[{index}]",
                "is several arguments in one, which QEMU takes for the name of an option",
                hint=f"give each its own quotes: {words}",
            )


def _check_unmanaged(links: Mapping[int, dict[str, Any]]) -> Iterator[Problem]:
    """What only a passt of our own could obey, or only somebody else's could need."""
    sockets: dict[str, int] = {}
    for index, link in links.items():
        source = link.get("source", "managed")
        managed = source == "managed"
        if isinstance(source, str) and "/" in source:
            first = sockets.setdefault(source, index)
            if first != index:
                yield Problem(
                    f"link[{index}].source",
                    f"is that of link[{first}] too, and each passt serves one NIC",
                    value=toml_text(source),
                    hint="start a passt for each link, on a socket of its own",
                )
        for key in ("passt", "passt_binary") if not managed else ("allow_uids",):
            if link.get(key):
                yield Problem(
                    f"link[{index}].{key}",
                    "has no effect on a passt that qrapd starts itself"
                    if managed
                    else "has no effect on a passt that is there already",
                    hint="remove it, or " + ("choose another `source`" if managed else "source"),
                )


def _check_macs(links: dict[int, dict[str, Any]]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, link in links.items():
        mac = link.get("mac")
        if isinstance(mac, str) and (first := seen.setdefault(mac.lower(), index)) != index:
            yield Problem(
                f"link[{index}].mac",
                f"is that of link[{first}] too",
                hint="give each NIC its own, or leave `mac` out",
            )


# --- pydantic's errors in our words -------------------------------------------------------------------

_REASONS = {
    "string_type": "must be a string, in quotes",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_pattern_mismatch": f"must be {_NAME_IN_WORDS}",  # only `name` has a pattern of pydantic's
    "int_type": "must be a whole number, without quotes",
    "float_type": "must be a number, without quotes",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false, without quotes",
    "list_type": "must be a list: [ ... ]",
    "model_type": "must be a table",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than_equal": "must be {le:g} or less",
}

_TABLES: dict[str, tuple[type[BaseModel], str]] = {
    "": (VmFile, "the top of the file, above all tables"),
    "qemu": (Qemu, "[qemu]"),
    "restart": (Restart, "[restart]"),
    "link": (Link, "[[link]]"),
    "passt": (PasstOptions, "[link.passt]"),
}
"""By the key that holds them: the model, and how the file writes it."""


def _problem(location: Sequence[int | str], details: dict[str, Any], data: dict[str, Any]) -> Problem:
    location = _within(location, data)
    key, kind, context = _key_path(location), details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(key, "is not a known key", hint=_right_key(location))
    value = _show(_look_up(location, data))
    if kind == "value_error":
        reason, _, hint = str(context["error"]).rpartition("; ")
        return Problem(key, reason or hint, value, hint if reason else None)
    # A kind that is not in the table would be told in pydantic's words; a test looks for such.
    reason = _REASONS[kind].format(**context) if kind in _REASONS else _lower_first(details["msg"])
    name = _innermost(location)
    return Problem(key, reason, value, f"write it as {_TABLES[name][1]}" if name in _TABLES else None)


def _innermost(location: Sequence[int | str]) -> str:
    """The last name on the way, without indices; "" for the top of the file."""
    return next((step for step in reversed(location) if isinstance(step, str)), "")


def _right_key(location: Sequence[int | str]) -> str:
    """What an unknown key may have been meant to be."""
    name, here = str(location[-1]), _innermost(location[:-1])
    known = list(_TABLES[here][0].model_fields)
    places = [title for model, title in _TABLES.values() if name in model.model_fields]
    if places:
        return f"it belongs into {places[0]}"
    if name in ("nic", "network"):
        return "a NIC is written as a table [[link]]"
    return nearest(name, known) or f"known here: {', '.join(known)}"


# --- places in the file -------------------------------------------------------------------------------


def _within(location: Sequence[int | str], data: object) -> list[int | str]:
    """``location`` as far as the file has it: not the index of a single value that stands for a list."""
    found: list[int | str] = []
    for step in location:
        if not isinstance(data, dict | list):
            break
        found.append(step)
        data = _look_up([step], data)
    return found


def _look_up(location: Sequence[int | str], data: Any) -> Any:
    """What stands there, or None."""
    for step in location:
        if isinstance(data, dict):
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            return None
    return data


def _key_path(location: Sequence[int | str]) -> str:
    """``("link", 0, "passt")`` as ``link[0].passt``, with quotes where TOML wants them."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{toml_key(step)}" if path else toml_key(step)
    return path


def _steps(path: str) -> list[int | str]:
    """The reverse of `_key_path`."""
    steps = re.findall(r'\[(\d+)\]|("(?:[^"\\]|\\.)*")|([^.\[\]"]+)', path)
    return [int(index) if index else json.loads(quoted) if quoted else name for index, quoted, name in steps]


def _in_order(problems: Sequence[Problem], data: dict[str, Any]) -> list[Problem]:
    """The problems in the order of the file, one for each key and reason."""

    def place(problem: Problem) -> list[int]:
        position: list[int] = []
        value: Any = data
        for step in _steps(problem.key):
            names = list(value) if isinstance(value, dict) else []
            # What is missing stands above all else
            position.append(step if isinstance(step, int) else names.index(step) if step in names else -1)
            value = _look_up([step], value)
        return position

    return sorted(dict.fromkeys(problems), key=place)


def _show(value: object) -> str:
    text = toml_text(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
