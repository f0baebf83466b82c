"""Machines on a network of their own, made of Linux namespaces: they can be unplugged and powered off.

Nothing of the host's network is touched: the switch is a bridge in a namespace, too. A machine ends with the process
that made it, however that ends, and leaves nothing.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support.places import ROOT

Environment = Mapping[str, str] | None
SPACES = ["--net", "--mount", "--uts", "--pid"]
HOME = Path("/tmp/ray")
"""Private directory of each machine, as /dev/shm; all other directories are shared, like a network disk."""
UP_SECONDS = 300
SETUP = """
mount -t tmpfs tmpfs "$2"
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --bind "$1" /etc/hosts
hostname "$0"
ip link set lo up
echo up
cat >/dev/null  # until the other end is closed
true            # or the shell would give its place to cat, which does not bury orphans
"""


def why_no_machines() -> str:
    """Why machines cannot be made here; empty where they can."""
    try:
        command = ["unshare", *SPACES, "--fork", "--mount-proc", "ip", "link", "add", "type", "bridge"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return f"{error.filename} not installed"
    return f"namespaces are not permitted: {done.stderr.strip()}" if done.returncode else ""


class Machine:
    """Network, processes, host name and scratch space of its own; disks and everything else are the host's."""

    def __init__(self, name: str, hosts: Path, logs: Path) -> None:
        """
        Args:
            name: its host name.
            hosts: what stands for its /etc/hosts.
            logs: directory for what its programs print.
        """
        self.name = name
        self.log = logs / f"{name}.log"
        HOME.mkdir(exist_ok=True)
        command = ["unshare", *SPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-ec", SETUP]
        self._shell = subprocess.Popen(
            [*command, name, str(hosts), str(HOME)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._shell.stdout is not None
        assert self._shell.stdout.readline() == "up\n"
        pid = self._shell.pid
        self.init = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def start(self, *command: str, environment: Environment = None, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a program, whose output goes to `log`, or to the machine's. It leads a process group."""
        with open(log or self.log, "ab") as file:
            return subprocess.Popen(
                self._inside(command, environment), stdout=file, stderr=file, start_new_session=True
            )

    def keep_running(self, *command: str, environment: Environment = None) -> None:
        """Start a program, and again whenever it ends, as an init system or a container engine does."""
        self.start("sh", "-c", 'while :; do "$@"; sleep 1; done', self.name, *command, environment=environment)

    def run(self, *command: str, environment: Environment = None) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return subprocess.run(self._inside(command, environment), capture_output=True, text=True, check=False)

    def wait_for(self, *command: str, environment: Environment = None) -> None:
        """Return when a program ends well, which is tried again and again."""
        end = time.monotonic() + UP_SECONDS
        while (done := self.run(*command, environment=environment)).returncode:
            assert time.monotonic() < end, f"{command} on {self.name}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
            time.sleep(0.5)

    def power_off(self) -> None:
        """End everything on it without notice; its network goes with it."""
        self._shell.kill()
        self._shell.communicate()

    def _inside(self, command: tuple[str, ...], environment: Environment) -> list[str]:
        """The command line that runs a program in the repository on this machine, with this Python and nothing else of
        this process's environment."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {"PATH": path, "HOME": str(HOME), "TMPDIR": str(HOME), "LANG": "C.UTF-8"}
        enter = ["nsenter", f"--target={self.init}", *SPACES, "env", "--ignore-environment", f"--chdir={ROOT}"]
        return [*enter, *(f"{name}={value}" for name, value in (variables | dict(environment or {})).items()), *command]


class Network:
    """A switch, and machines that know each other by name."""

    SUBNET = "10.77.0"

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: for the names of machines, and their logs.
        """
        self.directory = directory
        self.machines: dict[str, Machine] = {}
        self._hosts = directory / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        self._switch = Machine("switch", self._hosts, directory)
        self._ip(self._switch, "link add bridge type bridge")
        self._ip(self._switch, "link set bridge up")

    def add(self, name: str) -> Machine:
        """A new machine, plugged in."""
        machine = self.machines[name] = Machine(name, self._hosts, self.directory)
        with open(self._hosts, "a") as hosts:
            hosts.write(f"{self.address(name)} {name}\n")
        self._ip(self._switch, f"link add {name} type veth peer name eth0 netns {machine.init}")
        self._ip(self._switch, f"link set {name} master bridge up")
        self._ip(machine, f"address add {self.address(name)}/24 dev eth0")
        self._ip(machine, "link set eth0 up")
        return machine

    def address(self, name: str) -> str:
        """IP address of a machine."""
        return f"{self.SUBNET}.{list(self.machines).index(name) + 1}"

    def unplug(self, name: str) -> None:
        """Packets from and to a machine are lost from now on; it runs on, and nobody is told."""
        self._ip(self._switch, f"link set {name} nomaster")

    def plug_in(self, name: str) -> None:
        """The end of that."""
        self._ip(self._switch, f"link set {name} master bridge")

    def close(self) -> None:
        """End all machines."""
        for machine in (*self.machines.values(), self._switch):
            machine.power_off()

    @staticmethod
    def _ip(machine: Machine, arguments: str) -> None:
        # Only the network: a new cable's other end is named by a process id of the host.
        command = ["nsenter", f"--target={machine.init}", "--net", "ip", *arguments.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {arguments}: {done.stderr}"
