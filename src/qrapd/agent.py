# SPDX-License-Identifier: GPL-2.0-or-later
"""The host agent: many VMs in one process, each in a task of its own, and one API for all of them.

It ends without its VMs: they run on, and the next agent takes them over. Only while the host itself goes down does it
power them down.
"""

from __future__ import annotations

import grp
import os
import time
import traceback
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGPWR, SIGTERM, SIGUSR2, Signals
from typing import Any, NoReturn

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.abc import TaskGroup

from qrapd import agent_socket, record, vm_files
from qrapd.agent_file import AgentFile
from qrapd.agent_socket import AgentSocket
from qrapd.agent_vm import AgentVm, Shared
from qrapd.api.access import Policy
from qrapd.api.server import serve
from qrapd.autostarted import Autostarted
from qrapd.errors import Conflict, QrapdError, Unavailable, Unknown
from qrapd.event_log import EventLog
from qrapd.garbage import collect_garbage
from qrapd.handover import AGENT_SOCKET, OWN_AGENT_SOCKET, HandedOver
from qrapd.hosting import HostedVm, HostVitals
from qrapd.logs import Emit
from qrapd.runtime_directory import clear_up
from qrapd.signals import Received, receive_signals
from qrapd.supervisor import tell_failure
from qrapd.systemd import Notifier, PrefixedKeeper
from qrapd.vm_status import Origin

__all__ = ["Agent", "AgentOutcome", "run_agent"]

EVENTS = 10_000
"""Kept for followers of the API: a start makes about six."""

PLANS_AT_ONCE = 4
"""VM files that are read at the same time, each in a thread: it is work for a processor, as a rule."""

ADOPTION_TIMEOUT = 60.0
"""Seconds after which the agent is ready, even if a VM has not been taken over yet: its QEMU may hang."""

LAG_INTERVAL = 1.0
"""Seconds between two looks at how late the event loop is."""

OBEYED_IN = 5
"""Rounds of the event loop in which a signal that has come is obeyed: it goes by a pipe, a callback and a task."""

LEAVE_TIMEOUT = 30.0
"""Seconds to wait for VMs that are in the middle of something. What still is, is taken over as after a crash."""

STOP_MARGIN = 15.0
"""Seconds beyond the VMs' own timeouts that a stop may take: a busy host, and the passts' end."""

STATUS_INTERVAL = 1.0
"""Seconds between two words to the service manager, at most."""


@dataclass(frozen=True)
class AgentOutcome:
    """How an agent ended."""

    upgrade: bool = False
    """this process is to become a newer agent"""
    fds: Mapping[str, int] = field(default_factory=dict)
    """for that one, by their names in the fd store"""


async def run_agent(
    directory: Path,
    base: Path,
    emit: Emit,
    *,
    file: AgentFile,
    notifier: Notifier,
    handed: HandedOver,
    abandon: Callable[[AgentOutcome], NoReturn],
    watchdog: float | None = None,
    socket_path: Path | None = None,
) -> AgentOutcome:
    """Run the agent until a signal ends it.

    SIGTERM and SIGINT leave the VMs running, SIGPWR (the host goes down) powers them down first, SIGUSR2 leaves them
    for a newer agent in this very process, SIGHUP reads the files again.

    :param directory: with ``vms/`` and maybe ``agent.toml`` in it.
    :param base: the runtime directory, above the VMs' own.
    :param abandon: ends this program with all that still goes on in it, and without a word to any VM.
    :param watchdog: seconds between two signs of life to the service manager.
    :param socket_path: where the API listens; by default agent.sock in ``base``, or where a socket unit says.
    :raise QrapdError: there is an agent already, a directory cannot be used, or a group of agent.toml is not there.
    """
    collect_garbage()
    _policy(file)  # before anything is begun, as it may not be possible
    with receive_signals(SIGTERM, SIGINT, SIGHUP, SIGUSR2, SIGPWR) as signals, agent_socket.claim(base):

        def abandon_all(outcome: AgentOutcome) -> NoReturn:
            if outcome.upgrade:
                outcome = AgentOutcome(True, {**outcome.fds, **place.hand_over()})
            abandon(outcome)

        place = AgentSocket(
            socket_path or base / "agent.sock", handed.take(AGENT_SOCKET), handed.take(OWN_AGENT_SOCKET)
        )
        agent = Agent(directory, base, emit, notifier=notifier, handed=handed, file=file, abandon=abandon_all)

        def make_app() -> Any:
            from qrapd.api.app import make_app

            return make_app(agent, lambda: agent.policy, report=agent.report)

        async def serve_api() -> None:
            app = await anyio.to_thread.run_sync(make_app)
            await serve(app, place.listener, report=agent.report)

        try:
            outcome = await agent.run(signals, serve_api, watchdog)
            if outcome.upgrade:
                return AgentOutcome(True, {**outcome.fds, **place.hand_over()})
            return outcome
        finally:
            place.close()


