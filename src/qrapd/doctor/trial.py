# SPDX-License-Identifier: GPL-2.0-or-later
"""A passt that is really started on this host: only that tells whether it does start."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import dataclass

from .. import binaries
from .finding import Finding

__all__ = ["Trial", "has_started", "judge_trial", "try_passt"]


@dataclass(frozen=True)
class Trial:
    """How a trial run of passt ended: its exit status, None if it had to be killed, and what it said."""

    status: int | None
    output: str

    @property
    def last_words(self) -> str:
        """The lines that say why it failed, on one line."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return "; ".join(line for line in lines if not line.startswith("Don't run as root"))


def try_passt(*arguments: str, timeout: float = 5.0) -> Trial:
    """Start passt on a stream whose other end is closed already, and see it end (measured: 25 ms).

    It comes that far only with everything in place: addresses copied, ports bound, sandbox made. With the
    stream closed it then ends with 0. Raises Unavailable if there is no passt.
    """
    ours, its = socket.socketpair()
    with its:
        ours.close()
        command = [binaries.find_binary("passt"), "--foreground", "--fd", str(its.fileno()), *arguments]
        child = subprocess.Popen(
            command,
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    with child:
        try:
            output, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            return Trial(None, binaries.without_syslog_noise(output.decode(errors="replace")))
    return Trial(child.returncode, binaries.without_syslog_noise(output.decode(errors="replace")))


def judge_trial(trial: Trial | None) -> Finding:
    """Tell whether passt starts on this host. Remedies stand with the causes, which are other findings."""
    subject = "passt starts"
    if trial is None:
        return Finding(subject, "problem", "not tried: there is no passt that can be")
    if trial.status == 0:
        return Finding(subject, "ok", "it started, made its sandbox and ended in order")
    ended = "did not end and was killed" if trial.status is None else f"ended with status {trial.status}"
    return Finding(subject, "problem", f"it {ended}: {trial.last_words or 'it said nothing'}")


def has_started(trial: Trial | None) -> bool:
    """Tell whether passt started; it did not where there was none to try."""
    return trial is not None and trial.status == 0
