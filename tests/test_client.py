# SPDX-License-Identifier: GPL-2.0-or-later
"""The client of the API: its errors, its patience, its events, and what it tells where nobody answers."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_host import PretendedHost
from fake_host import FakeHost, link, status
from qrapd import config, record
from qrapd.api.access import Policy
from qrapd.api.app import make_app
from qrapd.client import places as client_places
from qrapd.client import survey as client_survey
from qrapd.client.http import Client, Forbidden, Unreachable, error_of
from qrapd.client.places import Places, is_name, look, origin_of
from qrapd.client.stream import EventReader, ServerEvent
from qrapd.client.survey import survey
from qrapd.client.waiting import Verdict, killed, restarted, started, stopped, swapped
from qrapd.commands import asking
from qrapd.errors import ConfigurationError, Conflict, QrapdError, Unavailable, Unknown, UsageError
from qrapd.process import start_time
from qrapd.record import LinkRecord, ProcessId, Record
from qrapd.vm_status import VmStatus
from serving import serving

PATIENCE = 30.0


@contextmanager
def mute(path: Path, backlog: int = 5) -> Iterator[socket.socket]:
    """Somebody listens and never answers, as a process does that SIGSTOP has stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        yield listener


@contextmanager
def saying(path: Path, answer: bytes) -> Iterator[None]:
    """Somebody takes one call, says this, whatever was asked, and hangs up."""
    with mute(path) as listener:

        def take() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.recv(65536)
                caller.sendall(answer)

        thread = threading.Thread(target=take)
        thread.start()
        yield
        thread.join(PATIENCE)


def leave_record(base: Path, name: str, qemu: ProcessId, *links: LinkRecord) -> None:
    """What a supervisor that is gone leaves."""
    (base / name).mkdir(parents=True)
    (base / name / "lock").write_text("1\n")
    record.write(base / name / "record.json", Record(qemu, links, qemu))


@contextmanager
def held(base: Path, name: str) -> Iterator[None]:
    """This process supervises a VM."""
    (base / name).mkdir(parents=True, exist_ok=True)
    with (base / name / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


ME = ProcessId(os.getpid(), start_time(os.getpid()))
NOBODY_THERE = ProcessId(os.getpid(), 1)


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "exit_status"),
    [
        (400, UsageError, 2),
        (403, Forbidden, 69),
        (404, Unknown, 69),
        (409, Conflict, 75),
        (412, Conflict, 75),
        (422, UsageError, 2),
        (500, QrapdError, 1),
        (503, Unavailable, 69),
    ],
)
def test_problems_become_errors(code: int, kind: type[QrapdError], exit_status: int) -> None:
    """Each status is the exception, and so the exit status, that the other side had; with its words."""
    error = error_of(code, {"detail": "no way", "hint": "another one", "status": code}, Path("/s"))
    assert (kind, "no way", "another one") == (type(error), error.message, error.hint) or code == 500
    assert kind is type(error)
    assert exit_status == error.exit_status


def test_problems_of_a_file_are_kept_apart() -> None:
    """Each problem with its key and hint, and the file that they are in."""
    wrong = [{"key": "link[0].mac", "reason": "is odd", "value": "'x'", "hint": "02:..."}, {"reason": "no"}]
    error = error_of(422, {"detail": "/vms/a: b.toml: 2 problems", "problems": wrong}, Path("/s"))
    assert isinstance(error, ConfigurationError)
    assert "/vms/a: b.toml" == error.path
    assert ["link[0].mac: is odd (it is 'x')", "no"] == [str(each) for each in error.problems]
    assert ["02:...", None] == [each.hint for each in error.problems]


def test_a_bug_over_there_is_named_by_its_reference() -> None:
    """Whoever has it is told where to look."""
    error = error_of(500, {"detail": "oh", "reference": "abc"}, Path("/s"))
    assert "abc" in str(error.hint)


@pytest.mark.parametrize("what", [None, [], "x", {"detail": None}, {"problems": "none"}, {"problems": [1]}])
def test_errors_without_words(what: Any) -> None:
    """What is no problem document is an error all the same."""
    assert "HTTP status 418" in error_of(418, what, Path("/s")).message


