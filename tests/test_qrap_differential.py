# SPDX-License-Identifier: GPL-2.0-or-later
"""qrap beside the C program of passt: what each hands to QEMU, recorded at the moment of its exec.

What may differ is listed in docs/qrap.md, and is taken out of the comparison where the reason is given; nothing else.
"""

from __future__ import annotations

import itertools
import platform
import re
import signal
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qrap_arena import TREE, Arena, Record, Request
from qrapd.qrap_arguments import Explicit, NoFreeAddress, read_command_line

PROJECT = Path(__file__).resolve().parent.parent
OURS = [sys.executable, "-P", "-m", "qrapd.qrap"]
C_PROGRAM = Path("/usr/bin/qrap")

BIN = f"{TREE}/bin"
FILES = {"bin/kvm": "program", "bin/qemu": "program", "bin/plain": "plain"}
EXECUTABLE = {f"{BIN}/{name}" for name in ("kvm", "qemu", "", ".", "../bin/kvm")}

# The fixtures hold nothing that one example could leave to the next.
QRAP = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    """Where qraps run."""
    place = Arena()
    try:
        place.run(Request(["/bin/true"]))
    except OSError as error:
        pytest.skip(f"no arena can be had here (namespaces, ptrace): {error}")
    try:
        yield place
    finally:
        place.close()


@pytest.fixture
def c_program(request: pytest.FixtureRequest) -> list[str]:
    """The C program's command line, where the distribution has it."""
    if C_PROGRAM.is_file() and C_PROGRAM.read_bytes()[:4] == b"\x7fELF":
        return [str(C_PROGRAM)]
    release = platform.freedesktop_os_release()
    if (release["ID"], release.get("VERSION_ID")) not in {("debian", "12"), ("debian", "13")}:
        request.node.add_marker(pytest.mark.may_skip(reason="only Debian 12 and 13 have the C program"))
    pytest.skip(f"{C_PROGRAM}, passt's C program, is not here (on Debian 12 and 13: apt install passt)")


# ---- command lines

NUMBERS = st.one_of(
    st.integers(0, 40).map(str),
    st.integers(0, 40).map("{:x}".format),
    st.sampled_from(["", "-1", "-30", "0x3", "0X1f", "+5", " 6", "00", "x", "64", "100", "7fffffff", "4294967299"]),
    st.sampled_from(["9" * 20, "-" + "9" * 20, "9223372036854775807", "0b11", "1e1"]),
)  # fmt: skip
FORMS = [
    "virtio-blk-pci,bus=pci.{},addr=0x0",
    "virtio-blk-pci,bus=pci.0,addr=0x{},drive=d",
    "virtio-blk-ccw,devno=fe.0.{}",
    '{{"driver":"virtio-blk-pci","bus":"pci.{}","addr":"0x0"}}',
    '{{"driver":"virtio-blk-pci","bus":"pci.0","addr":"0x{}"}}',
    '{{"driver":"virtio-blk-ccw","devno":"fe.0.{}"}}',
    "a,bus=pci.{0},x=bus=pci.4,bus=pci.{0}",
]
NETWORK = ["virtio-net-pci", "virtio-net-ccw", "e1000", "e1000e", "rtl8139", "virtio-net"]
DEVICES = st.one_of(
    st.builds(str.format, st.sampled_from(FORMS), NUMBERS),
    st.builds(
        "{}{}".format, st.sampled_from(NETWORK), st.sampled_from(["", ",", ",netdev=n,bus=pci.3", "x,"])
    ),
    st.builds(
        '{{"driver":"{}"{}'.format, st.sampled_from(NETWORK), st.sampled_from(["}", ",", ',"bus":"pci.3"}'])
    ),
)
MACHINES = st.sampled_from(
    ["pc", "q35", "pc-q35-7.2,accel=kvm", "pc-q35", "pc-i440fx-7.2", "pc-", "s390-ccw-virtio", "s390", "none", "",
     "type=pc-q35"]
)  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(["-device", "-netdev", "-net", "-machine", "-nic", "--device", "-M", "", "5", "-"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4),
    st.binary(max_size=4).map(lambda word: word.replace(b"\0", b"").decode(errors="surrogateescape")),
)
GROUPS = st.one_of(
    DEVICES.map(lambda value: ["-device", value]),
    MACHINES.map(lambda value: ["-machine", value]),
    WORDS.map(lambda word: [word]),
    st.sampled_from([["-netdev", "user,id=n"], ["-net", "nic"], ["-net", "socket,fd=5"], ["-m", "1G"]]),
)


