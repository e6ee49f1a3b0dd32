# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of ``qrapd``: arguments in, words and an exit status out; the work is done below.

Imports stand in the commands that need them, because every start of a VM pays for what is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrapd import __version__
from qrapd.errors import ConfigurationError, ExitStatus, QrapdError, Unavailable

if TYPE_CHECKING:
    from qrapd.doctor import Finding
    from qrapd.logs import LogFormat, Logs
    from qrapd.plan import Plan
    from qrapd.probe import Candidate
    from qrapd.vm import Outcome

__all__ = ["run_command_line"]


def run_command_line() -> int:
    """Parse the arguments, run the command, and put every error in words. Returns the exit status."""
    try:
        status = int(main.main(prog_name="qrapd", standalone_mode=False) or ExitStatus.OK)
        sys.stdout.flush()
        return status
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except QrapdError as error:
        _complain(error)
        return error.exit_status
    except (KeyboardInterrupt, click.Abort):
        return ExitStatus.FAILED
    except Exception as error:
        cause = _root_cause(error)
        if isinstance(cause, OSError):
            return _tell_of_host(cause)
        _report_bug()
        return ExitStatus.BUG


def _root_cause(error: BaseException) -> BaseException:
    """What really happened, where it comes wrapped by the tasks that it passed through."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _tell_of_host(error: OSError) -> int:
    """The host refused something that no caller expects it to: no bug of ours, and none that a traceback explains."""
    with contextlib.suppress(OSError):
        # What could not be written is not tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return ExitStatus.OK  # the reader of our output, such as `head`, has seen enough
    where = f": {error.filename}" if error.filename else ""
    hint = "raise the limit with: ulimit -n 1024" if error.errno == errno.EMFILE else None
    _complain(Unavailable(f"{error.strerror or error}{where}", hint=hint))
    return ExitStatus.UNAVAILABLE


# --- options ------------------------------------------------------------------------------------------


def _common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command takes, whether it has a use for them or not."""
    for option in (
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="info",
            show_default=True,
            help="The least important events to tell.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["auto", "journal", "json", "console"]),
            default="auto",
            help="How events are told on stderr.  [default: what stderr is connected to]",
        ),
        click.option(
            "--runtime-dir",
            type=click.Path(path_type=Path, file_okay=False),
            help="Where running VMs keep their sockets.  "
            "[default: $RUNTIME_DIRECTORY, /run/qrapd, or $XDG_RUNTIME_DIR/qrapd]",
        ),
    ):
        command = option(command)
    return command


_allow_uid_option = click.option(
    "--allow-uid",
    type=click.IntRange(0, 2**32 - 2),
    multiple=True,
    metavar="UID",
    help="Trust this user's sockets, too, beside those of oneself, root and passt. May be repeated.",
)


def _check_pattern(_context: click.Context, _option: click.Parameter, pattern: str) -> str:
    if not pattern:
        raise click.BadParameter("is empty; write a path, with {n} for the sockets' numbers")
    return pattern


_pattern_option = click.option(
    "--pattern",
    callback=_check_pattern,
    default="/tmp/passt_{n}.socket",  # noqa: S108 (passt's own names)
    show_default=True,
    help="The sockets' paths, with {n} for the numbers 1 to 99.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qrapd", message="%(prog)s %(version)s")
def main() -> None:
    """Run QEMU virtual machines networked by passt, and keep that network alive.

    \b
    New here?     qrapd demo
    Your own VM:  write web.toml, then  qrapd check web.toml  and  qrapd run web.toml
    """


# --- commands -----------------------------------------------------------------------------------------


@main.command()
@click.argument("file", metavar="FILE|NAME")
@_common_options
def run(file: str, runtime_dir: Path | None, log_format: LogFormat, log_level: str) -> int:
    """Supervise one VM in the foreground until it ends.

    SIGTERM, or Ctrl-C, asks the guest to power down; a second one takes the next, rougher step.
    """
    return _run(lambda: _plan(file), runtime_dir, log_format, log_level, from_file=True)


@main.command()
@click.argument("file", metavar="FILE|NAME")
@_common_options
def reload(file: str, runtime_dir: Path | None, **_: object) -> None:
    """Have a running VM's supervisor read its file again, and apply what it can.

    Changed options of passt, or an upgraded passt, get the link another passt under the running guest. What needs a
    restart of the VM is named in its log. A file with errors in it is refused here, and changes nothing.
    """
    import signal

    from qrapd import running

    name = _plan(file).name
    supervisor = running.find_supervisor(_base(runtime_dir), name)
    running.tell(supervisor, signal.SIGHUP)
    click.echo(
        f"{name}: its supervisor (pid {supervisor.pid}) reads the file again; its log says what changes"
    )


