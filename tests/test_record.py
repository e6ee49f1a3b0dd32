# SPDX-License-Identifier: GPL-2.0-or-later
"""The record: whole or not there, and never taken for another process's."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qrapd import record
from qrapd.forwards import Changed
from qrapd.process import start_time
from qrapd.record import LinkRecord, ProcessId, Record, Unusable

RECORD = Record(
    ProcessId(100, 2000),
    (
        LinkRecord(
            *(0, "swap", 3, 4),
            passt=ProcessId(101, 2001),
            passt_pid=101,
            inode=7,
            mac="52:54:00:12:34:56",
            argv=("passt", "--mtu", "1500"),
            changed=Changed((("tcp", "8080:80"), ("udp", "53")), (("tcp", "22"),)),
        ),
        LinkRecord(1, "swap", 1, 1, swapping=True, socket="/tmp/passt_1.socket"),
    ),
    ProcessId(99, 1999),
)


@pytest.mark.parametrize("written", [RECORD, Record(ProcessId(1, 1))])
def test_what_is_written_is_read(tmp_path: Path, written: Record) -> None:
    """A record comes back as it was; nothing is left beside it."""
    path = tmp_path / "record.json"
    record.write(path, RECORD)
    record.write(path, written)
    assert written == record.read(path)
    assert [path] == list(tmp_path.iterdir())


def test_a_record_of_the_first_version_is_read(tmp_path: Path) -> None:
    """What it does not tell is not known."""
    path = tmp_path / "record.json"
    record.write(path, RECORD)
    data = json.loads(path.read_text())
    for link in data["links"]:
        del link["argv"], link["mac"]
        link.pop("changed", None)
    path.write_text(json.dumps(data))
    found = record.read(path)
    assert found is not None
    assert [replace(link, argv=None, mac=None, changed=None) for link in RECORD.links] == list(found.links)


def test_an_older_qrapd_can_be_gone_back_to(tmp_path: Path) -> None:
    """What it does not know is written only where there is something to tell."""
    path = tmp_path / "record.json"
    record.write(path, RECORD)
    assert [True, False] == ["changed" in link for link in json.loads(path.read_text())["links"]]


def test_a_reader_never_sees_half_a_record(tmp_path: Path) -> None:
    """Replacing is atomic: whoever reads while records are written always reads a whole one."""
    path = tmp_path / "record.json"
    big = Record(ProcessId(1, 1), tuple(LinkRecord(number, "swap", 1, 1) for number in range(2000)))
    record.write(path, RECORD)
    done = threading.Event()

    def write() -> None:
        for written in [big, RECORD] * 15:
            record.write(path, written)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = [record.read(path)]
    while not done.is_set():
        seen.append(record.read(path))
    writer.join()
    assert [] == [each for each in seen if each not in (big, RECORD)]


def test_no_record_is_none(tmp_path: Path) -> None:
    """A file that is not there is no error; one that cannot be read is."""
    assert record.read(tmp_path / "record.json") is None
    with pytest.raises(Unusable, match="cannot be read"):
        record.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"x"',
        "{}",
        '{"version": 2}',
        '{"version": 2, "qemu": null, "links": [], "supervisor": null}',
        '{"version": 2, "qemu": {"pid": 1}, "links": [], "supervisor": null}',
        '{"version": 2, "qemu": {"pid": 1, "start_time": 2, "more": 3}, "links": [], "supervisor": null}',
        '{"version": 2, "qemu": {"pid": 1, "start_time": 2}}',
        '{"version": 2, "qemu": {"pid": 1, "start_time": 2}, "links": [7], "supervisor": null}',
        '{"version": 2, "qemu": {"pid": 1, "start_time": 2}, "links": [{"index": 0, "mode": "swap", "generation": 1, '
        '"number": 1, "passt": null, "changed": {"now": [["tcp"]], "file": []}}], "supervisor": null}',
    ],
)
def test_what_is_no_record_is_unusable(tmp_path: Path, text: str) -> None:
    """Whatever has happened to the file, it is told from one that is not there."""
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(Unusable, match="is damaged"):
        record.read(path)


def test_a_part_of_a_record_is_unusable(tmp_path: Path) -> None:
    """A record that was cut off anywhere, by a disk that was full for instance, is none."""
    path = tmp_path / "record.json"
    record.write(path, RECORD)
    whole = path.read_bytes().rstrip()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(Unusable):
            record.read(path)


@pytest.mark.parametrize("version", [1, 99, "2", None])
def test_another_versions_record_is_unusable(tmp_path: Path, version: object) -> None:
    """What a later version has written may look the same and mean something else."""
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"version": version, **asdict(RECORD)}))
    with pytest.raises(Unusable, match="version"):
        record.read(path)


def test_a_pid_with_another_start_time_is_another_process() -> None:
    """A pid that was given out again does not pass for the process that had it."""
    mine = ProcessId(os.getpid(), start_time(os.getpid()))
    assert mine.alive
    assert not ProcessId(mine.pid, mine.start_time + 1).alive


def test_a_process_that_has_ended_is_not_alive() -> None:
    """Also while nobody has collected it: in a container there may be no init that ever does."""
    with subprocess.Popen(["sleep", "60"]) as child:
        known = ProcessId(child.pid, start_time(child.pid))
        assert known.alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert not known.alive
    assert not known.alive
