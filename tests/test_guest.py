# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo's and the tests' guest: its modules, its image, and one real boot."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrapd.errors import Unavailable
from qrapd.guest import GuestImage, build_guest, default_cache
from qrapd.guest.busybox import check_applets, find_busybox, is_static
from qrapd.guest.initramfs import APPLETS, Entry, contents, pack
from qrapd.guest.kernel import Kernel, _unpack_member, find_kernel, kernel_packages
from qrapd.guest.modules import MissingModuleError, ModuleIndex, module_name, read_module

DEP = """\
kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko kernel/v/ring.ko
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/net/core/failover.ko:
kernel/v/ring.ko:
kernel/v/virtio-pci.ko: kernel/v/ring.ko
"""


# modules


def test_what_a_module_needs_is_loaded_before_it() -> None:
    """The order is one in which insmod finds every symbol, each file once; '-' and '_' are the same."""
    index = ModuleIndex.parse(DEP)

    assert [
        "kernel/v/ring.ko",
        "kernel/v/virtio-pci.ko",
        "kernel/net/core/failover.ko",
        "kernel/drivers/net/net_failover.ko",
        "kernel/drivers/net/virtio_net.ko",
    ] == index.load_order(["virtio_pci", "virtio-net"])


def test_built_in_and_absent_optional_modules_are_left_out() -> None:
    """What the kernel has inside needs no file, and what is not needed may be missing."""
    index = ModuleIndex.parse(DEP, "kernel/net/packet/af_packet.ko\nkernel/drivers/input/evdev.ko\n")

    assert ["kernel/v/ring.ko"] == index.load_order(["af_packet", "ring"], ["evdev", "e1000"])


def test_a_missing_required_module_is_named() -> None:
    """A kernel that cannot serve as the guest's is recognised before anything is packed."""
    with pytest.raises(MissingModuleError, match=r"^e1000$"):
        ModuleIndex.parse(DEP).load_order(["e1000"])


def test_a_cycle_in_modules_dep_ends() -> None:
    """A damaged modules.dep must not hang the build."""
    index = ModuleIndex.parse("a.ko: b.ko\nb.ko: a.ko\n")

    assert ["b.ko", "a.ko"] == index.load_order(["a"])


@given(st.dictionaries(st.integers(0, 20), st.sets(st.integers(0, 20)), min_size=1))
def test_every_order_is_complete_and_has_no_module_before_its_needs(graph: dict[int, set[int]]) -> None:
    """Whatever modules.dep lists, in whatever order, as long as it is as depmod writes it: closed, no cycles."""
    closed: dict[int, set[int]] = {}
    for number in range(21):  # edges go to smaller numbers only
        direct = {other for other in graph.get(number, ()) if other < number}
        closed[number] = direct.union(*(closed[other] for other in direct))
    text = "".join(
        f"m{number}.ko: {' '.join(f'm{other}.ko' for other in needs)}\n" for number, needs in closed.items()
    )

    order = ModuleIndex.parse(text).load_order([f"m{number}" for number in graph])

    assert {number for top in graph for number in {top, *closed[top]}} == {int(f[1:-3]) for f in order}
    for place, file in enumerate(order):
        assert {f"m{other}.ko" for other in closed[int(file[1:-3])]} <= set(order[:place])


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_compressed_modules_are_unpacked(tmp_path: Path, suffix: str) -> None:
    """Distributions compress their modules in four ways; the guest's insmod wants the plain file."""
    elf = b"\x7fELF" + bytes(1000)
    path = tmp_path / f"virtio-net.ko{suffix}"
    if suffix == ".zst":
        program = shutil.which("zstd")
        if program is None:
            pytest.skip("no zstd here")
        packed = subprocess.run([program, "-q"], input=elf, capture_output=True, check=True).stdout
    else:
        packers: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
        packed = packers[suffix](elf)
    path.write_bytes(packed)

    assert elf == read_module(path)
    assert module_name(path.name) == "virtio_net"


def test_a_damaged_zstd_module_is_told_in_zstds_words(tmp_path: Path) -> None:
    """The error names the command, the file and what came back."""
    if shutil.which("zstd") is None:
        pytest.skip("no zstd here")
    path = tmp_path / "a.ko.zst"
    path.write_bytes(b"nonsense")

    with pytest.raises(Unavailable, match=r"a\.ko\.zst` ended with 1: .*format"):
        read_module(path)


# initramfs