@main.command()
@click.argument("file", metavar="FILE|NAME")
@_common_options
def upgrade(file: str, runtime_dir: Path | None, **_: object) -> None:
    """Have a running VM's supervisor replaced by the installed qrapd, in the same process.

    The VM runs on, and its network, too.
    """
    import signal

    from qrapd import running

    name = _plan(file).name
    supervisor = running.find_supervisor(_base(runtime_dir), name)
    running.tell(supervisor, signal.SIGUSR2)
    click.echo(
        f"{name}: its supervisor (pid {supervisor.pid}) becomes qrapd {__version__}; its log says vm.adopted"
    )


@main.command()
@click.argument("file", metavar="FILE|NAME")
@_common_options
def stop(file: str, runtime_dir: Path | None, log_format: LogFormat, log_level: str) -> int:
    """Power a VM down, and wait for its end: also one whose supervisor is gone.

    Ends with 0 if nothing of it runs any more, or never did.
    """
    import signal

    from qrapd import running

    made, base = _plan(file), _base(runtime_dir)
    try:
        supervisor = running.find_supervisor(base, made.name)
    except Unavailable:
        return _stop_left(made, base, log_format, log_level)
    running.tell(supervisor, signal.SIGTERM)
    running.wait_for_end(supervisor)
    return ExitStatus.OK


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("options", metavar="[JOURNALCTL_OPTION]...", nargs=-1, type=click.UNPROCESSED)
def logs(name: str, options: tuple[str, ...]) -> None:
    """Show a VM's log from the journal: qrapd's, passt's, QEMU's and the guest's lines. -f follows it."""
    from qrapd.binaries import find_binary

    # The unit's own lines, too: what systemd says of it has no field of ours.
    command = [find_binary("journalctl"), *options, f"QRAPD_VM={name}", "+", f"UNIT=qrapd@{name}.service"]
    os.execv(command[0], command)  # noqa: S606 (no shell, as always)


@main.command()
@click.argument("files", metavar="FILE|NAME...", nargs=-1, required=True)
@_common_options
def check(files: tuple[str, ...], **_: object) -> int:
    """Check VM files and print every error in them; start nothing."""
    worst: int = ExitStatus.OK
    for file in files:
        try:
            plan = _plan(file)
        except QrapdError as error:
            _complain(error)
            worst = worst or error.exit_status
        else:
            click.echo(f"{file}: fine ({_summary(plan)})")
    return worst


@main.command()
@click.argument("file", metavar="FILE|NAME")
@_json_option
@_common_options
def plan(file: str, as_json: bool, **_: object) -> None:
    """Print the passt and QEMU command lines that `run` would use.

    Words in capitals, like LINK0_FD, stand for file descriptors that qrapd makes and hands over.
    """
    from qrapd.passt import command_line
    from qrapd.qemu_arguments import Endpoints

    made = _plan(file)
    passts = [
        command_line(link.passt, f"LINK{link.index}_PASST_FD")
        if link.passt and link.mode != "native"
        else None
        for link in made.links
    ]
    qemu = made.command_line(Endpoints.placeholders(len(made.links)))
    if as_json:
        links = [
            {"index": link.index, "mode": link.mode, "mac": link.mac, "source": link.source, "passt": argv}
            for link, argv in zip(made.links, passts, strict=True)
        ]
        click.echo(
            json.dumps({"name": made.name, "directory": str(made.directory), "links": links, "qemu": qemu})
        )
        return
    for link, argv in zip(made.links, passts, strict=True):
        if link.mode == "native":
            click.echo(f"# link {link.index}: QEMU starts its passt itself\n")
        elif argv is None:
            click.echo(f"# link {link.index}: a passt that is there already ({link.source})\n")
        else:
            click.echo(f"# link {link.index}, in {made.passt_directory}\n{_wrapped(argv)}\n")
    click.echo(f"# QEMU, in {made.directory}\n{_wrapped(qemu)}")


@main.command()
@_common_options
def schema(**_: object) -> None:
    """Print the JSON Schema of a VM's file, for editors."""
    from qrapd.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@main.command()
@_json_option
@_common_options
def doctor(as_json: bool, runtime_dir: Path | None, **_: object) -> int:
    """Say what this host lacks, and the command that supplies it."""
    from qrapd.doctor import examine, worst

    findings = examine(_base(runtime_dir))
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _show_findings(findings)
    return ExitStatus.UNAVAILABLE if worst(findings) == "problem" else ExitStatus.OK


