# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a running VM keeps its lock, record and sockets: ``BASE/NAME/``, gone when the VM is.

The base is $RUNTIME_DIRECTORY (set by systemd), else /run/qrapd for root, else $XDG_RUNTIME_DIR/qrapd.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from qrapd.errors import AlreadySupervised, Unavailable

__all__ = ["SOCKETS", "VmDirectory", "clear_up", "default_base"]

SUN_PATH_MAX = 107
"""Bytes that a UNIX socket's path may have: unix(7), sizeof(sun_path) less its NUL."""

SOCKETS = ("qmp.sock", "user-qmp.sock", "serial.sock", "control.sock")
"""Every socket that a VM's directory may hold."""

PATIENCE = 0.1
"""Seconds that a claim puts up with those who only look at the lock. They hold it for microseconds, but one of them may
lose the processor just then, on a busy host for some 10 ms. The event loop waits meanwhile."""


def default_base(environment: Mapping[str, str], uid: int) -> Path:
    """The runtime directory that is meant when none is named.

    :raise Unavailable: an unprivileged user without $XDG_RUNTIME_DIR.
    """
    if directory := environment.get("RUNTIME_DIRECTORY"):
        return Path(directory.split(":")[0])
    if uid == 0:
        return Path("/run/qrapd")
    if directory := environment.get("XDG_RUNTIME_DIR"):
        return Path(directory) / "qrapd"
    raise Unavailable(
        "there is no runtime directory: $XDG_RUNTIME_DIR is not set",
        hint="log in through a session that sets it, or name a directory of your own: --runtime-dir DIR",
    )


def clear_up(base: Path) -> None:
    """Remove what starts that were cut short have left: a VM's directory with a lock that nobody holds, and no record.

    Only what is this user's. One without a lock is left: it may be a unit's, made for a start that is to come.
    """
    with contextlib.suppress(OSError), os.scandir(base) as entries:
        for entry in [*entries]:
            with contextlib.suppress(OSError, AlreadySupervised, Unavailable):
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid() and _is_cut_short(entry):
                    with VmDirectory(base, entry.name).claim() as directory:
                        if not _is_cut_short(entry) or directory.is_answered("qmp.sock"):
                            directory.leave_as_it_is()


def _is_cut_short(entry: os.DirEntry[str]) -> bool:
    """Whether it looks like it. A lock that says nothing is one that is just being made."""
    if not entry.is_dir(follow_symlinks=False):
        return False
    files = {each.name for each in Path(entry).iterdir() if not each.name.startswith("pesto")}
    return (
        "lock" in files
        and files <= {"lock", "record.new", *SOCKETS}
        and Path(entry.path, "lock").lstat().st_size > 0
    )