# --- one socket ---------------------------------------------------------------------------------------


async def test_questions_and_answers(place: Path) -> None:
    """What comes back is what was said, with what an older client does not know."""
    with FakeHost(status("web", novelty=1), status("db", "exited")).serve(place / "s") as host:
        async with Client(place / "s") as client:
            assert ["web", "db"] == [vm["name"] for vm in await client.vms()]
            assert 1 == (await client.vm("web"))["novelty"]
            assert "db" == (await client.act("db", "start"))["name"]
            await client.swap("web", 0)
            assert {"tcp": ["8080:80"], "udp": []} == await client.forwards("web", 0)
            assert "pesto" == (await client.change_forwards("web", 0, add=[("tcp", "1:1")]))["by"]
            with pytest.raises(Unknown, match="no such VM"):
                await client.vm("nix")
            with pytest.raises(Conflict):
                await client.act("web", "start")
    assert "POST /v1/vms/db/start" in host.calls


async def cause_of(path: Path) -> str:
    """Why nobody takes the call."""
    async with Client(path, timeout=0.3) as client:
        with pytest.raises(Unreachable) as caught:
            await client.vms()
    assert str(path) in caught.value.message
    return caught.value.cause


async def test_nobody_there(place: Path) -> None:
    """Each way of it has its own words, and none is a traceback."""
    assert "absent" == await cause_of(place / "nowhere")
    with mute(place / "stale"):
        pass
    assert "refused" == await cause_of(place / "stale")
    with mute(place / "mute"):
        assert "silent" == await cause_of(place / "mute")
    with saying(place / "cut", b""):
        assert "broken" == await cause_of(place / "cut")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # anyio forgets that socket
async def test_a_full_backlog_is_not_waited_for_long(place: Path) -> None:
    """A stopped process takes no more calls after some; connect(2) says EAGAIN then, which is no answer either."""
    with mute(place / "full", backlog=0), closing(socket.socket(socket.AF_UNIX)) as first:
        first.connect(str(place / "full"))
        with anyio.fail_after(PATIENCE):
            assert await cause_of(place / "full") in {"silent", "broken"}
        gc.collect()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnope",
    ],
)
async def test_a_stranger(place: Path, answer: bytes) -> None:
    """What is no list of VMs is not taken for one."""
    with saying(place / "s", answer):
        async with Client(place / "s", timeout=PATIENCE) as client:
            with pytest.raises(Unavailable, match="is no qrapd"):
                await client.vms()


async def test_the_served_api(place: Path) -> None:
    """Client and API agree on every path, answer and error."""
    host = PretendedHost("db", "web")
    app = make_app(host, Policy(own_uid=os.geteuid()))
    async with serving(place, app) as server, Client(server.path) as client:
        assert ["db", "web"] == [vm["name"] for vm in await client.vms()]
        for action, state in {
            "start": "ready",
            "restart": "ready",
            "stop": "exited",
            "reload": "exited",
        }.items():
            assert state == (await client.act("web", action))["state"]
        assert "ready" == (await client.act("web", "start"))["state"]
        assert "ready" == (await client.swap("web", 0))["state"]
        assert {"tcp": ["8080:80"], "udp": []} == await client.forwards("web", 0)
        changed = await client.change_forwards("web", 0, add=[("udp", "53:53")], remove=[("tcp", "8080:80")])
        assert {"by": "pesto", "tcp": [], "udp": ["53:53"]} == changed
        with pytest.raises(ConfigurationError) as wrong:
            await client.change_forwards("web", 0, add=[("tcp", "http")])
        assert ("the change", "write 8080:80") == (wrong.value.path, wrong.value.problems[0].hint)
        for question, error in {
            client.vm("nix"): Unknown,
            client.swap("web", 9): Unknown,
            client.act("web", "start"): Conflict,
            client.swap("db", 0): Conflict,
        }.items():
            with pytest.raises(error):
                await question
        assert "failed" == (await client.act("web", "kill"))["state"]
        kept = [event.event async for event in client.events("web", follow=False)]
        assert ["vm.ready", "vm.ready", "vm.exited", "vm.ready", "vm.exited"] == kept
        with anyio.fail_after(PATIENCE):
            async with aclosing(client.events(after="another-1")) as events:
                assert ["events.missed", "vm.ready"] == [(await anext(events)).event for _ in range(2)]


