# SPDX-License-Identifier: GPL-2.0-or-later
"""What docs/agent.md shows of the API, and the README of `qrapd ps`, held against a real agent."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_runner import AgentHost, agent_host
from qrapd.agent_file import parse as parse_agent_file
from qrapd.api.limits import DEFAULT
from qrapd.api.operations import OPERATIONS
from qrapd.api.problems import TITLES
from qrapd.commands.listing import row
from qrapd.config import parse
from support import PATIENCE, free_port

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENT = (PROJECT / "docs/agent.md").read_text()
README = (PROJECT / "README.md").read_text()

BLOCKS: list[str] = re.findall(r"```console\n(.*?)```", DOCUMENT, re.DOTALL)
"""Commands with what they print, in the order in which they stand there: later ones go on from earlier ones."""

SOCKET = "/run/qrapd/agent.sock"


@dataclass
class Step:
    """A command, and what it is to print."""

    command: str
    shown: str

    def accepts(self, printed: str) -> bool:
        """Whether this was printed, but for numbers, and with anything in the place of dots."""
        pattern = ".*".join(re.escape(_without_numbers(part)) for part in self.shown.split("..."))
        return re.fullmatch(pattern, _without_numbers(printed), re.DOTALL) is not None


def _without_numbers(text: str) -> str:
    """Pids, times and random ids differ from run to run; a status of HTTP, and a port, do not."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
    return re.sub(r'("(?:qemu_pid|passt_pid|last_outage_ms)": ?)[\d.]+', r"\1N", text).strip()


def steps(block: str) -> Iterator[Step]:
    """The commands of a block; one goes on in lines that are indented."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        count = 1
        while lines[count - 1].endswith("\\"):
            count += 1
        yield Step("\n".join(lines[:count]), "\n".join(lines[count:]))


def test_steps() -> None:
    """The reader of the document reads it right, and a wrong output is found."""
    first, second = steps('$ a \\\n   b\n{"qemu_pid":1,...}\n$ c\n')
    assert (Step("a \\\n   b", '{"qemu_pid":1,...}'), Step("c", "")) == (first, second)
    assert first.accepts('{"qemu_pid":77,"x":"y"}\n')
    assert not first.accepts('{"name":"web"}\n')
    assert second.accepts("")
    assert not second.accepts("curl: no")


@pytest.fixture
def host(place: Path) -> Iterator[AgentHost]:
    """A host for an agent."""
    with agent_host(place) as host:
        yield host


def test_the_examples(host: AgentHost, place: Path) -> None:
    """Each command prints what is shown, one after the other."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    web = host.write("web")
    ports = {"8080": str(web.ports[0]), "8443": str(free_port())}
    assert 5 < len(BLOCKS)
    with host.agent() as agent:
        agent.wait_for_api()
        agent.wait_state("web", "ready")
        for block in BLOCKS:
            for step in steps(block):
                command, shown = step.command.replace(SOCKET, str(agent.socket)), step.shown
                for there, here in ports.items():
                    command, shown = command.replace(there, here), shown.replace(there, here)
                done = subprocess.run(
                    ["bash", "-c", command],
                    cwd=place,
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE,
                    check=False,
                )
                assert Step(command, shown).accepts(done.stdout), f"{command}\n{done.stdout}{done.stderr}"
        agent.assert_no_bug()
        for name in agent.statuses():
            agent.act(name, "kill")
        agent.wait_all("exited", ["web"])
        assert 0 == agent.stop()
    assert [] == [child for child in host.known.values() if child.alive]
    assert [] == [each for each in host.base.iterdir() if each.is_dir()]


def test_the_files_are_right() -> None:
    """Those that a reader copies."""
    vm, own = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert parse(vm, Path("/etc/qrapd/vms/web.toml")).autostart
    assert "vm-admins" == parse_agent_file(own, Path("/etc/qrapd/agent.toml")).group


def test_the_table_has_every_operation() -> None:
    """And so has it every status that an error can have."""
    table = DOCUMENT.partition("## The API\n")[2].partition("\n\nOne VM.")[0]
    for each in OPERATIONS:
        last = each.path.replace("{name}", "NAME").replace("{index}", "N")
        assert last in table or f"`{last.rpartition('/')[2]}`" in table, each.path
    errors = DOCUMENT.partition("### Errors\n")[2].partition("\n### ")[0]
    listed = {
        int(n) for line in re.findall(r"^\| ([\d, ]+) \|", errors, re.MULTILINE) for n in line.split(", ")
    }
    assert set(TITLES) == listed


def test_the_limits() -> None:
    """The numbers are those of the code."""
    text = DOCUMENT.partition("## Limits\n")[2]
    assert (
        f"{DEFAULT.connections} connections, {DEFAULT.per_uid} of one user; the last {DEFAULT.kept}" in text
    )
    assert f"{DEFAULT.head_bytes // 1024} KiB; {DEFAULT.request_seconds} s to send" in text.replace(
        "\n  ", " "
    )
    assert f"{DEFAULT.write_seconds} s to read" in text


def test_what_the_readme_shows_of_ps(host: AgentHost) -> None:
    """The columns are those that there are, and a line is as one is now."""
    block = next(
        block for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) if "qrapd ps\n" in block
    )
    head, *lines = block.partition("qrapd ps\n")[2].splitlines()
    host.write("web")
    with host.agent() as agent:
        agent.wait_for_api()
        shown = row(agent.wait_state("web", "ready"))
        qrapd = [sys.executable, "-m", "qrapd", "ps", "--runtime-dir", str(host.base)]
        printed = subprocess.run(qrapd, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        agent.act("web", "kill")
        agent.wait_state("web", "exited")
        assert 0 == agent.stop()
    assert printed.splitlines()[0].split() == head.split()
    web = next(line for line in lines if line.startswith("web "))
    assert [re.sub(r"[\dhms ]+$", "", word) for word in shown[:2]] == web.split()[:2]