def unpack(archive: bytes) -> list[Entry]:
    """Reads a newc archive by the kernel's description of it, apart from the writer."""
    entries: list[Entry] = []
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701"
        fields = [int(archive[at : at + 8], 16) for at in range(offset + 6, offset + 110, 8)]
        mode, size, major, minor, name_size = fields[1], fields[6], fields[9], fields[10], fields[11]
        name_end = offset + 110 + name_size
        name = archive[offset + 110 : name_end]
        assert name.endswith(b"\0")
        start = name_end + -name_end % 4
        if name == b"TRAILER!!!\0":
            assert not archive[start:].strip(b"\0")
            return entries
        assert fields[2:4] == [0, 0], "owner"
        assert fields[5] == 0, "mtime"
        entries.append(Entry(name[:-1].decode(), mode, archive[start : start + size], (major, minor)))
        offset = start + size + -size % 4


names = st.lists(st.text("abc-.", min_size=1, max_size=5), min_size=1, max_size=3).map("/".join)
entry_lists = st.lists(
    st.builds(Entry, names, st.sampled_from([stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777]), st.binary()),
    unique_by=lambda entry: entry.path,
)


@given(entry_lists)
def test_an_archive_holds_what_was_put_in(entries: list[Entry]) -> None:
    """Names and contents of every length keep the format's four-byte steps."""
    assert sorted(entries, key=lambda entry: entry.path.split("/")) == unpack(pack(entries))


@given(entry_lists, st.randoms(use_true_random=False))
def test_the_same_entries_give_the_same_bytes(entries: list[Entry], random: object) -> None:
    """An image is reproducible, whatever the order in which a directory was read."""
    shuffled = list(entries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert pack(entries) == pack(shuffled)


def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    """busybox's cpio, which knows nothing of this writer, finds the same names."""
    busybox = find_busybox()
    entries = contents(busybox, [])

    listed = subprocess.run([busybox, "cpio", "-t"], input=pack(entries), capture_output=True, check=True)

    assert sorted(entry.path for entry in entries) == sorted(listed.stdout.decode().split())


def test_the_image_has_what_the_kernel_and_the_scripts_ask_for(tmp_path: Path) -> None:
    """Device nodes without being root, modules numbered in load order, scripts that can be run."""
    (tmp_path / "b-c.ko").write_bytes(b"second")
    (tmp_path / "a.ko").write_bytes(b"first")
    busybox = find_busybox()

    found = {
        entry.path: entry
        for entry in unpack(pack(contents(busybox, [tmp_path / "b-c.ko", tmp_path / "a.ko"])))
    }

    assert (stat.S_IFCHR | 0o600, (5, 1)) == (found["dev/console"].mode, found["dev/console"].device)
    assert ["00-b_c.ko", "01-a.ko"] == [Path(p).name for p in found if p.startswith("lib/modules/")]
    for script in ("init", "bin/lease", "bin/serve-nic", "www/cgi-bin/state", "control/traffic"):
        assert stat.S_IFREG | 0o755 == found[script].mode
        assert found[script].data.startswith(b"#!/bin/sh\n")
    for path in found:
        assert path.rpartition("/")[0] in {"", *found}, "a directory comes with all that is in it"


def test_busyboxs_shell_accepts_every_script(tmp_path: Path) -> None:
    """A slip in a script is found without a boot, by the shell that will read it."""
    busybox = find_busybox()
    for entry in contents(busybox, []):
        if entry.data.startswith((b"#!/bin/sh", b"# SPDX")):
            subprocess.run([busybox, "sh", "-n"], input=entry.data, check=True)


# busybox


def elf(*kinds: int) -> bytes:
    """A 64-bit ELF header with program headers of these types."""
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x20, 64)
    struct.pack_into("<HH", header, 0x36, 56, len(kinds))
    return bytes(header) + b"".join(struct.pack("<I", kind).ljust(56, b"\0") for kind in kinds)


def test_a_program_is_static_if_it_names_no_interpreter() -> None:
    """A busybox that needs libc would leave the guest without a working init."""
    assert is_static(elf(1, 1))
    assert not is_static(elf(1, 3))
    assert not is_static(b"#!/bin/sh\n" + bytes(100))
    assert not is_static(elf(1, 1)[:70])


def test_a_dynamic_busybox_is_passed_over_and_named(tmp_path: Path) -> None:
    """The person sees which one was found and which package has the right one."""
    dynamic = tmp_path / "busybox"
    dynamic.write_bytes(elf(1, 3))
    dynamic.chmod(0o755)

    with pytest.raises(Unavailable, match=str(dynamic)) as caught:
        find_busybox(str(tmp_path))

    assert "busybox-static" in str(caught.value.hint)


def test_a_busybox_without_an_applet_is_refused() -> None:
    """Better now than as a guest that never gets its lease."""
    check_applets(find_busybox(), APPLETS)
    with pytest.raises(Unavailable, match=r"lacks what the guest needs: no-such-applet$"):
        check_applets(find_busybox(), ["sh", "no-such-applet"])


# kernel