# --- events -------------------------------------------------------------------------------------------

STREAM = (
    b': hello\r\n\r\nid: a-1\nevent: vm.ready\ndata: {"vm": "web",\r\ndata: "error": "a\xe2\x80\xa8b"}\n\n'
    b"data\n\nid: a-2\rdata: [1]\r\rretry: 5\nid: x\0y\ndata:{}\n\nid: lost\ndata: {}\n"
)
TOLD = [
    ServerEvent("a-1", "vm.ready", {"vm": "web", "error": "a\u2028b"}),
    ServerEvent("a-1", "message", {"data": ""}),
    ServerEvent("a-2", "message", {"data": "[1]"}),
    ServerEvent("a-2", "message", {}),
]


@given(st.lists(st.integers(0, len(STREAM))))
def test_events_in_any_pieces(cuts: list[int]) -> None:
    """All line ends, data on several lines, a comment, an id that is none, an end in the middle; cut anywhere."""
    told: list[ServerEvent] = []
    reader, places = EventReader(), sorted({0, len(STREAM), *cuts})
    for start, end in itertools.pairwise(places):
        told += reader.feed(STREAM[start:end])
    assert told == TOLD


async def test_events_that_there_were(place: Path) -> None:
    """All that is kept of one VM, and an end."""
    with FakeHost(status("web")).serve(place / "s") as host:
        for n in range(3):
            host.tell("vm.ready", vm="web" if n != 1 else "db", n=n)
        async with Client(place / "s") as client:
            kept = [event async for event in client.events("web", follow=False)]
    assert [0, 2] == [event.fields["n"] for event in kept]


async def test_events_that_come_slowly(place: Path) -> None:
    """All that are kept, however busy their host is; and silence is none of their end."""
    with FakeHost(status("web")).serve(place / "s") as host:
        host.pause = 0.7
        for n in range(2):
            host.tell("vm.ready", vm="web", n=n)
        async with Client(place / "s") as client:
            assert [0, 1] == [event.fields["n"] async for event in client.events(follow=False)]
        host.pause = PATIENCE
        async with Client(place / "s", timeout=0.3) as client:
            with pytest.raises(Unreachable, match="does not answer"):
                await anext(client.events(follow=False))