def _policy(file: AgentFile) -> Policy:
    """Who may do what.

    :raise Unavailable: there is no such group.
    """

    def number(name: str | None) -> int | None:
        try:
            return None if name is None else grp.getgrnam(name).gr_gid
        except KeyError:
            raise Unavailable(
                f"there is no group {name}, which agent.toml names", hint=f"make it: groupadd {name}"
            ) from None

    return Policy(
        own_uid=os.geteuid(),
        group=number(file.group),
        read_only_group=number(file.read_only_group),
        group_name=file.group,
        read_only_group_name=file.read_only_group,
    )


class Agent:
    """Runs the VMs of a directory. For the API it is the :class:`qrapd.hosting.Host`."""

    origin: Origin = "agent"

    def __init__(
        self,
        directory: Path,
        base: Path,
        emit: Emit,
        *,
        file: AgentFile,
        notifier: Notifier,
        handed: HandedOver,
        abandon: Callable[[AgentOutcome], NoReturn],
    ) -> None:
        self.events = EventLog(EVENTS)
        self.policy = _policy(file)
        self._abandon = abandon
        self._directory = directory
        self._base = base
        self._log = emit
        self._file = file
        self._notifier = notifier
        self._handed = handed
        self._vms: dict[str, AgentVm] = {}
        self._shared: Shared | None = None
        self._end = anyio.Event()
        self._host_ends = anyio.Event()
        self._looked = anyio.Event()
        """set once what was left is being taken over: before that, nobody can see it off"""
        self._files = anyio.Lock()
        """for whoever makes what is known of the files agree with them"""
        self._upgrade = False
        self._began = time.monotonic()
        self._adoption_seconds: float | None = None
        self._lag = 0.0
        self._reloading = anyio.Lock()
        self._autostarted = Autostarted(base / "autostarted.json")

    def _emit(self, event: str, /, **fields: object) -> None:
        self._log(event, **fields)
        self.events.append(event, fields)

    def report(self, where: str, error: BaseException) -> None:
        """Tell of a bug that ends nothing."""
        trace = "".join(traceback.format_exception(error))
        self._emit("bug.found", where=where, error=repr(error), trace=trace)

    # --- what the API is given ------------------------------------------------------------------------

    @property
    def vms(self) -> Mapping[str, HostedVm]:
        return {name: self._vms[name] for name in sorted(self._vms)}

    @property
    def vitals(self) -> HostVitals:
        lag, self._lag = self._lag, 0.0
        return HostVitals(lag, self._adoption_seconds)

    async def look_for(self, name: str) -> None:
        async with self._files:
            path = self._directory / "vms" / f"{name}.toml"
            if await anyio.to_thread.run_sync(path.is_file):
                self._know(path)

    async def put(self, name: str, text: str, *, only_new: bool = False) -> bool:
        async with self._files:
            path = self._directory / "vms" / f"{name}.toml"
            is_new = await anyio.to_thread.run_sync(partial(vm_files.write, path, text, only_new=only_new))
            self._know(path).accept_file()
            return is_new

    async def delete(self, name: str) -> None:
        async with self._files:
            await self._delete(name)

    async def _delete(self, name: str) -> None:
        vm = self._vms.get(name)
        if vm is None:
            raise Unknown(f"there is no VM {name}")
        if vm.runs or vm.was_left:
            raise Conflict(f"{name} runs", hint=f"stop it first: qrapd stop {name}")
        vm.refuse_if_elsewhere()
        await anyio.to_thread.run_sync(vm_files.remove, vm.path)
        if not vm.runs:
            self._vms.pop(name, None)
        self._autostarted.retain(self._vms)

    # --- its life -------------------------------------------------------------------------------------

    async def run(
        self,
        signals: Received,
        serve_api: Callable[[], Awaitable[None]],
        watchdog: float | None = None,
    ) -> AgentOutcome:
        """Run the VMs until a signal says otherwise.

        :param serve_api: serves the API until it is cancelled.
        :param watchdog: seconds between two signs of life to the service manager.
        """
        # The VMs outside: what is beside them is cancelled first, and without them.
        async with anyio.create_task_group() as vms, anyio.create_task_group() as beside:
            self._shared = Shared(
                base=self._base,
                emit=self._emit,
                tasks=vms,
                starting=anyio.CapacityLimiter(self._file.starts_at_once),
                planning=anyio.CapacityLimiter(PLANS_AT_ONCE),
                ending=self._end,
                note_start=lambda name: self._autostarted.add([name]),
                keeper=partial(PrefixedKeeper, self._notifier),
            )
            self._begin(beside, "signals", partial(self._obey, signals, beside))
            self._begin(beside, "looking at the event loop", self._watch_lag)
            self._begin(beside, "the status", self._tell_status)
            if watchdog is not None:
                self._begin(beside, "the watchdog", partial(self._be_alive, watchdog))
            self._begin(beside, "the API", serve_api)
            self._begin(beside, "taking over", self._take_over)
            await self._end.wait()
            outcome = await self._see_off(signals)
            if any(vm.runs for vm in self._vms.values()):
                self._abandon(outcome)
            beside.cancel_scope.cancel()
        return outcome

    def _begin(self, tasks: TaskGroup, name: str, work: Callable[[], Awaitable[None]]) -> None:
        tasks.start_soon(self._contain, name, work)

    async def _contain(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """A bug in what is beside the VMs must not end them."""
        try:
            await work()
        except QrapdError as error:
            tell_failure(self._emit, error, vm=None)
        except Exception as error:
            self.report(name, error)

    async def _obey(self, signals: AsyncIterable[Signals], tasks: TaskGroup) -> None:
        async for number in signals:
            if number == SIGHUP:
                self._begin(tasks, "a reload", self.reload)
                continue
            if number == SIGUSR2 and not await self._could_start():
                continue
            # A stop that comes after an upgrade has begun is meant: there is to be no agent.
            self._upgrade = number == SIGUSR2 and (self._upgrade or not self._end.is_set())
            if number == SIGPWR:
                self._host_ends.set()
            self._end.set()

    async def _be_alive(self, seconds: float) -> None:
        """From the loop that does the work: a thread would go on when that hangs."""
        while True:
            self._notifier.tell(WATCHDOG=1)
            await anyio.sleep(seconds)

    async def _watch_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_INTERVAL
            await anyio.sleep(LAG_INTERVAL)
            self._lag = max(self._lag, time.monotonic() - due)

    async def _tell_status(self) -> None:
        """In words, for `systemctl status`: ``12 VMs: 10 ready, 1 starting, 1 failed``."""
        if not self._notifier.active:
            return
        told = ""
        while True:
            count = len(self._vms)
            states = [vm.status.state for vm in self._vms.values()]
            numbers = [f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))]
            words = f"{count} VMs" + (f": {', '.join(numbers)}" if numbers else "")
            if words != told:
                self._notifier.tell(STATUS=words)
                told = words
            await anyio.sleep(STATUS_INTERVAL)

    # --- coming up, and changes -----------------------------------------------------------------------

    async def _take_over(self) -> None:
        """Adopt what an earlier agent has left, wanted or not, before anything else is started."""
        try:
            async with self._reloading:
                # Before there are VMs that somebody could start: in a thread, it takes their locks.
                await anyio.to_thread.run_sync(clear_up, self._base)
                wanted = await self._scan()
                await self._add_without_file()
                left = [vm for vm in self._vms.values() if vm.was_left and not vm.runs]
                for vm in left:
                    vm.begin(self._handed.of(vm.name), only_left=True)
                self._handed.close()
        finally:
            self._looked.set()
        with anyio.move_on_after(ADOPTION_TIMEOUT):
            for vm in left:
                await vm.settled.wait()
        if left:
            self._adoption_seconds = time.monotonic() - self._began
        self._emit("agent.ready", vms=len(self._vms), adopted=sum(vm.runs for vm in left))
        self._notifier.tell(READY=1)
        self._start(wanted)

    async def _add_without_file(self) -> None:
        """What an earlier agent has left running is this one's, too, where its file is gone: it is nobody else's."""
        for name in await anyio.to_thread.run_sync(record.of_agents, self._base):
            self._know(self._directory / "vms" / f"{name}.toml")

    def _start(self, names: Iterable[str]) -> list[str]:
        if self._end.is_set():
            return []
        # A file may have been removed since it was looked for.
        there = [name for name in names if name in self._vms and name not in self._autostarted]
        new = [name for name in there if self._vms[name].is_new]
        for name in new:
            self._vms[name].begin(HandedOver())
        return new

    def _know(self, path: Path) -> AgentVm:
        """The VM of a file."""
        assert self._shared is not None
        if path.stem not in self._vms:
            self._vms[path.stem] = AgentVm(path, self._shared)
        return self._vms[path.stem]

    async def _scan(self) -> list[str]:
        """See which files there are; returns the names of those that the agent is to run."""
        async with self._files:
            return await self._scan_files()

    async def _scan_files(self) -> list[str]:
        found = await anyio.to_thread.run_sync(vm_files.survey, self._directory / "vms")
        for name in [
            name
            for name, vm in self._vms.items()
            if not (name in found or vm.runs or vm.was_left or vm.path.exists())
        ]:
            del self._vms[name]
        for each in found.values():
            vm = self._know(each.path)
            if each.error is None:
                vm.accept_file()
            elif not vm.runs:
                vm.refuse(each.error)
        self._autostarted.retain(self._vms)
        return [name for name, each in found.items() if each.autostart]

    async def reload(self) -> None:
        """Read all files again and touch only what they change. What was stopped stays so."""
        self._notifier.tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
        try:
            async with self._reloading:
                await self._contain("reading agent.toml", self._reload_own_file)
                wanted = await self._scan()
                changed: list[str] = []
                async with anyio.create_task_group() as tasks:
                    for vm in self._vms.values():
                        if vm.runs:
                            tasks.start_soon(self._refresh, vm, changed)
                started = self._start(wanted)
                self._emit("agent.reloaded", vms=len(self._vms), changed=sorted(changed), started=started)
        finally:  # the service manager waits for it
            self._notifier.tell(READY=1)

    async def _could_start(self) -> bool:
        """Whether the next agent gets by what this one would end for: after an upgrade nobody would go back."""
        try:
            _policy(await anyio.to_thread.run_sync(vm_files.read_agent_file, self._directory))
        except QrapdError as error:
            tell_failure(self._emit, error, vm=None)
            return False
        return True

    async def _reload_own_file(self) -> None:
        file = await anyio.to_thread.run_sync(vm_files.read_agent_file, self._directory)
        self.policy = await anyio.to_thread.run_sync(_policy, file)
        self._file = file
        assert self._shared is not None
        self._shared.starting.total_tokens = self._file.starts_at_once

    async def _refresh(self, vm: AgentVm, changed: list[str]) -> None:
        try:
            if await vm.refresh():
                changed.append(vm.name)
        except QrapdError as error:
            vm.refuse(error)
        except Exception as error:  # it must not keep the others from being read again
            self.report(f"a reload of {vm.name}", error)

    # --- the end --------------------------------------------------------------------------------------

    async def _see_off(self, signals: Received) -> AgentOutcome:
        """Leave the VMs for the next agent; or stop them, where the host goes down."""
        with anyio.move_on_after(LEAVE_TIMEOUT):
            await self._looked.wait()
        running = [vm for vm in self._vms.values() if vm.runs]
        to_stop = max((vm.stop_seconds for vm in running), default=0.0) + STOP_MARGIN
        if not self._host_ends.is_set():
            await self._leave(running)
        if self._upgrade:
            signals.hold()  # who wants something from now on wants it from the next agent
            for _ in range(OBEYED_IN):
                await anyio.lowlevel.checkpoint()
        if self._host_ends.is_set():  # which it may have come to meanwhile
            await self._power_down(running, to_stop)
        fds = {f"{vm.name}.{name}": fd for vm in running for name, fd in vm.left.items()}
        return AgentOutcome(self._upgrade, fds)

    async def _leave(self, running: Sequence[AgentVm]) -> None:
        self._tell_end("leave", running, LEAVE_TIMEOUT)

        async def wait_for_hosts_end() -> None:
            await self._host_ends.wait()
            waiting.cancel_scope.cancel()

        with anyio.move_on_after(LEAVE_TIMEOUT):
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(wait_for_hosts_end)
                async with anyio.create_task_group() as tasks:
                    for vm in running:
                        self._begin(tasks, "leaving a VM", vm.leave)
                waiting.cancel_scope.cancel()

    async def _power_down(self, running: Sequence[AgentVm], seconds: float) -> None:
        self._tell_end("power-down", running, seconds)
        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as tasks:
                for vm in running:
                    self._begin(tasks, "powering a VM down", vm.power_down)
        self._autostarted.clear()

    def _tell_end(self, how: str, running: Sequence[AgentVm], seconds: float) -> None:
        self._emit("agent.stopping", how=how, vms=len(running))
        if not self._upgrade:  # systemd would wait for this process to end, and then kill it
            usec = round((seconds + STOP_MARGIN) * 1_000_000)
            self._notifier.tell(STOPPING=1, EXTEND_TIMEOUT_USEC=usec)
