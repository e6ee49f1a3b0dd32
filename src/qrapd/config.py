# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's file: its model, its checks, and errors that name file, key, value, reason and a way out.

The text comes in, the configuration or every problem found comes out; nothing here opens a file or asks the
host anything. What only the host can tell (does the binary exist, has passt that option) is checked by
:mod:`qrapd.plan`.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qrapd.errors import ConfigurationError, Problem
from qrapd.passt_options import PasstOptions, find_clashes, parse_ports

__all__ = ["Link", "Qemu", "Restart", "VmConfiguration", "json_schema", "parse"]

NAME_PATTERN = r"^[a-z0-9-]{1,63}$"
"""A VM's name: what fits a host name's label (RFC 1123), a unit's instance and a file's name alike."""

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_QEMU_OUI = "52:54:00"  # the prefix that QEMU's own default addresses have
_NETWORK_OPTIONS = ("-netdev", "-nic", "-net")
_ACCELERATOR_OPTIONS = ("-accel", "-enable-kvm")
_OWN_DEVICE_PROPERTIES = {"mac": "use the key `mac` of the link", "netdev": None, "id": None}


def _check_mac(text: str) -> str:
    mac = text.lower()
    if not _MAC.fullmatch(mac):
        raise ValueError("is not a MAC address; write six bytes like 52:54:00:12:34:56")
    if int(mac[:2], 16) & 1:
        raise ValueError("is a multicast address; the first byte of a NIC's own address is even")
    return mac


def _check_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("is not an IPv4 or IPv6 address; write it without a prefix length") from None


def _check_device(text: str) -> str:
    model, *properties = text.split(",")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", model):
        raise ValueError("does not begin with a QEMU device name; write for example virtio-net-pci or e1000")
    for text in properties:
        key = text.partition("=")[0]
        if key in _OWN_DEVICE_PROPERTIES:
            hint = _OWN_DEVICE_PROPERTIES[key] or "leave it out"
            raise ValueError(f"sets {key}=, which qrapd sets itself; {hint}")
    return text if not properties else ",".join([model, *properties])


def _check_source(text: str) -> str:
    if text not in {"managed", "probe"} and "/" not in text:
        raise ValueError("is neither managed nor probe nor a socket's path; a path has a slash in it")
    return text


def _check_argument(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no argument of a program can")
    return text


class _Table(BaseModel):
    # strict: TOML has types, so a quoted number is a mistake that is told, not guessed at.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Qemu(_Table):
    """The table [qemu]."""

    binary: str | None = Field(None, min_length=1, description="default: qemu-system-ARCH of this host")
    accel: Literal["auto", "kvm", "tcg", "args"] = Field(
        "auto", description="auto: KVM only where it can work; args: whatever `args` says"
    )
    directory: str = Field(".", min_length=1, description="QEMU's working directory, relative to the file")
    args: list[Annotated[str, AfterValidator(_check_argument)]] = Field(
        default=[], description="handed to QEMU as they are"
    )
    console: Literal["journal", "none"] = Field(
        "journal", description="journal: the first serial port's lines become events"
    )
    powerdown_timeout: float = Field(
        60, ge=0, le=86400, description="seconds for the guest to power down before QEMU is told to quit"
    )
    quit_timeout: float = Field(
        5, gt=0, le=3600, description="seconds for QEMU to quit, and again to obey SIGTERM, before SIGKILL"
    )


class Restart(_Table):
    """The table [restart]."""

    policy: Literal["never", "on-failure", "always"] = "never"
    limit: int = Field(5, ge=1, description="this many restarts in `window` seconds, then failed")
    window: float = Field(60, gt=0, description="seconds")


class Link(_Table):
    """One table [[link]]: one NIC and its way to the host."""

    mode: Literal["swap", "vhost-user", "native"] = "swap"
    source: Annotated[str, AfterValidator(_check_source)] = Field(
        "managed", description="managed: qrapd starts passt; probe: finds a free one; or a socket's path"
    )
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "virtio-net-pci", description="QEMU's device, with further properties if wanted"
    )
    mac: Annotated[str, AfterValidator(_check_mac)] | None = Field(
        None, description="default: derived from the VM's name and the link's position, stable"
    )
    guest_addresses: list[Annotated[str, AfterValidator(_check_address)]] = Field(
        default=[], description="of a guest that does not use its lease"
    )
    stall_timeout: float = Field(
        5, ge=0, le=3600, description="seconds that passt may leave bytes unread; 0: never replaced for that"
    )
    passt_binary: str = Field("passt", min_length=1, description="a program on PATH, or a path")
    passt: PasstOptions = PasstOptions()


class VmFile(_Table):
    """A VM's file."""

    name: str | None = Field(None, pattern=NAME_PATTERN, description="default: the file's stem")
    autostart: bool = Field(False, description="whether the host agent runs it")
    qemu: Qemu = Qemu()
    restart: Restart = Restart()
    link: list[Link] = Field(default=[], description="one per NIC, in order")


