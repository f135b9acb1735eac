"""Real sshds that stand for TPU VMs, each on a loopback address of its own, at port 22.

A VM is a mount, a PID and a UTS namespace: it has its own processes, host name, home of root, /tmp,
/run and /etc/ssh, and sees the rest of this machine's files. Its first process is a shell that
keeps an sshd running; when that shell is killed, the kernel kills all of the VM's processes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.agent.processes import descendants
from tests.testing.gangs import ROOT, wait_until
from tests.testing.tpu_api import TpuApi

_PORT = 22
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SSHD = re.compile(r"(/usr/sbin/)?sshd(-session|-auth)?\b")
_WAIT = "0.05"  # Seconds between looks of the first process while its sshd is not to run.
_CONFIG = """\
Port {port}
ListenAddress {address}
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/authorized_keys/%u
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
PidFile /run/sshd.pid
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
SetEnv PATH=/run/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
"""
_INIT = """\
set -e
echo {hostname} >/proc/sys/kernel/hostname
{mounts}
cd /
while :; do
  if [ ! -e /run/refuse ]; then /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config || :; fi
  sleep {wait}
done
"""


@dataclasses.dataclass
class _Vm:
    folder: Path
    process: subprocess.Popen[bytes]  # Outside; the first process within is its only child.
    first: int = 0  # That one's id, from outside.

    @property
    def listener(self) -> list[int]:
        """The sshd that listens, from outside."""
        children = Path(f"/proc/{self.first}/task/{self.first}/children").read_text().split()
        return [int(pid) for pid in children if "[listener]" in _command_line(int(pid))]


class TpuHosts:
    """VMs that can be booted at some addresses."""

    def __init__(self, root: Path, count: int, shared: Sequence[Path] = ()):
        """Choose addresses; nothing is booted.

        Args:
          root: for the VMs' files.
          count: of addresses.
          shared: folders that VMs see though they lie in this machine's home of root or /tmp. The
            running Python's and this repository always are.
        """
        self.addresses = _free_addresses(count)
        self._root = root
        self._shared = [Path(sys.prefix), Path(sys.base_prefix), ROOT, *shared]
        self._vms: dict[str, _Vm] = {}
        self._folders: dict[str, Path] = {}
        # VMs die with the thread that has started them: one that lives as long as this process.
        self._starter = concurrent.futures.ThreadPoolExecutor(1, "tpu-hosts")

    def boot(self, address: str, hostname: str | None = None) -> None:
        """Boot a new VM with empty disks and a host key of its own; wait for its sshd."""
        self.boot_all({address: hostname or f"t1v-n-{secrets.token_hex(4)}-w-0"})

    def boot_all(self, hostnames: Mapping[str, str]) -> None:
        """Boot a VM at each of these addresses."""
        for address, hostname in hostnames.items():
            self.down(address)
            folder = self._make_disks(address)
            self._folders[address] = folder
            names = f"127.0.0.1 localhost\n{address} {hostname}\n"
            (folder / "hosts").write_text(names)
            process = self._starter.submit(self._start, folder, hostname).result()
            self._vms[address] = _Vm(folder, process)
        for address in hostnames:
            vm = self._vms[address]
            self._wait_for(address, True)
            vm.first = descendants(vm.process.pid)[0]

    def down(self, address: str) -> None:
        """Cut a VM's power: all of its processes are gone. Its files stay until it boots again."""
        vm = self._vms.pop(address, None)
        if vm:
            os.kill(vm.first or vm.process.pid, signal.SIGKILL)
            vm.process.wait()

    def install(self, address: str, name: str, text: str) -> None:
        """Put a program where a VM finds it first."""
        path = self._vms[address].folder / "run" / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def running(self) -> list[str]:
        """The addresses of VMs that are on."""
        return list(self._vms)

    def set_keys(self, address: str, text: str) -> None:
        """Let in who has one of these keys: lines `user:key`, as `ssh-keys` metadata has them."""
        keys: dict[str, str] = {}
        for line in text.splitlines():
            user, found, key = line.strip().partition(":")
            if found and re.fullmatch(r"[\w.-]+", user):
                keys[user] = keys.get(user, "") + key + "\n"
        folder = self._vms[address].folder / "etc" / "authorized_keys"
        for user in {*keys, *(path.name for path in folder.iterdir())}:
            new = folder.parent / f"{user}.new"
            new.write_text(keys.get(user, ""))
            new.replace(folder / user)  # At once: an sshd may be reading it.

    def public_host_key(self, address: str) -> str:
        """A VM's host key, as known_hosts files have it after the name."""
        return (self._folders[address] / "etc" / "ssh_host_ed25519_key.pub").read_text().strip()

    def refuse(self, address: str, refused: bool) -> None:
        """Let a VM's sshd listen no more, or again. Connections and processes stay."""
        vm = self._vms[address]
        sign = vm.folder / "run" / "refuse"
        if refused:
            sign.touch()
            for pid in vm.listener:
                os.kill(pid, signal.SIGKILL)
        else:
            sign.unlink(missing_ok=True)
        self._wait_for(address, not refused)

    def cut_connections(self, address: str) -> None:
        """Kill the sshds of open connections; what was started through them lives on."""
        listener = self._vms[address].listener
        for pid, command in self.processes(address):
            if _SSHD.match(command) and pid not in listener:
                _kill(pid, signal.SIGKILL)

    def freeze(self, address: str, frozen: bool) -> None:
        """Stop all of a VM's processes where they are, or let them go on."""
        done: set[int] = set()
        while new := {pid for pid, _ in self.processes(address)} - done:
            for pid in new:
                _kill(pid, signal.SIGSTOP if frozen else signal.SIGCONT)
            done |= new

    def processes(self, address: str) -> list[tuple[int, str]]:
        """All of a VM's processes: ids outside of its namespace, and command lines."""
        vm = self._vms.get(address)
        if vm is None or not vm.first:  # Off, or not yet up.
            return []
        namespace = os.readlink(f"/proc/{vm.first}/ns/pid")
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                        found.append((int(name), _command_line(int(name))))
        return found

    def jobs(self, address: str) -> list[tuple[int, str]]:
        """Those of its processes that are not the VM's own: neither the first one nor sshds."""
        own = (f"sleep {_WAIT}", "")
        return [
            (pid, command)
            for pid, command in self.processes(address)
            if pid != self._vms[address].first and not _SSHD.match(command) and command not in own
        ]

    def home(self, address: str) -> Path:
        """The home of root of the VM that is or was last at this address, from outside."""
        return self._folders[address] / "home"

    def log(self, address: str) -> str:
        """What a VM's sshd has said."""
        return (self._folders[address] / "log").read_text(errors="replace")

    def close(self) -> None:
        """Power everything off."""
        for address in list(self._vms):
            self.down(address)
        self._starter.shutdown()

    def _make_disks(self, address: str) -> Path:
        folder = self._root / f"{address}-{secrets.token_hex(4)}"
        for name in ("home", "tmp", "run/sshd", "run/bin", "etc/authorized_keys"):
            (folder / name).mkdir(parents=True)
        (folder / "home").chmod(0o700)
        (folder / "tmp").chmod(0o1777)
        # Where root's account is locked, sshd would let nobody in.
        (folder / "shadow").write_text("root:*:20000:0:99999:7:::\n")
        config = folder / "etc" / "sshd_config"
        config.write_text(_CONFIG.format(port=_PORT, address=address))
        key = folder / "etc" / "ssh_host_ed25519_key"
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)]
        subprocess.run(make, check=True, stdin=subprocess.DEVNULL, timeout=30)
        return folder

    def _start(self, folder: Path, hostname: str) -> subprocess.Popen[bytes]:
        mounts = []
        for name, there in (("home", "/root"), ("tmp", "/tmp")):
            for path in self._shared:
                if path.is_relative_to(there):
                    inside = folder / name / path.relative_to(there)
                    mounts.append(["mkdir", "-p", str(inside)])
                    mounts.append(["mount", "--rbind", str(path), str(inside)])
        private = [("etc", "/etc/ssh"), ("shadow", "/etc/shadow"), ("run", "/run")]
        private.append(("hosts", "/etc/hosts"))
        private += [("home", "/root"), ("tmp", "/tmp")]
        private.sort(key=lambda one: folder.is_relative_to(one[1]))  # What hides the folder: last.
        mounts += [["mount", "--rbind", str(folder / name), there] for name, there in private]
        lines = "\n".join(map(shlex.join, mounts))
        script = folder / "init"
        script.write_text(_INIT.format(hostname=hostname, mounts=lines, wait=_WAIT))
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
        with open(folder / "log", "ab") as log:
            # By setpriv, since Python's preexec_fn is not safe in a process with threads.
            return subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "unshare", *namespaces, "sh", str(script)],
                env={"PATH": _PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for(self, address: str, open_: bool) -> None:
        """Wait until a VM takes connections, or refuses them."""
        process = self._vms[address].process

        def there() -> bool:
            assert process.poll() is None, f"the VM of {address} died: {self.log(address)}"
            with socket.socket() as probe:
                return (probe.connect_ex((address, _PORT)) == 0) is open_

        wait_until(there, f"port {_PORT} of {address} to be {'open' if open_ else 'closed'}", 20)


def attach(api: TpuApi, hosts: TpuHosts) -> None:
    """Let the nodes of the API have VMs."""

    def boot(_: str, addresses: list[str]) -> None:
        stem = f"t1v-n-{secrets.token_hex(4)}"
        hosts.boot_all({address: f"{stem}-w-{i}" for i, address in enumerate(addresses)})
        api.host_keys.update({address: hosts.public_host_key(address) for address in addresses})

    def down(_: str, addresses: list[str]) -> None:
        for address in addresses:
            hosts.down(address)

    def keys(_: str, addresses: list[str], text: str) -> None:
        for address in addresses:
            hosts.set_keys(address, text)

    api.on_boot, api.on_down, api.on_keys = boot, down, keys


def _free_addresses(count: int) -> list[str]:
    """Loopback addresses with nobody at port 22, others in each process."""
    pid = os.getpid()
    base = f"127.{16 + (pid >> 8) % 128}.{pid % 256}"
    addresses = [f"{base}.{11 + i}" for i in range(count)]
    for address in addresses:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, _PORT))
    return addresses


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b" ".join(words).decode(errors="replace").strip()
    return ""


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