@main.command()
@click.option("--stay", is_flag=True, help="Leave the guest running until Ctrl-C, and tell how to reach it.")
@click.option("--port", type=click.IntRange(1024, 65535), help="Host port to forward.  [default: a free one]")
@_common_options
def demo(
    stay: bool, port: int | None, runtime_dir: Path | None, log_format: LogFormat, log_level: str
) -> int:
    """Build a tiny guest, run it, fetch a page from it, kill its passt, fetch the page again, and stop it."""
    from qrapd.demo import show

    return show(stay=stay, port=port, base=runtime_dir, log_format=log_format, log_level=log_level)


@main.command()
@_pattern_option
@click.option("--all", "ask_all", is_flag=True, help="Ask those, too, that a question may end (--one-off).")
@_allow_uid_option
@_json_option
@_common_options
def probe(pattern: str, ask_all: bool, allow_uid: tuple[int, ...], as_json: bool, **_: object) -> int:
    """Say what each passt socket is: who listens, and whether it answers.

    A passt that would end once its client leaves is only looked at, and so is one that has a client. Ends with 0 if
    at least one could serve a VM, else with 69.
    """
    import anyio

    from qrapd import probe as probing

    found = anyio.run(
        lambda: probing.look(
            probing.default_paths(pattern), allowed_uids=frozenset(allow_uid), ask_all=ask_all
        )
    )
    usable = {probing.State.ANSWERING, probing.State.FREE}
    if as_json:
        click.echo(json.dumps([_candidate_as_json(each) for each in found], indent=2))
    else:
        _show_candidates([each for each in found if each.state is not probing.State.ABSENT], pattern)
    return ExitStatus.OK if any(each.state in usable for each in found) else ExitStatus.UNAVAILABLE


@main.command(
    context_settings={
        # What is not ours is QEMU's, and QEMU has options such as -hda: no short ones of our own.
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["--help"],
    }
)
@click.option(
    "--powerdown-timeout",
    type=click.FloatRange(0),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="For the guest to power down when the VM is stopped; then QEMU is told to quit.",
)
@_pattern_option
@_allow_uid_option
@_common_options
@click.argument("arguments", metavar="[FDNUM QEMU_CMD] [QEMU_ARG]...", nargs=-1, type=click.UNPROCESSED)
def wrap(
    arguments: tuple[str, ...],
    powerdown_timeout: float,
    pattern: str,
    allow_uid: tuple[int, ...],
    runtime_dir: Path | None,
    log_format: LogFormat,
    log_level: str,
) -> int:
    """Run a qrap command line, but supervised: find a passt, hold its stream, stop in order, tell what happens.

    Options of qrapd come first; what follows is as for qrap(1):

    \b
    qrapd wrap 5 qemu-system-x86_64 -m 1G -netdev socket,fd=5,id=n0 -device virtio-net-pci,netdev=n0
    """

    def make_plan() -> Plan:
        from qrapd.wrap import plan_wrap

        return plan_wrap(
            arguments,
            os.environ,
            pattern=pattern,
            allowed_uids=frozenset(allow_uid),
            powerdown_timeout=powerdown_timeout,
            quit_timeout=5,
        )

    return _run(make_plan, runtime_dir, log_format, log_level)


# --- what the commands share --------------------------------------------------------------------------


def _plan(file: str) -> Plan:
    from qrapd import plan, vm_files

    vms = vm_files.directory(os.environ, os.geteuid())
    return plan.resolve(vm_files.read(vm_files.find(file, vms)))


def _run(
    make_plan: Callable[[], Plan],
    runtime_dir: Path | None,
    log_format: LogFormat,
    log_level: str,
    *,
    from_file: bool = False,
) -> int:
    from qrapd.handover import become_successor
    from qrapd.logs import JOURNAL_SOCKET, Logs

    environment = dict(os.environ)  # as it was given to us, for whoever takes our place
    if log_format == "journal" and not JOURNAL_SOCKET.is_socket():
        raise Unavailable(
            f"there is no journal to write to: no socket {JOURNAL_SOCKET}",
            hint="leave --log-format out, or choose json or console",
        )
    with Logs(log_format, log_level) as logs:
        try:
            outcome = _supervise(make_plan(), _base(runtime_dir), logs, make_plan if from_file else None)
        except QrapdError as error:
            return _tell(error, logs)
    if outcome.stood_back:
        become_successor(outcome.streams, environment)
    return ExitStatus.OK