def test_data_in_the_moment_in_which_a_wait_ends(
    place: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """They come in the same turn of the loop in which the reader is cancelled: nothing is said of that."""

    async def job() -> None:
        with mute(place / "s") as listener:
            stream = await anyio.connect_unix(place / "s")
            server, _ = listener.accept()
            async with anyio.create_task_group() as tasks:
                with server:
                    tasks.start_soon(stream.receive)
                    await anyio.sleep(0.05)
                    server.sendall(b"x")
                    await asyncio.sleep(0)  # one turn, and no checkpoint of anyio's, which takes another
                    tasks.cancel_scope.cancel()
            await stream.aclose()

    asking.run(job)
    assert ([], "") == (caplog.records, capfd.readouterr().err)


def test_other_errors_of_the_loop_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """What is no such thing is none that may be lost."""

    async def job() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(0.05)

    asking.run(job)
    assert "ZeroDivisionError" in caplog.text


async def test_events_go_on_after_a_lost_connection(place: Path) -> None:
    """Every one of them once, though the server hangs up after each second one."""
    with FakeHost(status("web")).serve(place / "s") as host:
        host.cut_after = 2
        for n in range(5):
            host.tell("vm.ready", vm="web", n=n)
        seen = []
        async with Client(place / "s") as client, aclosing(client.events()) as events:
            with anyio.fail_after(PATIENCE):
                async for event in events:
                    seen.append(event.fields["n"])
                    if len(seen) == 5:
                        break
    assert [0, 1, 2, 3, 4] == seen
    assert 3 <= sum(call.startswith("GET /v1/events") for call in host.calls)


async def test_events_go_on_with_another_process(place: Path) -> None:
    """The host is started anew: what is missed is said, and what there is comes."""
    first = FakeHost(status("web"))
    first.tell("vm.ready", vm="web", n=1)
    second = FakeHost(status("web"))
    second.epoch = "b"
    second.tell("vm.adopted", vm="web", n=2)
    async with Client(place / "s") as client, aclosing(client.events(patience=PATIENCE)) as events:
        with anyio.fail_after(PATIENCE):
            with first.serve(place / "s"):
                assert "vm.ready" == (await anext(events)).event
            with second.serve(place / "s"):
                assert "events.missed" == (await anext(events)).event
                assert 2 == (await anext(events)).fields["n"]


async def test_events_of_a_host_that_is_gone_end(place: Path) -> None:
    """After its patience the client says so."""
    with FakeHost(status("web")).serve(place / "s") as host:
        host.tell("vm.ready", vm="web")
        client = Client(place / "s")
        events = client.events(patience=0.1)
        await anext(events)
    with pytest.raises(Unreachable), anyio.fail_after(PATIENCE):
        await anext(events)
    await client._http.aclose()


async def test_events_that_are_refused(place: Path) -> None:
    """An error is an error, and is not tried again."""
    with FakeHost().serve(place / "s"):
        async with Client(place / "s") as client:
            with pytest.raises(Unavailable, match="may not"):
                await anext(client.events())


# --- all sockets --------------------------------------------------------------------------------------


async def test_a_hung_supervisor_hides_no_other(place: Path) -> None:
    """Two answer, one hangs, one is gone: four VMs, and the wait is that of one."""
    leave_record(place, "lost", ME, LinkRecord(0, "swap", 3, 3, passt=NOBODY_THERE, passt_pid=7))
    with (
        FakeHost(status("a1"), status("a2", "exited")).serve(place / "agent.sock"),
        FakeHost(status("unit", origin="unit")).serve(place / "unit/control.sock"),
        mute(place / "hung/control.sock"),
        held(place, "hung"),
        held(place, "young"),
    ):
        found = await survey(Places(place), timeout=1)
    states = {vm["name"]: (vm["state"], vm["error"]) for vm in found.vms}
    assert {
        "a1": ("ready", None),
        "a2": ("exited", None),
        "hung": ("failed", f"its supervisor (pid {os.getpid()}) does not answer"),
        "lost": ("failed", "its supervisor is gone"),
        "unit": ("ready", None),
        "young": ("starting", f"its supervisor (pid {os.getpid()}) takes no calls yet"),
    } == states
    assert list(states) == sorted(states)
    assert [] == found.problems
    assert place / "unit/control.sock" == found.hosts["unit"]


async def test_a_hung_agent_is_told_of(place: Path) -> None:
    """Its VMs are shown by their directories, and that some may be missing is said."""
    with (
        mute(place / "agent.sock"),
        held(place, "its"),
        FakeHost(status("unit")).serve(place / "unit/control.sock"),
    ):
        found = await survey(Places(place), timeout=0.5)
    assert [("its", "failed"), ("unit", "ready")] == [(vm["name"], vm["state"]) for vm in found.vms]
    assert ["agent.sock does not answer"] == [each.message.rpartition("/")[2] for each in found.problems]


async def test_a_stale_agent_socket_is_no_agent(place: Path) -> None:
    """An agent that was killed leaves its socket; nobody misses VMs for that."""
    with mute(place / "agent.sock"):
        pass
    found = await survey(Places(place), timeout=PATIENCE)
    assert ([], []) == (found.vms, found.problems)
    assert [] == (await survey(Places(place / "nowhere"))).vms


async def test_the_socket_that_was_named_and_no_other(place: Path) -> None:
    """Nothing else is looked at, and without it there is no answer."""
    with (
        FakeHost(status("a")).serve(place / "other.sock"),
        FakeHost(status("b")).serve(place / "b/control.sock"),
    ):
        assert ["a"] == [vm["name"] for vm in (await survey(Places(place, place / "other.sock"))).vms]
    with pytest.raises(Unreachable):
        await survey(Places(place, place / "other.sock"))


async def test_many_supervisors_with_few_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more are asked at once than may be."""
    monkeypatch.setattr(client_survey, "AT_ONCE", 2)
    hosts = [FakeHost(status(f"vm{n}")).serve(place / f"vm{n}/control.sock") for n in range(5)]
    with hosts[0], hosts[1], hosts[2], hosts[3], hosts[4]:
        assert 5 == len((await survey(Places(place))).vms)


def test_closed_to_this_user(place: Path, as_nobody: list[str]) -> None:
    """Another user's VMs are named, and that nothing is known of them."""
    (place / "root").mkdir(mode=0o700)
    ended = subprocess.run(
        [*as_nobody, "qrapd", "ps", "--runtime-dir", str(place)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 69 == ended.returncode, ended.stderr
    assert "closed to this user: root" in ended.stderr


# --- directories --------------------------------------------------------------------------------------


def test_what_a_directory_tells(place: Path) -> None:
    """It has the form of the API's answers, and says no more than can be known."""
    links = (
        LinkRecord(0, "swap", 2, 2, passt=ME, passt_pid=ME.pid),
        LinkRecord(1, "swap", 3, 3, passt=NOBODY_THERE, passt_pid=8),
        LinkRecord(2, "swap", 1, 1, passt_pid=9, swapping=True),
        LinkRecord(3, "native", 1, 1),
    )
    leave_record(place, "left", ME, *links)
    left = look(place, "left")
    assert left is not None
    VmStatus.model_validate(left)
    assert ("failed", "its supervisor is gone", ME.pid) == (left["state"], left["error"], left["qemu_pid"])
    shown = [(each["state"], each["passt_pid"], each["generation"]) for each in left["links"]]
    assert [("up", ME.pid, 2), ("down", None, 3), ("down", None, 1), ("up", None, 1)] == shown


def test_left_with_nothing_that_runs(place: Path) -> None:
    """QEMU is gone, too; and what cannot be read is said to be so."""
    leave_record(place, "dead", NOBODY_THERE, LinkRecord(0, "swap", 2, 2))
    dead = look(place, "dead")
    assert dead is not None
    assert ("its supervisor is gone, and its QEMU is gone, too", None) == (dead["error"], dead["qemu_pid"])
    assert ["ended"] == [each["state"] for each in dead["links"]]
    (place / "dead/record.json").write_text("{}")
    assert "its supervisor is gone, and its record cannot be read" == (look(place, "dead") or {})["error"]
    (place / "empty").mkdir()
    assert None is look(place, "empty")
    assert None is look(place, "nowhere")


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ("agent", "start the agent: `systemctl --user start qrapd-agent`"),
        ("unit", "start its unit: `systemctl --user start qrapd@left`"),
        ("shell", "run its file again: `qrapd run`"),
    ],
)
def test_who_takes_over(
    place: Path, monkeypatch: pytest.MonkeyPatch, origin: Literal["agent", "unit", "shell"], words: str
) -> None:
    """That depends on who has left it; in the system's directory its units are meant."""
    (place / "left").mkdir()
    record.write(place / "left/record.json", Record(ME, (), origin=origin))
    assert words in (look(place, "left") or {})["hint"]
    monkeypatch.setattr(client_places, "SYSTEM", place)
    assert words.replace(" --user", "") in (look(place, "left") or {})["hint"]


@pytest.mark.parametrize(
    ("cgroup", "words", "origin"),
    [
        ("0::/system.slice/system-qrapd.slice/qrapd@web.service", [], "unit"),
        (
            "0::/user.slice/user-0.slice/user@0.service/app.slice/app-qrapd.slice/qrapd@web.service",
            [],
            "unit",
        ),
        ("0::/system.slice/qrapd-agent.service", [], "agent"),
        ("0::/user.slice/session-1.scope", ["/usr/bin/python3", "/usr/bin/qrapd", "agent", ""], "agent"),
        ("", ["python", "-m", "qrapd", "agent", "--socket", "/s"], "agent"),
        ("", ["python", "-m", "qrapd", "run", "agent"], "shell"),
        ("", ["python", "/opt/qrapd/__main__.py", "agent"], "agent"),
        ("0::/user.slice/session-1.scope", ["python", "-m", "qrapd", "run", "x"], "shell"),
        ("", [], "shell"),
    ],
)
def test_origins(cgroup: str, words: list[str], origin: str) -> None:
    """Who runs a VM, by where its process is and what it was started as."""
    assert origin == origin_of(cgroup, words)


@given(st.text(max_size=70) | st.from_regex(config.NAME_PATTERN))
def test_names_are_those_of_files(text: str) -> None:
    """The client takes the names that a VM's file may have, and no path."""
    assert is_name(text) == (re.fullmatch(config.NAME_PATTERN.strip("^$"), text) is not None)


def test_importing_places_takes_no_http() -> None:
    """Completion and signals have no use for it."""
    code = f"import sys, {client_places.__name__}; print('httpx' in sys.modules)"
    assert b"False\n" == subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout


# --- the end of a wait --------------------------------------------------------------------------------

OLD, NEW = {"qemu_pid": 1, "since": "1"}, {"qemu_pid": 2, "since": "9"}
AGO = {"since": (datetime.now(UTC) - timedelta(seconds=60)).isoformat().replace("+00:00", "Z")}
Steps = list[dict[str, Any]]


def vm(state: str, **fields: Any) -> dict[str, Any]:
    """A status at a time of its own."""
    return status("web", state, **fields)


def swapping(*links: dict[str, Any], state: str = "ready") -> Steps:
    """Statuses of a VM whose link goes through these."""
    return [vm(state, links=[each]) for each in links]


CASES: dict[str, tuple[Callable[[Any], Verdict | None], Steps, bool | None]] = {
    "started": (started, [vm("exited"), vm("starting"), vm("ready")], True),
    "started, a link down": (started, [vm("exited"), vm("degraded", links=[link(state="down")])], True),
    "not begun yet": (started, [vm("failed", since="1"), vm("failed", since="1")], None),
    "starting": (started, [vm("failed", since="1"), vm("starting")], None),
    "failed again": (started, [vm("failed", since="1"), vm("failed", since="2")], False),
    "ended at once": (started, [vm("exited", since="1"), vm("exited", since="2")], True),
    "stopped": (stopped, [vm("ready"), vm("stopping"), vm("exited")], True),
    "stopping": (stopped, [vm("ready"), vm("stopping")], None),
    "stopped badly": (stopped, [vm("ready"), vm("failed")], False),
    "left, and stopped": (stopped, [vm("failed", **OLD), vm("starting"), vm("exited")], True),
    "left, and not to be stopped": (
        stopped,
        [vm("failed", **OLD), vm("starting"), vm("failed", **OLD)],
        False,
    ),
    "still there, by its host's own words": (
        stopped,
        [vm("failed", since="1"), vm("starting"), vm("failed", since="2")],
        False,
    ),
    "still there": (stopped, [vm("ready", **OLD), vm("failed", qemu_pid=1)], False),
    "stopped, and started by others": (stopped, [vm("ready", **OLD), vm("ready", **NEW)], True),
    "a stop that is forgotten": (stopped, [vm("ready"), vm("stopping"), vm("degraded", **AGO)], False),
    "a stop that the next one goes on with": (
        stopped,
        [vm("ready"), vm("stopping"), vm("ready", since="9")],
        None,
    ),
    "did not run": (stopped, [vm("failed", since="1"), vm("failed", since="1")], True),
    "restarted": (restarted, [vm("ready", **OLD), vm("exited"), vm("ready", **NEW)], True),
    "the old one still": (restarted, [vm("ready", **OLD), vm("degraded", **{**OLD, "since": "2"})], None),
    "between two": (restarted, [vm("ready", **OLD), vm("exited", since="9")], None),
    "no second one": (restarted, [vm("stopping", **OLD), vm("exited", **AGO)], False),
    "none before, and none yet": (restarted, [vm("exited", **AGO), vm("exited", **AGO)], None),
    "a restart that is forgotten": (
        restarted,
        [vm("ready", **OLD), vm("stopping", **OLD), vm("ready", qemu_pid=1, **AGO)],
        False,
    ),
    "restart failed": (restarted, [vm("ready", **OLD), vm("failed")], False),
    "restarted and ended": (
        restarted,
        [vm("ready", **OLD), vm("starting", qemu_pid=2), vm("exited", since="9")],
        True,
    ),
    "killed": (killed, [vm("ready"), vm("failed")], True),
    "killed, and up again": (killed, [vm("ready", **OLD), vm("ready", **NEW)], True),
    "left, and killed": (killed, [vm("failed", **OLD), vm("starting"), vm("exited")], True),
    "not killed": (killed, [vm("failed", **OLD), vm("starting"), vm("failed", qemu_pid=1)], False),
    "left, and not killed yet": (killed, [vm("failed", **OLD), vm("failed", **OLD)], None),
    "not killed yet": (killed, [vm("ready", **OLD), vm("ready", **OLD)], None),
    "swapped": (lambda h: swapped(h, 0), swapping(link(), link(state="down"), link(generation=2)), True),
    "not swapped yet": (lambda h: swapped(h, 0), swapping(link(), link()), None),
    "swap failed": (lambda h: swapped(h, 0), swapping(link(), link(state="failed")), False),
    "given up before": (lambda h: swapped(h, 0), swapping(link(state="failed"), link(state="failed")), None),
    "given up again": (
        lambda h: swapped(h, 0),
        swapping(link(state="failed"), link(state="down"), link(state="failed")),
        False,
    ),
    "no VM any more": (lambda h: swapped(h, 0), [vm("ready"), vm("exited")], False),
    "started anew": (
        lambda h: swapped(h, 0),
        [vm("ready", links=[link(generation=7)]), vm("ready", links=[link()], qemu_pid=2)],
        False,
    ),
    "no link any more": (lambda h: swapped(h, 1), [vm("ready", links=2), vm("ready")], False),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    """When a wait is over, and how: True well, False badly, None not yet."""
    decide, history, expected = CASES[case]
    verdict = decide(history)
    assert expected is (None if verdict is None else verdict.ok)
    assert verdict is None or verdict.words


@pytest.mark.parametrize(
    ("decide", "history", "words"),
    [
        (killed, [vm("failed", since="1"), vm("starting"), vm("failed", since="2")], "is dead"),
        (killed, [vm("failed", since="1"), vm("failed", since="1")], "does not run"),
        (stopped, [vm("exited"), vm("exited")], "does not run"),
        (stopped, [vm("failed", since="1"), vm("starting"), vm("exited")], "has ended"),
    ],
)
def test_words_of_what_ran(decide: Callable[[Any], Verdict | None], history: Steps, words: str) -> None:
    """Of a VM that its host could not take over nobody says that it does not run."""
    verdict = decide(history)
    assert verdict is not None
    assert (True, words) == (verdict.ok, verdict.words)


@pytest.mark.parametrize(
    "case", ["a stop that is forgotten", "a restart that is forgotten", "no second one", "still there"]
)
def test_what_to_do_about_it(case: str) -> None:
    """The command that helps."""
    decide, history, _ = CASES[case]
    verdict = decide(history)
    assert verdict is not None
    assert re.search(r": qrapd (stop|restart|start|kill) web$", str(verdict.hint))


def test_json_of_a_status_is_that_of_the_interface() -> None:
    """What tests use as a status, and what a directory tells, has the fields of VmStatus."""
    assert set(VmStatus.model_fields) == set(status("web"))
    VmStatus.model_validate(json.loads(json.dumps(status("web"))))
