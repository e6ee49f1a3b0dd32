# SPDX-License-Identifier: GPL-2.0-or-later
"""Real passts are found and claimed, each by its kind, and none is harmed by it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import pytest

from probe_arena import ANSWER, LISTEN, Arena, assert_usable, claim_fails, open_arena, stay_silent, until
from qrapd.frames import probe_request, split_frames
from qrapd.probe import Claim, Command, State, attempts, claim, claim_blocking, claiming, identity, look
from qrapd.unix_sockets import look_at
from support import NOBODY


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Paths of this test's own, and what listens there."""
    with open_arena() as arena:
        yield arena


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second attempt because a busy host lets the first one wait."""
    monkeypatch.setattr(attempts, "RAMP", 60.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for those that are busy for good."""
    monkeypatch.setattr(claiming, "PATIENCE", 0.1)


@pytest.mark.parametrize(
    "options", [[], ["--one-off"], ["--ipv4-only"]], ids=lambda options: " ".join(options) or "none"
)
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
async def test_a_passt_is_claimed(
    arena: Arena, unhurried: None, options: list[str], background: bool
) -> None:
    """The lowest, with its pid, and the answer stays in the stream."""
    passt, other = arena.passt(3, 7, options=[*options, *(["--pid"] if background else [])])
    found = await claim(arena.paths)
    assert (passt.path, passt.pid) == (found.path, found.pid)
    assert_usable(found)
    assert other.alive


async def test_an_ipv6_only_passt_is_claimed(arena: Arena, unhurried: None) -> None:
    """It answers no ARP. The host it runs on has no IPv4 either."""
    commands = """
        ip link add inside type veth peer name outside && ip link set outside up && ip link set inside up &&
        ip address add 2001:db8::2/64 dev inside nodad && ip route add default via 2001:db8::1 && exec "$@"
    """
    new_host = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    (passt,) = arena.passt(1, options=["--ipv6-only"], prefix=[*new_host, "sh", "-c", commands, "sh"])
    found = await claim(arena.paths)
    assert passt.path == found.path
    assert_usable(found)


async def test_a_passt_that_ignores_the_old_question(arena: Arena) -> None:
    """One without IPv4 drops what comes from ::1, since 2024: it is asked once more, from a link-local address."""
    heard: list[bytes] = []

    def answer_the_second(client: socket.socket) -> None:
        heard.append(client.recv(4096))
        heard.append(client.recv(4096))
        client.sendall(ANSWER)
        stay_silent(client)

    arena.listener(1, answer_the_second)
    assert_usable(await claim(arena.paths))
    assert probe_request() == heard[0]
    solicitation = list(split_frames(heard[1]))[1]
    assert b"\xfe\x80" + bytes(6) == solicitation[22:30]  # where IPv6 has the source: RFC 8200


def test_without_an_event_loop(arena: Arena) -> None:
    """claim_blocking does the same, and without anyio."""
    arena.passt(2)
    stream, path = claim_blocking(arena.paths)
    with stream:
        assert arena.path(2) == path
    script = f"import sys, qrapd.probe as p; p.claim_blocking({arena.paths!r}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split()
    assert {"qrapd.probe"} == {"qrapd.probe", "anyio", "asyncio", "dataclasses", "pydantic"} & set(modules)


async def test_a_busy_passt_is_neither_touched_nor_claimed(arena: Arena, impatient: None) -> None:
    """Its client stays; the error says who has what, and what to do."""
    arena.passt(1, options=["--one-off"])
    first = await claim(arena.paths)
    error = await claim_fails(arena.paths)
    assert f"{arena.path(1)}: busy (has a client)" in error.message
    assert "start another one" in str(error.hint)
    assert_usable(first)


async def test_a_busy_passt_is_waited_for(arena: Arena) -> None:
    """As libvirt needs it: the one before has not let go yet."""
    arena.passt(1)
    first = await claim(arena.paths)
    second: list[Claim] = []

    async def come_again() -> None:
        second.append(await claim(arena.paths))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(come_again)
        await anyio.sleep(0.1)  # the second one has looked, and waits
        assert [] == second
        first.socket.close()
    assert_usable(second[0])


async def test_a_free_one_above_busy_ones_is_taken_at_once(arena: Arena, unhurried: None) -> None:
    """Others are put off, not waited for."""
    arena.passt(1, 2, 3)
    below = [await claim(arena.paths), await claim(arena.paths)]
    before = time.monotonic()
    found = await claim(arena.paths)
    assert arena.path(3) == found.path
    assert time.monotonic() - before < claiming.PATIENCE
    for each in [found, *below]:
        assert_usable(each)


@pytest.mark.parametrize("options", [[], ["--one-off"]], ids=["persistent", "one-off"])
async def test_a_stopped_passt_is_passed_over(arena: Arena, options: list[str]) -> None:
    """The next one is claimed; one that persists lives on."""
    stopped, good = arena.passt(1, 2, options=options)
    os.kill(stopped.pid, signal.SIGSTOP)
    found = await claim(arena.paths)
    assert good.path == found.path
    assert_usable(found)
    os.kill(stopped.pid, signal.SIGCONT)
    if not options:
        assert_usable(await claim([stopped.path]))


async def test_a_hung_passt_is_told_as_hung_again(arena: Arena, impatient: None) -> None:
    """The first claim's connection stays in its queue: that is no client."""
    (passt,) = arena.passt(1)
    os.kill(passt.pid, signal.SIGSTOP)
    for words in ("gave no answer", "accepts nothing: stopped or hung"):
        error = await claim_fails(arena.paths)
        assert f"silent ({words}" in error.message
        assert "stopped or hangs" in str(error.hint)
    assert [State.SILENT] == [each.state for each in await look(arena.paths[:1])]
    os.kill(passt.pid, signal.SIGCONT)
    assert_usable(await claim(arena.paths))