def _base(runtime_dir: Path | None) -> Path:
    from qrapd.runtime_directory import default_base

    return runtime_dir or default_base(os.environ, os.geteuid())


def _supervise(plan: Plan, base: Path, logs: Logs, reread: Callable[[], Plan] | None) -> Outcome:
    import anyio

    from qrapd.handover import take_streams
    from qrapd.supervisor import supervise
    from qrapd.systemd import Notifier, watchdog_interval

    return anyio.run(
        partial(
            supervise,
            plan,
            base,
            logs.emit,
            reread=reread,
            # What is for qrapd alone is taken out of the environment: QEMU and passt have no business with it.
            streams=take_streams(os.environ),
            watchdog=watchdog_interval(os.environ, os.getpid()),
            notifier=Notifier.from_environment(os.environ),
        )
    )


def _stop_left(made: Plan, base: Path, log_format: LogFormat, log_level: str) -> int:
    """Take over what a supervisor has left, just to stop it."""
    import anyio

    from qrapd.logs import Logs
    from qrapd.supervisor import supervise
    from qrapd.vm import Vm

    async def stop_it(vm: Vm) -> None:
        vm.stop()

    with Logs(log_format, log_level) as logs:
        anyio.run(partial(supervise, made, base, logs.emit, companion=stop_it, only_left=True))
    return ExitStatus.OK


def _summary(plan: Plan) -> str:
    links = len(plan.links)
    network = "no network" if links == 0 else "1 link" if links == 1 else f"{links} links"
    return f"{plan.name}: {Path(plan.qemu).name}, {'KVM' if plan.kvm else 'no KVM'}, {network}"


def _wrapped(argv: list[str]) -> str:
    """A command line to read and to paste: an option and its value on each line."""
    lines: list[str] = []
    for argument in argv:
        if argument.startswith("-") or len(lines) <= 1:
            lines.append(shlex.quote(argument))
        else:
            lines[-1] += " " + shlex.quote(argument)
    return " \\\n  ".join(lines)


def _show_findings(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        words = Text(finding.found)
        if finding.remedy:
            words.append(f"\n→ {finding.remedy}", style="bold")
        table.add_row(Text(finding.status, colours[finding.status]), Text(finding.subject), words)
    Console().print(table)


def _candidate_as_json(candidate: Candidate) -> dict[str, object]:
    return {
        "path": candidate.path,
        "state": candidate.state.value,
        "latency_ms": None if candidate.latency is None else round(candidate.latency * 1000, 3),
        "pid": candidate.pid,
        "uid": candidate.uid,
        "one_off": candidate.one_off,
        "detail": candidate.detail,
    }


def _show_candidates(found: list[Candidate], pattern: str) -> None:
    from rich.console import Console
    from rich.table import Table

    if not found:
        click.echo(f"no sockets {pattern.replace('{n}', '*')}")
        return
    table = Table("socket", "state", "answered in", "pid", "user", "remark", box=None, pad_edge=False)
    for each in found:
        latency = "" if each.latency is None else f"{each.latency * 1000:.1f} ms"
        numbers = ("" if number is None else str(number) for number in (each.pid, each.uid))
        table.add_row(each.path, each.state.value, latency, *numbers, each.detail)
    console = Console()
    # Whoever searches the lines of a pipe wants them whole.
    console.print(table, width=None if console.is_terminal else 1000)


# --- errors -------------------------------------------------------------------------------------------


def _tell(error: QrapdError, logs: Logs) -> int:
    """An error of a supervised VM: in words on a terminal, as an event where events go."""
    if logs.format == "console":
        _complain(error)
    elif isinstance(error, ConfigurationError):
        for problem in error.problems:
            hint = {"hint": problem.hint} if problem.hint else {}
            logs.emit("config.invalid", file=error.path, problem=str(problem), **hint)
    else:
        hint = {"hint": error.hint} if error.hint else {}
        logs.emit("run.failed", error=error.message, **hint)
    return error.exit_status


def _complain(error: QrapdError) -> None:
    if isinstance(error, ConfigurationError):
        for problem in error.problems:
            click.echo(f"{error.path}: {problem}", err=True)
            if problem.hint:
                click.echo(f"  hint: {problem.hint}", err=True)
        return
    click.echo(f"qrapd: {error.message}", err=True)
    if error.hint:
        click.echo(f"  hint: {error.hint}", err=True)


def _report_bug() -> None:
    import traceback

    traceback.print_exc()
    click.echo(
        f"qrapd {__version__}: this is a bug in qrapd. Please report it with the lines above.", err=True
    )