def _crowd(machine: str, form: str, end: int) -> list[str]:
    """A machine whose addresses below ``end`` are all taken."""
    numbers = itertools.chain.from_iterable(("-device", form.format(n)) for n in range(1, end))
    return ["-machine", machine, *numbers]


CROWDS = st.one_of(
    st.builds(_crowd, st.just("q35"), st.just("v,bus=pci.{:d},addr=0x0"), st.integers(27, 33)),
    st.builds(_crowd, st.just("pc-"), st.just('{{"bus":"pci.0","addr":"0x{:x}"}}'), st.integers(27, 33)),
    st.builds(_crowd, st.just("s390-ccw"), st.just("v,devno=fe.0.{:x}"), st.integers(14, 18)),
)
FDNUMS = st.one_of(
    st.integers(-1, 20).map(str),
    st.sampled_from(["0x10", "010", " 7", "\t+9", "5abc", "", "abc", "08", "0x", "0xg", "- 5", "\n\v8", "+", "-0"]),
    st.sampled_from(["2147483647", "2147483646", "4294967301", "9" * 20, "-" + "9" * 20, "1023", "1024"]),
)  # fmt: skip
COMMANDS = st.sampled_from(
    ["kvm", "qemu", "nothing", f"{BIN}/kvm", "../bin/kvm", "", ".", "plain", "-machine"]
)
PATHS = st.sampled_from(
    [
        BIN,
        f"/nowhere:{BIN}",
        f"::{BIN}:",
        f"{BIN}:/dev/null",
        f"/dev/null:{BIN}",
        "/" + "x" * 5000 + f":{BIN}",
    ]
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """qrap's arguments: of all kinds, in any order, any number of times."""
    head = [draw(FDNUMS), draw(COMMANDS)] if draw(st.booleans()) else []
    crowd = draw(CROWDS) if draw(st.integers(0, 9)) == 0 else []
    return [*head, *crowd, *itertools.chain.from_iterable(draw(st.lists(GROUPS, max_size=8)))]


def lowest_free(inherited: Sequence[int], closed: Sequence[int] = ()) -> int:
    """The number that the next file gets in a process with these descriptors."""
    taken = {0, 1, 2, *inherited} - set(closed)
    return next(number for number in itertools.count() if number not in taken)


# ---- the decisions


@settings(QRAP, max_examples=2500)
@given(command_lines(), PATHS)
@example([], BIN)
@example(["5"], BIN)
@example(["5", "nothing", "-device", "v,bus=pci.3,addr=0x0"], BIN)
def test_decisions(c_program: list[str], arena: Arena, arguments: list[str], path: str) -> None:
    """The pure part wants of QEMU just what the C program hands to it."""
    record = arena.run(Request([*c_program, *arguments], [("PATH", path)], FILES))
    try:
        wanted = read_command_line(arguments, path, lambda each: each in EXECUTABLE)
    except NoFreeAddress:
        assert (1, True) == (record.status, "Couldn't find free address for device" in record.stderr)
        return
    if isinstance(wanted, Explicit):
        if record.status is not None:  # no such number, or found as a file and not as a program
            assert re.search(r"^(dup|execvp): ", record.stderr, re.MULTILINE)
            return
        argv = wanted.argv
    else:
        assert record.status is None or "execvp: Not a directory" in record.stderr, record
        argv = ["kvm", *wanted.arguments]
    if record.status is None:
        assert argv == record.argv
        streams = [number for number, what in record.files.items() if what.startswith("stream")]
        assert ([] if wanted.fd == 3 else [str(wanted.fd)]) == streams


# ---- the programs


def told(stderr: str) -> list[str]:
    """The lines that a script could look for. Of the search for a passt each program has its own to tell."""
    lines = ("Connected to ", "dup: ", "execvp: ", "Couldn't find ")
    return [line for line in stderr.splitlines() if line.startswith(lines)]


def compare(arena: Arena, c_program: list[str], request: Request) -> Record:
    """Run both; returns the record of ours.

    One thing is left out: the C program loses a stream that has the right number from the beginning, as it closes it
    after dup2. Ours does not.
    """
    assert request.program[0] == "qrap"
    theirs = arena.run(replace(request, program=[*c_program, *request.program[1:]]))
    ours = arena.run(replace(request, program=[*OURS, *request.program[1:]]))
    files = dict(ours.files)
    own = str(lowest_free(request.inherited, request.closed))
    if own not in theirs.files and files.get(own, "").startswith("stream"):
        del files[own]
    assert theirs.status == ours.status, (theirs, ours)
    assert theirs.argv == ours.argv
    assert theirs.executable == ours.executable
    assert theirs.environment == ours.environment
    assert theirs.files == files
    assert theirs.signals == ours.signals
    assert told(theirs.stderr) == told(ours.stderr)
    assert ("Usage: " in theirs.stderr) == ("Usage: " in ours.stderr)
    return ours


NAMES = st.sampled_from(["LC_CTYPE", "LC_ALL", "LANG", "HOME", "LC_MESSAGES", "X", "PATH", "PWD", "_"])
VALUES = st.sampled_from(["", "C", "POSIX", "C.UTF-8", "de_DE.ISO-8859-1", "\udcff=", "a=b", "x" * 3000])
# Those that Python itself changes have tests of their own; the rest neither program may touch.
SIGNALS = sorted(
    signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGALRM}
)
TREES = st.fixed_dictionaries(
    {},
    optional={
        f"{place}/{name}": st.sampled_from(["program", "program", "script", "plain", "directory", "loop"])
        for place in ("bin", "other")
        for name in ("kvm", "qemu-kvm", f"qemu-system-{platform.machine()}")
    }
    | {"/usr/libexec/qemu-kvm": st.sampled_from(["program", "plain"])},
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A command line, and what its caller leaves to it."""
    environment = draw(st.lists(st.tuples(NAMES, VALUES), max_size=4, unique_by=lambda pair: pair[0]))
    path = draw(st.sampled_from([BIN, f"{TREE}/other:{BIN}", ":other", f"{BIN}/kvm:{TREE}/other"]))
    if all(name != "PATH" for name, _ in environment):
        environment.insert(draw(st.integers(0, len(environment))), ("PATH", path))
    return Request(
        program=["qrap", *draw(command_lines())],
        environment=environment,
        files=FILES if draw(st.booleans()) else draw(TREES),
        inherited=draw(st.lists(st.integers(3, 12), unique=True, max_size=4)),
        closed=draw(st.sampled_from([(), (), (0,), (1,), (0, 1)])),
        ignored=draw(st.lists(st.sampled_from(SIGNALS), unique=True, max_size=3)),
        blocked=draw(st.lists(st.sampled_from(SIGNALS), unique=True, max_size=3)),
    )


@settings(QRAP, max_examples=250)
@given(requests())
def test_programs(c_program: list[str], arena: Arena, asked: Request) -> None:
    """QEMU finds the same: arguments, descriptors, environment, signals; and failures end and are told the same."""
    compare(arena, c_program, asked)


PLAIN = Request(["qrap", "-m", "1G"], [("PATH", BIN)], FILES)
EXPLICIT = replace(PLAIN, program=["qrap", "7", "qemu", "-m", "1G"])

ODD = {
    "a variable twice": replace(PLAIN, environment=[("A", "1"), ("PATH", BIN), ("A", "2"), ("PATH", "/")]),
    "LC_CTYPE twice": replace(PLAIN, environment=[("LC_CTYPE", "C"), ("PATH", BIN), ("LC_CTYPE", "x")]),
    "LC_CTYPE as Python would set it": replace(PLAIN, environment=[("LC_CTYPE", "C.UTF-8"), ("PATH", BIN)]),
    "no environment": replace(PLAIN, environment=[], files={"kvm": "program"}),
    "no environment, but a command": replace(PLAIN, environment=[], program=["qrap", "5", "true"]),
    "an empty PATH": replace(PLAIN, environment=[("PATH", "")], files={"kvm": "program"}),
    "a name too long": replace(PLAIN, program=["qrap", "5", "x" * 300]),
    "no QEMU": replace(PLAIN, files={}),
    "no number free for that many files": replace(EXPLICIT, files_limit=6),
    "what the caller has at that number": replace(EXPLICIT, inherited=[3, 7, 8]),
    "a script, by /bin/sh": replace(EXPLICIT, files={"bin/qemu": "script"}),
}


@pytest.mark.parametrize("asked", ODD.values(), ids=ODD.keys())
def test_odd_cases(c_program: list[str], arena: Arena, asked: Request) -> None:
    """What chance would seldom find is the same, too."""
    compare(arena, c_program, asked)


def test_no_passt(c_program: list[str], arena: Arena) -> None:
    """Without a passt both fail with the same status; ours says why in its own words."""
    for program in (c_program, OURS):
        record = arena.run(replace(PLAIN, program=[*program, "-m", "1G"], has_passt=False))
        assert 1 == record.status
        assert "Traceback" not in record.stderr
        assert "/tmp/passt_" in record.stderr


# ---- ours alone


def test_the_stream_at_its_own_number(arena: Arena) -> None:
    """QEMU has the stream also at the number that it had anyway, where the C program closes it."""
    record = arena.run(replace(PLAIN, program=[*OURS, "3", "qemu"]))
    assert ["0", "1", "2", "3"] == sorted(record.files)
    assert record.files["3"].startswith("stream")


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)], ids=str)
def test_without_stderr(arena: Arena, closed: tuple[int, ...]) -> None:
    """No message gets into the stream where that took stderr's number, as happens in the C program."""
    with_all = arena.run(replace(EXPLICIT, program=[*OURS, *EXPLICIT.program[1:]]))
    without = arena.run(replace(EXPLICIT, program=[*OURS, *EXPLICIT.program[1:]], closed=closed))
    assert with_all.files["7"] == without.files["7"]
    assert set(with_all.files) - set(map(str, closed)) == set(without.files)


def test_sigpipe(arena: Arena) -> None:
    """QEMU finds SIGPIPE and SIGXFSZ at their defaults; Python's start hides whether the caller had ignored them."""
    reset = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
    status = Path("/proc/self/status").read_text()
    # timeout(1), for one, ignores signals that it passes on to the test run.
    ours = int(status.partition("SigIgn:")[2].split()[0], 16)
    for ignored in ([], [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGUSR1]):
        record = arena.run(replace(EXPLICIT, program=[*OURS, *EXPLICIT.program[1:]], ignored=ignored))
        expected = (ours | (1 << signal.SIGUSR1 - 1 if ignored else 0)) & ~reset
        assert expected == int(record.signals["SigIgn"], 16)


def test_the_stream_is_as_a_c_program_has_it(arena: Arena) -> None:
    """It blocks, without time limits, and the answer to the probe is still in it."""
    record = arena.run(replace(EXPLICIT, program=[*OURS, *EXPLICIT.program[1:]]))
    assert "stream of /tmp/passt_2.socket 02 limits [(0, 0), (0, 0)] to be read 46" == record.files["7"]


def test_imports(arena: Arena) -> None:
    """A start of a VM waits for no library but Python's own, and for none of that one's slow modules."""
    program = [sys.executable, "-P", "-X", "importtime", *OURS[2:], *EXPLICIT.program[1:]]
    record = arena.run(replace(EXPLICIT, program=program))
    lines = [line.rpartition("|")[2].strip() for line in record.stderr.splitlines() if "import time:" in line]
    imported = set(lines[lines.index("site") + 1 :])
    assert "qrapd.probe" in imported
    slow = {
        "asyncio",
        "concurrent.futures",
        "dataclasses",
        "inspect",
        "logging",
        "pathlib",
        "subprocess",
        "threading",
    }
    assert set() == imported & slow
    assert {"qrapd"} == {name.partition(".")[0] for name in imported} - sys.stdlib_module_names


def test_the_entry_point() -> None:
    """What is installed as `qrap` is what is tested here."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert "qrapd.qrap:main" == project["scripts"]["qrap"]