def install_kernel(root: Path, version: str, *, image: bool = True, modules: str = DEP) -> None:
    """Puts a kernel where a distribution does."""
    directory = root / "lib/modules" / version
    for line in modules.splitlines():
        file = directory / line.partition(":")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"module")
    (directory / "modules.dep").write_text(modules)
    (root / "boot").mkdir(exist_ok=True)
    if image:
        (root / "boot" / f"vmlinuz-{version}").write_bytes(b"kernel")


def test_the_newest_kernel_that_can_be_used_is_taken(tmp_path: Path) -> None:
    """6.10 is newer than 6.9; one without image or without virtio is passed over; nothing is downloaded."""
    said: list[str] = []
    install_kernel(tmp_path, "6.9.1")
    install_kernel(tmp_path, "6.10.2")
    install_kernel(tmp_path, "6.11.0", image=False)
    install_kernel(tmp_path, "6.12.0", modules="kernel/v/ring.ko:\n")

    kernel = find_kernel(tmp_path / "cache", say=said.append, root=tmp_path)

    assert "6.10.2" == kernel.version
    assert tmp_path / "boot/vmlinuz-6.10.2" == kernel.image
    assert "virtio_net.ko" == kernel.modules[-1].name
    assert [] == said


def test_a_kernel_in_its_modules_directory_is_found(tmp_path: Path) -> None:
    """Fedora and Arch keep the image beside the modules."""
    install_kernel(tmp_path, "6.9.1", image=False)
    image = tmp_path / "lib/modules/6.9.1/vmlinuz"
    image.write_bytes(b"kernel")

    assert image == find_kernel(tmp_path / "cache", say=print, root=tmp_path).image


def test_a_downloaded_kernel_is_used_again(tmp_path: Path) -> None:
    """What is in the cache and complete saves the download."""
    install_kernel(tmp_path, "6.9.1")
    directory = tmp_path / "lib/modules/6.9.1"
    (tmp_path / "boot/vmlinuz-6.9.1").rename(directory / "vmlinuz")
    cache = tmp_path / "cache"
    cache.mkdir()
    directory.rename(cache / "kernel-6.9.1")

    kernel = find_kernel(cache, say=pytest.fail, root=tmp_path / "empty")

    assert ("6.9.1", cache / "kernel-6.9.1/vmlinuz") == (kernel.version, kernel.image)


@pytest.mark.parametrize(
    ("tools", "wanted"), [([], "linux-image-"), (["apt-get", "apt-cache", "dpkg-deb"], "kmod")]
)
def test_a_host_without_the_means_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: list[str], wanted: str
) -> None:
    """The error says what is wrong with each kernel that was found, the hint which package helps."""
    install_kernel(tmp_path, "6.12.0", modules="kernel/v/ring.ko:\n")
    for tool in tools:
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("qrapd.guest.kernel.SYSTEM_DIRECTORIES", "")

    with pytest.raises(Unavailable, match=r"6\.12\.0: it has no module virtio_pci") as caught:
        find_kernel(tmp_path / "cache", say=pytest.fail, root=tmp_path)

    assert wanted in str(caught.value.hint)