class VmConfiguration:
    """A VM's file, checked, with every default filled in."""

    def __init__(self, path: Path, name: str, file: VmFile) -> None:
        self.path = path
        self.name = name
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
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(
            str(path), [Problem("", f"is not TOML: {_lower_first(str(error))}", hint="see https://toml.io")]
        ) from None
    problems: list[Problem] = []
    file = None
    try:
        file = VmFile.model_validate(data)
    except ValidationError as error:
        problems += [_problem(dict(details), data) for details in error.errors(include_url=False)]
    problems += _check_as_a_whole(data)
    name = file.name if file and file.name else path.stem
    if not (isinstance(data.get("name"), str) or re.match(NAME_PATTERN, name)):
        problems.append(
            Problem(
                "name",
                "is missing, and the file's own name cannot serve",
                value=repr(name),
                hint="a name has 1 to 63 of a-z, 0-9 and -: add a line like name = 'web' at the top",
            )
        )
    if problems or file is None:
        raise ConfigurationError(str(path), problems)
    return VmConfiguration(path, name, file)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a VM's file, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **VmFile.model_json_schema(),
        "title": "qrapd VM",
    }


# --- what one key cannot know -------------------------------------------------------------------------


def _check_as_a_whole(data: dict[str, Any]) -> Iterator[Problem]:
    """Checks between keys, on the raw data, so that they are made even where some key is wrong by itself."""
    qemu = data.get("qemu")
    qemu = qemu if isinstance(qemu, dict) else {}
    links = data.get("link")
    links = [link for link in links if isinstance(link, dict)] if isinstance(links, list) else []
    args = qemu.get("args")
    yield from _check_args(args if isinstance(args, list) else [], bool(links), qemu.get("accel", "auto"))
    yield from find_clashes(_forwards(links))
    yield from _check_macs(links)


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
    machines = (args[i + 1] for i, name in enumerate(names[:-1]) if name in {"-machine", "-M"})
    return any(re.search(r"(^|,)accel=", str(value)) for value in machines)


def _check_args(args: list[object], has_links: bool, accel: object) -> Iterator[Problem]:
    for index, argument in enumerate(args):
        name = option_name(argument)
        key = f"qemu.args[{index}]"
        if name in _NETWORK_OPTIONS and has_links:
            yield Problem(
                key,
                "makes a network of its own beside the [[link]] tables, which make the network",
                value=repr(argument),
                hint="remove it and what follows it; the NIC's model and properties go into the link's `device`",
            )
        if name == "-daemonize":
            yield Problem(
                key,
                "would take QEMU out of qrapd's hands",
                value=repr(argument),
                hint="remove it; to run in the background, run qrapd there (systemd, or your shell's &)",
            )
    if accel in {"kvm", "tcg"} and chooses_accelerator(args):
        yield Problem(
            "qemu.accel",
            "is set, and `args` chooses an accelerator too",
            value=repr(accel),
            hint="remove one of the two, or say accel = 'args'",
        )


def _forwards(links: list[dict[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Every port forward that can be read; those that cannot have been told already."""
    for index, link in enumerate(links):
        passt = link.get("passt")
        for protocol in ("tcp", "udp"):
            specs = passt.get(f"{protocol}_ports", []) if isinstance(passt, dict) else []
            single = not isinstance(specs, list)
            for position, spec in enumerate([specs] if single else specs):
                key = f"link[{index}].passt.{protocol}_ports" + ("" if single else f"[{position}]")
                try:
                    yield key, protocol, parse_ports(str(spec))
                except ValueError:
                    continue


def _check_macs(links: list[dict[str, Any]]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, link in enumerate(links):
        mac = link.get("mac")
        if not isinstance(mac, str):
            continue
        first = seen.setdefault(mac.lower(), index)
        if first != index:
            yield Problem(
                f"link[{index}].mac",
                f"is that of link[{first}] too",
                value=repr(mac),
                hint="give each NIC its own, or leave `mac` out",
            )


# --- pydantic's errors in our words -------------------------------------------------------------------

_REASONS = {
    "string_type": "must be a string, in quotes",
    "int_type": "must be a whole number, without quotes",
    "float_type": "must be a number, without quotes",
    "bool_type": "must be true or false, without quotes",
    "list_type": "must be a list: [ … ]",
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "model_attributes_type": "must be a table",
}


def _problem(details: dict[str, Any], data: dict[str, Any]) -> Problem:
    location, kind = details["loc"], details["type"]
    key = _key_path(location, data)
    if kind == "extra_forbidden":
        return Problem(key, "is not a known key", hint=_nearest_key(location))
    value = _show(details["input"])
    context = details.get("ctx", {})
    if kind == "value_error":
        reason, _, hint = str(context["error"]).partition("; ")
        return Problem(key, reason, value=value, hint=hint or None)
    if kind == "literal_error":
        return Problem(key, f"must be one of {context['expected']}", value=value)
    if kind == "string_pattern_mismatch":
        return Problem(key, "must have 1 to 63 characters of a-z, 0-9 and -", value=value)
    if kind in _REASONS:
        return Problem(key, _REASONS[kind], value=value)
    return Problem(key, _lower_first(details["msg"]), value=value)


def _key_path(location: Iterable[object], data: object) -> str:
    """``("link", 0, "passt")`` as ``link[0].passt``; what pydantic adds for a union's branches is left out."""
    path = ""
    for step in location:
        if isinstance(data, dict) and step not in data and path:
            break
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step}" if path else str(step)
        try:
            data = data[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            break
    return path


def _nearest_key(location: Sequence[object]) -> str:
    table: type[BaseModel] = VmFile
    for step in location[:-1]:
        if isinstance(step, str):
            table = _TABLES[step]
    known = list(table.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    if location[-1] in ("links", "nic", "network"):
        return "a NIC is written as a table [[link]]"
    return f"known here: {', '.join(known)}"


_TABLES: dict[str, type[BaseModel]] = {
    "qemu": Qemu,
    "restart": Restart,
    "link": Link,
    "passt": PasstOptions,
}


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