class VmDirectory:
    """A VM's own directory, mode 0700, held by an exclusive lock for as long as the VM is supervised."""

    def __init__(self, base: Path, name: str) -> None:
        # Absolute, since QEMU works in a directory of its own.
        self.path = base.absolute() / name
        self._lock = -1
        self._leave = False

    def socket_path(self, name: str) -> Path:
        """Where the socket ``name`` is, one of :data:`SOCKETS`."""
        return self.path / name

    def pesto_socket(self, link: int) -> Path:
        """Where a link's passt listens for pesto(1): no longer than the longest of :data:`SOCKETS`, up to link 999."""
        return self.path / f"pesto{link}.sock"

    @property
    def record_path(self) -> Path:
        """Where the supervisor's record is: see :mod:`qrapd.record`."""
        return self.path / "record.json"

    def supervisor_pid(self) -> int | None:
        """Who holds the lock; None if nobody does.

        The kernel is asked (/proc/locks): it knows the pid by which this process has the holder, while one in a PID
        namespace of its own (a container, ``PrivatePIDs=``) has written down another. Only where it names nobody is
        the lock tried, for it may be held out of this process's sight; that is no obstacle to a claim.

        :raise PermissionError: this user may not know, or the holder is in a PID namespace that is hidden from here.
        """
        lock = self._open_lock()
        if lock is None:
            return None
        try:
            for _ in range(3):  # it may be taken between the two steps
                try:
                    if pid := _holder(lock):
                        return pid
                    told = True
                except LookupError:
                    told = False
                if _try_lock(lock, fcntl.LOCK_SH):
                    return None
            if told:
                raise PermissionError(
                    errno.EPERM, "its supervisor is in another PID namespace", str(self.path)
                )
            return _noted(lock)
        finally:
            os.close(lock)

    def glance(self) -> int | None:
        """As :meth:`supervisor_pid`, in a twentieth of the time, for those to whom it matters little which pid that is.

        The lock is tried, and the pid is the one that its holder has written down: 0 if there is none.

        :raise OSError: this user may not know.
        """
        lock = self._open_lock()
        if lock is None:
            return None
        try:
            if _try_lock(lock, fcntl.LOCK_SH):
                return None
            return _noted(lock) or 0
        finally:
            os.close(lock)

    def _open_lock(self) -> int | None:
        try:
            # Root looks into users' directories, too: a pipe of that name must not hold it up, nor a link lead it on.
            lock = os.open(self.path / "lock", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                return None
            raise
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            os.close(lock)
            return None
        return lock

    @contextlib.contextmanager
    def claim(self) -> Iterator[VmDirectory]:
        """Make and lock the directory; on the way out remove it with all that is ours in it.

        :raise AlreadySupervised: another process holds the lock.
        :raise Unavailable: the directory cannot be made, or its path is too long for a socket.
        """
        self._check_length()
        self._make()
        self._take_lock()
        try:
            yield self
        finally:
            self._remove()

    def leave_as_it_is(self) -> None:
        """Remove nothing on the way out: what is in the directory is in use by others."""
        self._leave = True

    def clear_up(self) -> None:
        """Remove on the way out what is ours: nothing of the VM runs any more."""
        self._leave = False

    def is_answered(self, name: str) -> bool:
        """Whether anybody listens on the socket ``name``."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            caller.setblocking(False)
            try:
                caller.connect(str(self.socket_path(name)))
            except BlockingIOError:
                return True  # and has no time
            except OSError:
                return False
        return True

    def listen(self, name: str, backlog: int = 1) -> socket.socket:
        """A listening socket: whoever connects from now on waits, but is not refused."""
        path = self.socket_path(name)
        listener = None
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen(backlog)
        except OSError as error:
            if listener is not None:
                listener.close()
            raise Unavailable(f"cannot listen on {path}: {error.strerror}") from error
        return listener

    def _check_length(self) -> None:
        longest = max((self.socket_path(name) for name in SOCKETS), key=lambda path: len(os.fsencode(path)))
        length = len(os.fsencode(longest))
        if length > SUN_PATH_MAX:
            raise Unavailable(
                f"the path {longest} has {length} bytes, and a socket's path may have {SUN_PATH_MAX}",
                hint="choose a shorter runtime directory with --runtime-dir, or a shorter name for the VM",
            )

    def _make(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            # If the last supervisor has removed it in the meantime, _take_lock() makes it once more.
            with contextlib.suppress(FileNotFoundError):
                self._secure()
        except OSError as error:
            raise Unavailable(
                f"cannot make the runtime directory {self.path}: {error.strerror}",
                hint="run as a user who may write there, or name another place: --runtime-dir DIR",
            ) from error

    def _secure(self) -> None:
        """Take the directory for our own, and close it to others.

        A link is not followed, and a stranger's directory is refused: in a base that others can write, such as
        /tmp, they would choose what is written and removed in our name.
        """
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            owner = os.fstat(directory).st_uid
            if owner != os.geteuid():
                raise Unavailable(
                    f"the directory {self.path} belongs to user {owner}, and this is user {os.geteuid()}",
                    hint="remove it, run as that user, or name another place: --runtime-dir DIR",
                )
            # systemd's RuntimeDirectoryMode may have made it wider, and mkdir() is subject to the umask.
            os.fchmod(directory, 0o700)
        finally:
            os.close(directory)

    def _take_lock(self) -> None:
        path = self.path / "lock"
        while True:
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                self._make()  # the last supervisor removed the directory between our two steps
                continue
            except OSError as error:
                raise Unavailable(
                    f"cannot write in the runtime directory {self.path}: {error.strerror}",
                    hint="run as the user who owns it, or name another place: --runtime-dir DIR",
                ) from error
            if not _lock_for_good(lock):
                os.close(lock)
                raise AlreadySupervised(
                    f"the VM {self.path.name} is already supervised: another process holds {path}",
                    hint=f"see who it is with `fuser -v {path}`, or run this one under another name",
                )
            if _is_same_file(lock, path):
                self._lock = lock
                # It is the lock that counts: a full /run must not keep a VM from being taken over.
                with contextlib.suppress(OSError):
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
                return
            os.close(lock)  # the last supervisor removed the file after we had opened it

    def _remove(self) -> None:
        if self._leave:
            os.close(self._lock)
            return
        # What others have put there stays, and so does a directory whose parent is not ours to write (systemd's).
        for name in (*SOCKETS, "record.json", "record.new", "lock"):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        with contextlib.suppress(OSError):
            for path in self.path.glob("pesto*.sock"):
                path.unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()
        os.close(self._lock)
        self._lock = -1


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _noted(lock: int) -> int | None:
    text = os.pread(lock, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _lock_for_good(fd: int) -> bool:
    """Take the lock unless a supervisor has it. Who only looks takes it shared, which a supervisor never does."""
    until = time.monotonic() + PATIENCE
    while not _try_lock(fd, fcntl.LOCK_EX):
        if not _try_lock(fd, fcntl.LOCK_SH) or time.monotonic() >= until:
            return False
        fcntl.flock(fd, fcntl.LOCK_UN)  # two that claim must not see each other looking for long
        os.sched_yield()
    return True


def _holder(fd: int) -> int | None:
    """Who has locked an open file for himself, as the kernel tells it.

    :raise LookupError: it does not: there is no /proc, or part of it only (``ProcSubset=pid``).
    """
    try:
        # Not by fstat(): what that says of the device is another number on btrfs and overlayfs.
        about = dict(line.split(":", 1) for line in _read(f"/proc/self/fdinfo/{fd}") if ":" in line)
        mounts = (line.split(maxsplit=3) for line in _read("/proc/self/mountinfo"))
        device = next(device for mount, _, device, _ in mounts if mount == about["mnt_id"].strip())
        major, minor = map(int, device.split(":"))
        file = f"{major:02x}:{minor:02x}:{int(about.get('ino') or os.fstat(fd).st_ino)}"
        locks = [line.split() for line in _read("/proc/locks")]
    except (OSError, KeyError, ValueError, StopIteration) as error:
        raise LookupError(f"the kernel tells of no locks: {error!r}") from error
    # "1: FLOCK ADVISORY WRITE 4711 00:19:8 0 EOF"; with "->" in the second place, for one that waits.
    return next((int(words[4]) for words in locks if words[1:4] == _EXCLUSIVE and words[5] == file), None)


_EXCLUSIVE = ["FLOCK", "ADVISORY", "WRITE"]


def _read(path: str) -> list[str]:
    return Path(path).read_text("utf-8", errors="replace").splitlines()