def test_empty_apt_lists_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh container has apt and no lists: the person is sent to apt-get update."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb", "depmod"):
        (tmp_path / tool).write_text("#!/bin/sh\necho 'E: No packages found' >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(Unavailable, match="apt knows no kernel package") as caught:
        find_kernel(tmp_path / "cache", say=pytest.fail, root=tmp_path / "empty")

    assert "apt-get update" in str(caught.value.hint)


def test_kernel_packages_are_told_from_the_others() -> None:
    """Debian's one package, Ubuntu's two; no headers, no extra modules, no meta-packages."""
    depends = """\
linux-image-generic
  Depends: linux-image-6.8.0-31-generic
 |Depends: linux-modules-6.8.0-31-generic
  PreDepends: linux-base
  Depends: linux-modules-extra-6.8.0-31-generic
  Depends: linux-firmware
  Suggests: linux-headers-6.8.0-31-generic
    linux-image-6.8.0-99-other
"""
    assert ["linux-image-6.8.0-31-generic", "linux-modules-6.8.0-31-generic"] == kernel_packages(depends)


def test_a_package_is_unpacked_as_depmod_wants_it(tmp_path: Path) -> None:
    """From both layouts of /usr, only image and modules, and nothing outside."""
    members = {
        "./boot/vmlinuz-1": "lib/modules/1/vmlinuz",
        "./usr/lib/modules/1/kernel/a.ko.xz": "lib/modules/1/kernel/a.ko.xz",
        "./lib/modules/1/modules.builtin": "lib/modules/1/modules.builtin",
        "./usr/share/doc/a.ko": None,
        "./lib/modules/../../a.ko": None,
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in members:
            archive.addfile(tarfile.TarInfo(name))
    tree = tmp_path / "tree"

    packed.seek(0)
    with tarfile.open(fileobj=packed) as archive:
        for member in archive:
            _unpack_member(archive, member, tree)

    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert sorted(f"tree/{target}" for target in members.values() if target) == found


# all of it


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """$QRAPD_CACHE, else the XDG directory, else ~/.cache; a relative XDG directory counts for nothing."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("QRAPD_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert Path("/somewhere") == default_cache()
    monkeypatch.delenv("QRAPD_CACHE")
    assert Path("/xdg/qrapd") == default_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert Path("/home/someone/.cache/qrapd") == default_cache()


def test_the_image_is_reproducible_and_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same input gives the same file in two caches; a second build does and says nothing; a change is seen."""
    install_kernel(tmp_path, "6.9.1")
    kernel = find_kernel(tmp_path, say=print, root=tmp_path)

    def found(cache: Path, **_: object) -> Kernel:
        return kernel

    monkeypatch.setattr("qrapd.guest.find_kernel", found)
    said: list[str] = []

    first = build_guest(tmp_path / "one", say=said.append)
    assert 1 == len(said)
    written = first.initramfs.stat()
    again = build_guest(tmp_path / "one", say=said.append)
    assert 1 == len(said)
    assert first == again
    assert written == again.initramfs.stat()
    other = build_guest(tmp_path / "two", say=said.append)
    assert first.initramfs.read_bytes() == other.initramfs.read_bytes()
    kernel.modules[0].write_bytes(b"another module")
    assert first.initramfs != build_guest(tmp_path / "one", say=said.append).initramfs


def test_old_images_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache does not grow with each change of the guest: the last images stay, and what is no image."""
    install_kernel(tmp_path, "6.9.1")
    kernel = find_kernel(tmp_path, say=print, root=tmp_path)
    monkeypatch.setattr("qrapd.guest.find_kernel", lambda _, **__: kernel)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "notes").touch()
    old = [cache / f"initramfs-6.9.0-{number}.cpio" for number in range(8)]
    for second, image in enumerate(old):
        image.touch()
        os.utime(image, (second, second))
    made = build_guest(cache).initramfs
    assert {made, *old[-4:], cache / "notes", cache / "lock"} == set(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The hint tells of the variable that moves it."""
    (tmp_path / "file").touch()

    with pytest.raises(Unavailable, match=f"could not be built in {tmp_path}/file/cache: ") as caught:
        build_guest(tmp_path / "file/cache")

    assert "QRAPD_CACHE" in str(caught.value.hint)


@pytest.fixture(scope="module")
def image() -> GuestImage:
    """The real guest; its kernel may be downloaded, once."""
    return build_guest(default_cache())


@pytest.mark.guest
@pytest.mark.timeout(180)  # with a download, a large kernel and a busy machine
def test_the_guest_boots_and_powers_off(image: GuestImage) -> None:
    """Under TCG, without a network: it is ready at once, and powers off when told by its command line."""
    console = boot(image, "guest.poweroff_after=0")

    ours = [line for line in console if line.startswith("guest: ")]
    assert ["guest: ready", "guest: powering down"] == ours, console


@pytest.mark.guest
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("nic", "words", "expected"),
    [
        ("user", "guest.address=10.0.2.77/24,10.0.2.2", r"10\.0\.2\.77/24 router 10\.0\.2\.2"),
        ("user", "guest.address=10.0.2.77/24", r"10\.0\.2\.77/24"),
        (
            "user,ipv4=off,ipv6-prefix=fd77::,ipv6-host=fd77::2",
            "guest.ipv6=only",
            r"fd77::[0-9a-f:]+/64 router fe80::2",
        ),
        ("user,ipv4=off,ipv6-prefix=fd77::,ipv6-host=fd77::2", "", r"fd77::[0-9a-f:]+/64 router fe80::2"),
    ],
)
def test_an_address_without_a_lease(image: GuestImage, nic: str, words: str, expected: str) -> None:
    """A static one is taken at once; without IPv4, the guest finds its IPv6 address, whether it was told to or not."""
    args = ["-nic", f"{nic},model=virtio-net-pci"]

    console = boot(image, f"{words} guest.poweroff_after=0", args)

    ours = [line for line in console if line.startswith("guest: ")]
    assert re.fullmatch(f"guest: address eth0 {expected}", ours[0]), console
    assert ["guest: ready", "guest: powering down"] == ours[1:], console


def boot(image: GuestImage, words: str, args: Sequence[str] = ()) -> list[str]:
    """Runs the guest to its end, and gives its console's lines."""
    command = [f"qemu-system-{os.uname().machine}", "-accel", "tcg", "-m", "128M", "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]
    command += ["-kernel", str(image.kernel), "-initrd", str(image.initramfs)]
    command += ["-append", f"{image.command_line} {words}", *args]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=100, check=True)
    return done.stdout.decode(errors="replace").splitlines()