async def test_a_passt_that_dies_while_probed(arena: Arena) -> None:
    """It has accepted nobody; its end is seen, and the next one is claimed."""
    dying, good = arena.passt(1, 2, options=["--one-off"])
    os.kill(dying.pid, signal.SIGSTOP)

    async def kill_when_asked() -> None:
        await until(lambda: look_at([dying.path])[0].taken)
        os.kill(dying.pid, signal.SIGKILL)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(kill_when_asked)
        found = await claim(arena.paths)
    assert good.path == found.path
    assert_usable(found)


async def test_no_passt_at_all(arena: Arena, impatient: None) -> None:
    """Neither where nothing ever was, nor where a dead one has left its socket."""
    error = await claim_fails(arena.paths)
    assert f"nothing is at {arena.path(1)} to {arena.path(99)}" in error.message
    (passt,) = arena.passt(1)
    passt.close()
    assert f"{arena.path(1)}: nobody listens" in (await claim_fails(arena.paths)).message


async def test_no_one_off_passt_but_the_claimed_one_ends(arena: Arena) -> None:
    """Nor do those above a silent stranger, nor those of which one is being asked."""
    arena.listener(1)
    passts = arena.passt(2, 3, 4, 5, options=["--one-off"])
    found = await claim(arena.paths)
    assert passts[0].path == found.path
    assert [True] * 4 == [each.alive for each in passts]
    assert_usable(found)
    passts[0].wait_for_the_end()
    assert [True] * 3 == [each.alive for each in passts[1:]]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start passts as several users")
async def test_passts_of_trusted_users_are_claimed(arena: Arena) -> None:
    """Root's passt, which has become nobody, and with leave that of any other user."""
    stranger = NOBODY - 2000
    become = ["setpriv", f"--reuid={stranger}", f"--regid={stranger}", "--clear-groups"]
    (other,) = arena.passt(1, prefix=become)
    arena.passt(2)
    said: list[str] = []
    found = await claim(arena.paths, say=said.append)
    assert arena.path(2) == found.path
    assert [f"{arena.path(1)}: refused: listens as user {stranger}, who is not trusted"] == said
    assert_usable(found)
    assert not look_at([other.path])[0].taken
    assert_usable(await claim([other.path], allowed_uids={stranger}))


def newest_passt_has_vhost_user() -> bool:
    """Whether the installed passt knows the option."""
    passt = shutil.which("passt") or ""
    return "--vhost-user" in subprocess.run([passt, "--help"], capture_output=True, text=True).stdout


@pytest.mark.may_skip(reason="passt has --vhost-user since 2024-12: Debian 12's has not")
async def test_a_real_vhost_user_passt_is_passed_over(arena: Arena, impatient: None) -> None:
    """The question would end it."""
    if not newest_passt_has_vhost_user():
        pytest.skip("the installed passt has no --vhost-user")
    (passt,) = arena.passt(1, options=["--vhost-user"])
    assert "--vhost-user" in (await claim_fails(arena.paths)).message
    assert [State.VHOST_USER] == [each.state for each in await look(arena.paths[:1])]
    assert passt.alive


async def test_a_vhost_user_passt_is_passed_over(arena: Arena, tmp_path: Path, impatient: None) -> None:
    """Known by its command line alone: nobody connects."""
    program = tmp_path / "passt"
    program.symlink_to("/usr/bin/python3")
    arena.program(str(program), "-c", LISTEN, "--vhost-user", "--socket", n=1)
    assert "is a passt with --vhost-user" in (await claim_fails(arena.paths)).message
    assert not look_at([arena.path(1)])[0].taken


async def test_a_slow_one_off_passt_goes_before_a_quick_one(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once asked, one that ends when it is left is not left while its answer may still come."""
    slow, quick = arena.passt(1, 2)
    commands = {slow.path: True, quick.path: False}

    def one_off(arguments: Sequence[str]) -> Command:
        return Command(arguments[-1], commands.get(arguments[-1], False), vhost_user=False, listens=True)

    monkeypatch.setattr(identity, "read_command", one_off)
    os.kill(slow.pid, signal.SIGSTOP)
    found: list[Claim] = []

    async def claim_one() -> None:
        found.append(await claim(arena.paths))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(claim_one)
        await until(lambda: look_at([quick.path])[0].connected > 0)
        os.kill(slow.pid, signal.SIGCONT)
    assert slow.path == found[0].path
    assert_usable(found[0])


async def test_a_look_tells_all_and_ends_none(arena: Arena) -> None:
    """What would end by a question is not asked, and that is said."""
    persistent, one_off, busy, dead = (
        arena.passt(n, options=options)[0] for n, options in [(1, []), (2, ["--one-off"]), (3, []), (4, [])]
    )
    client = await claim([busy.path])
    dead.close()
    found = await look(arena.paths)
    assert 99 == len(found)
    states = [State.ANSWERING, State.FREE, State.BUSY, State.REFUSED, State.ABSENT]
    assert states == [each.state for each in found[:5]]
    assert [persistent.pid, one_off.pid, busy.pid] == [each.pid for each in found[:3]]
    assert [False, True, False] == [each.one_off for each in found[:3]]
    assert found[0].latency is not None
    assert 0 < found[0].latency < attempts.ANSWER_TIMEOUT
    assert "not asked" in found[1].detail
    assert one_off.alive
    assert_usable(client)
    assert State.ANSWERING is (await look([one_off.path], ask_all=True))[0].state
    one_off.wait_for_the_end()
