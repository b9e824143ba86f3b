"""Hosts of their own on one machine: a network, process and mount namespace each, with an sshd.

    laptop (this machine) 10.77.0.1 -- bridge -- host i: 10.77.0.(10 + i)

A host has its own /tmp, /dev/shm, /run and home; /mnt/downpour is shared by all, as a network disk
would be. Its processes see no others, so `ray stop` there ends no one else's; when its first
process is killed, all of it is gone at once. Needs root, and Debian's openssh-server, rsync and
iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUBNET = "10.77.0"
LAPTOP = f"{SUBNET}.1"
BRIDGE = "downpour0"
SHARED = "/mnt/downpour"
FOLDERS = Path("/var/tmp")
"""Not /tmp, which every host has for itself."""
TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}

_APART = ("unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child")
_INIT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /tmp
mount -t tmpfs -o size=12g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
chmod 1777 /tmp /dev/shm
mkdir -p /run/sshd
mount --bind {etc}/passwd /etc/passwd
mount --bind {etc}/shadow /etc/shadow
mount --bind {shared} /mnt
hostname {name}
exec {sshd} -D -e -f {etc}/sshd_config
"""


def missing() -> str | None:
    """Why there can be no bed here, or None if there can."""
    if os.geteuid() != 0:
        return "hosts of their own need root"
    if ROOT.is_relative_to("/tmp"):
        return f"{ROOT} is below /tmp, which each host has for itself: check out elsewhere"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = sorted(
        {package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)}
    )
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install {' '.join(absent)})"
    probe = subprocess.run(
        [
            "unshare",
            "--net",
            "--pid",
            "--mount",
            "--uts",
            "--fork",
            "mount",
            "-t",
            "tmpfs",
            "x",
            "/mnt",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode:
        return f"namespaces are not allowed here: {probe.stderr.strip()}"
    owners = [folder for folder in FOLDERS.glob("downpour-bed-*") if folder.name != _own().name]
    if any(Path(f"/proc/{folder.name.rpartition('-')[2]}").exists() for folder in owners):
        return f"another bed is up: {owners[0]}"
    return None


def _own() -> Path:
    return FOLDERS / f"downpour-bed-{os.getpid()}"


def _sweep() -> None:
    """Take away what a bed has left whose process was killed."""
    for folder in FOLDERS.glob("downpour-bed-*"):
        shutil.rmtree(folder, ignore_errors=True)
    for link in Path("/sys/class/net").glob("dp[0-9]*"):
        _ip("link", "del", link.name, check=False)
    for space in Path("/run/netns").glob("downpour-*"):
        _ip("netns", "del", space.name, check=False)
    _ip("link", "del", BRIDGE, check=False)


@dataclass
class Host:
    """One of the hosts."""

    index: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """As its own hostname."""
        return f"host{self.index}"

    @property
    def address(self) -> str:
        """Its address on the bridge."""
        return f"{SUBNET}.{10 + self.index}"

    @property
    def namespace(self) -> str:
        """Of its network."""
        return f"downpour-{self.name}"

    @property
    def link(self) -> str:
        """The laptop's end of its cable."""
        return f"dp{self.index}"

    @property
    def home(self) -> Path:
        """Of its user."""
        return self.folder / "home"

    def init(self) -> int | None:
        """The process number, here, of the host's first process; None for a host that is off."""
        if self.process is None:
            return None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(OSError, ValueError):
            return int(children.read_text().split()[0])
        return None

    def processes(self) -> list[str]:
        """Command lines of what runs there, but for its init."""
        init = self.init()
        if init is None:
            return []
        space = os.readlink(f"/proc/{init}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                other = entry.name.isdigit() and int(entry.name) != init
                if other and os.readlink(entry / "ns" / "pid") == space:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return [line for line in found if line]


class Bed:
    """Some hosts, while the context lasts."""

    def __init__(self, num_hosts: int) -> None:
        self.folder = _own()
        self.hosts = [Host(i, self.folder / f"host{i}") for i in range(num_hosts)]
        self.laptop = self.folder / "laptop"
        self.key = self.laptop / ".ssh" / "downpour"
        self.shared = self.folder / "mnt" / "downpour"

    def __enter__(self) -> Bed:
        """Bring the hosts up; each answers SSH when this returns."""
        try:
            self._up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything away again."""
        for host in self.hosts:
            self.kill(host)
            _ip("netns", "del", host.namespace, check=False)
            _ip("link", "del", host.link, check=False)
        _ip("link", "del", BRIDGE, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self, host: Host) -> None:
        """The host loses its power: no process of it lives on, and no packet says so."""
        if host.process is None:
            return
        _ip("link", "set", host.link, "down", check=False)
        init = host.init()
        if init is not None:
            os.kill(init, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            host.process.kill()
        host.process.wait(10)
        host.process = None

    def cut(self, host: Host) -> None:
        """The host's cable is pulled."""
        _ip("link", "set", host.link, "down")

    def mend(self, host: Host) -> None:
        """And put back."""
        _ip("link", "set", host.link, "up")

    def limit(self, mbit_per_s: int | None) -> None:
        """Limit what each host sends and receives, or lift the limit."""
        for host in self.hosts:
            inside = ["ip", "netns", "exec", host.namespace]
            for prefix, device in ([], host.link), (inside, "eth0"):
                command = [*prefix, "tc", "qdisc"]
                subprocess.run(
                    [*command, "del", "dev", device, "root"], capture_output=True, check=False
                )
                if mbit_per_s:
                    rate = ["rate", f"{mbit_per_s}mbit", "burst", "256kb", "latency", "50ms"]
                    _run(*command, "add", "dev", device, "root", "tbf", *rate)

    @property
    def environment(self) -> dict[str, str]:
        """What the laptop's user has set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return kept | {
            "HOME": str(self.laptop),
            "PATH": f"{ROOT / '.venv' / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_TMPDIR": str(self.laptop / "tmp"),
            "RAY_UP_enable_autoscaler_v2": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def ssh(self, host: Host, *command: str, timeout_s: float = 60.0) -> str:
        """Run a command on a host as its user; gives what it printed."""
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        done = subprocess.run(
            ["ssh", "-q", "-i", str(self.key), *options, f"root@{host.address}", *command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        return done.stdout

    def cluster_file(self, template: str, workers: Mapping[str, int]) -> str:
        """The SSH provider's file for these hosts; `workers` gives some their role, by index."""
        hosts = self.hosts
        replaced = {
            "192.168.1.10": hosts[0].address,
            "[192.168.1.11, 192.168.1.12, 192.168.1.13]": str([h.address for h in hosts[1:]]),
            "192.168.1.11": hosts[workers["partitions"]].address,
            "192.168.1.12": hosts[workers["shufflers"]].address,
            "ssh_user: ubuntu": "ssh_user: root",
            "~/.ssh/downpour": str(self.key),  # ssh takes ~ from the password file, not from HOME
        }
        for old, new in replaced.items():
            assert old in template, old
            template = template.replace(old, new)
        return template

    def _up(self) -> None:
        _sweep()
        (self.laptop / ".ssh").mkdir(parents=True)
        (self.laptop / ".ray").mkdir()
        (self.laptop / "tmp").mkdir()
        self.shared.mkdir(parents=True)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{LAPTOP}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for host in self.hosts:
            self._up_host(host)
        deadline_s = time.monotonic() + 20
        for host in self.hosts:
            while not _answers(host.address):
                assert time.monotonic() < deadline_s, f"{host.name} does not answer SSH"
                time.sleep(0.05)  # how often to look

    def _up_host(self, host: Host) -> None:
        inside = ["ip", "netns", "exec", host.namespace]
        _ip("netns", "add", host.namespace)
        _ip("link", "add", host.link, "type", "veth", "peer", "eth0", "netns", host.namespace)
        _ip("link", "set", host.link, "master", BRIDGE, "up")
        _run(*inside, "ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        _run(*inside, "ip", "link", "set", "eth0", "up")
        _run(*inside, "ip", "link", "set", "lo", "up")
        _run(*inside, "ip", "route", "add", "default", "via", LAPTOP)
        etc = host.folder / "etc"
        etc.mkdir(parents=True)
        (host.home / ".ssh").mkdir(parents=True)
        (host.home / ".bashrc").write_text("")
        shutil.copy(self.key.with_suffix(".pub"), host.home / ".ssh" / "authorized_keys")
        self._install(host)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / "host_key"))
        (etc / "sshd_config").write_text(
            f"HostKey {etc}/host_key\nPermitRootLogin prohibit-password\nUsePAM no\n"
            "PasswordAuthentication no\nStrictModes no\nMaxStartups 100\nPidFile none\n"
        )
        others = [
            line for line in Path("/etc/passwd").read_text().splitlines() if "root:" not in line
        ]
        root = f"root:x:0:0:root:{host.home}:/bin/bash"
        (etc / "passwd").write_text("\n".join([root, *others]) + "\n")
        (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        sshd = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin")
        script = _INIT.format(etc=etc, shared=self.shared.parent, name=host.name, sshd=sshd)
        with (host.folder / "sshd.log").open("wb") as log:
            host.process = subprocess.Popen(
                [
                    *inside,
                    "unshare",
                    "--pid",
                    "--mount",
                    "--uts",
                    "--fork",
                    "--kill-child",
                    "/bin/sh",
                    "-c",
                    script,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
            )

    def _install(self, host: Host) -> None:
        """What setup_commands would have installed: this checkout's own environment, by links."""
        environment = host.home / "downpour" / "env"
        environment.mkdir(parents=True)
        for entry in Path(sys.prefix).iterdir():
            (environment / entry.name).symlink_to(entry)
        shutil.copy(ROOT / "requirements.lock", environment / "requirements.lock")


def checkout(destination: Path) -> Path:
    """A clean checkout of this repository as it stands, without anything that git ignores."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            target = destination / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return destination


@contextlib.contextmanager
def background(*command: str, cwd: Path, env: Mapping[str, str], log: Path) -> Iterator[None]:
    """A command of the laptop's user that runs while the context lasts."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def _answers(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=1) as connection:
            return connection.recv(4).startswith(b"SSH")
    except OSError:
        return False


def _ip(*arguments: str, check: bool = True) -> None:
    _run("ip", *arguments, check=check)


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stderr.strip()}")
