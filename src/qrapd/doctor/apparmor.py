# SPDX-License-Identifier: GPL-2.0-or-later
"""What AppArmor lets passt do, by the profile that distributions ship for it."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from .. import binaries, runtime_directory
from ..errors import Unavailable
from .files import read_text
from .finding import Finding

__all__ = ["AppArmorView", "allow_command", "examine_apparmor", "judge_apparmor", "profile_mode"]

# A link with such an option needs a path that passt may use; all else goes by inherited descriptors.
_OPTIONS_WITH_A_PATH = ("vhost-user", "conf-path")

_PASST_PROFILE = Path("/etc/apparmor.d/usr.bin.passt")


@dataclass(frozen=True)
class AppArmorView:
    """What was seen of AppArmor."""

    enabled: bool
    loaded: str | None = None
    """The kernel's list of loaded profiles; None if this user may not read it."""
    profile: str | None = None
    """The text of the profile of passt; None if there is no such file."""


def examine_apparmor(options: frozenset[str], runtime_dir: Path | None) -> Finding:
    """Find out what AppArmor lets passt do with paths below the runtime directory."""
    enabled = read_text(Path("/sys/module/apparmor/parameters/enabled"))
    view = AppArmorView(
        enabled is not None and enabled.strip() == "Y",
        read_text(Path("/sys/kernel/security/apparmor/profiles")),
        read_text(_PASST_PROFILE),
    )
    try:
        base = runtime_dir or runtime_directory.default_base(os.environ, os.geteuid())
    except Unavailable:
        base = Path("/run/qrapd")
    return judge_apparmor(view, options, base.absolute())


def profile_mode(loaded: str, name: str) -> str | None:
    """Return the mode of profile ``name`` in the kernel's list ("NAME (MODE)" a line), or None."""
    for line in loaded.splitlines():
        profile, _, mode = line.rpartition(" ")
        if profile in {name, f"/usr/bin/{name}"}:
            return mode.strip("()")
    return None


def judge_apparmor(view: AppArmorView, options: frozenset[str], base: Path) -> Finding:
    """Tell what of passt's would be denied: paths outside of the homes and /tmp, in its own profile."""
    subject = "AppArmor"
    if not view.enabled:
        return Finding(subject, "ok", "not enabled")
    mode = profile_mode(view.loaded, "passt") if view.loaded is not None else None
    if view.loaded is None and view.profile is not None:
        mode = "enforce"  # the list is root's to read; a profile that is installed is enforced as a rule
    if mode is None:
        return Finding(subject, "ok", "enabled, with no profile for passt")
    if mode not in {"enforce", "kill", "prompt"}:
        return Finding(subject, "ok", f"passt's profile is in {mode} mode: nothing is denied")
    words = f"passt's profile is in {mode} mode"
    needing = [option for option in _OPTIONS_WITH_A_PATH if option in options]
    if not needing:
        return Finding(subject, "ok", f"{words}; links of source managed use no path, so nothing is denied")
    if _profile_allows(base, view.profile or ""):
        return Finding(subject, "ok", f"{words}, and allows paths below {base}")
    words += f"; links of source managed use no path, but sockets for {' and '.join(needing)} below {base}"
    words += " would be denied"
    return Finding(subject, "warning", words, allow_command(base) if view.profile is not None else None)


def _profile_allows(base: Path, profile: str) -> bool:
    # The rules of passt's contrib/apparmor: owner /tmp/** w, owner @{HOME}/** w.
    if f"{base}/**" in profile:
        return True
    return any(base.is_relative_to(place) for place in ("/tmp", "/home", "/root"))  # noqa: S108 - compared only


def allow_command(base: Path, profile: Path = _PASST_PROFILE) -> str:
    """Return the command that adds ``base`` to passt's profile and loads it.

    Into the profile itself: as Debian 12 ships it, it includes no file for local additions.
    """
    edit = shlex.quote(rf"s|^}}|  {base}/** rw,\n}}|")
    return binaries.as_root(f"sed -i {edit} {profile}", f"apparmor_parser -r {profile}")
