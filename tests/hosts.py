"""Several hosts on one machine: each a network namespace with its own address, its own /tmp and /dev/shm, its own Ray.

Needs root and iproute2 on Linux. What one host writes to its disk no other sees; they share the S3 server that runs
beside them, and their cables (veth pairs at one bridge) can be pulled.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

BRIDGE, NET = "rlcbr", "10.77.0"
GATEWAY = f"{NET}.1"
HEAD_PORT, DASHBOARD_PORT, S3_PORT, PROXY_PORT = 6379, 8265, 5555, 5556
BIN = Path(sys.executable).parent
OWN_MOUNTS = ("/tmp", "/dev/shm")
"""What each host mounts for itself."""


def possible() -> str:
    """Why there can be no hosts here, in one line; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "they need Linux, root and iproute2"
    for path in (Path(__file__).resolve().parents[1], Path(sys.prefix), Path(sys.base_prefix)):
        for own in OWN_MOUNTS:
            if path.resolve().is_relative_to(own):
                return f"each host mounts a {own} of its own and would not see {path}; use a checkout elsewhere"
    tried = subprocess.run(["ip", "netns", "add", "rlcprobe"], capture_output=True, text=True)
    sh("ip", "netns", "del", "rlcprobe", check=False)
    return "" if tried.returncode == 0 else f"this system lets no network namespace be made ({tried.stderr.strip()})"


def sh(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def until(
    what: str, ready: Callable[[], bool], limit_s: float = 120.0, strict: bool = True, pause: float = 0.2
) -> float:
    """Ask `ready`, which may raise, each `pause` seconds until it is so; the seconds it took.

    Not `strict`: or until `limit_s` are over.
    """
    begin = time.monotonic()
    while time.monotonic() - begin < limit_s:
        with contextlib.suppress(OSError, ValueError, LookupError):
            if ready():
                return time.monotonic() - begin
        threading.Event().wait(pause)
    if strict:
        raise TimeoutError(f"{what}: not within {limit_s:g} s")
    return limit_s


@dataclass
class Host:
    """One of the hosts; `ray` is its foreground `ray start`."""

    name: str
    address: str
    folder: Path
    core: int = 0
    ray: subprocess.Popen[bytes] | None = None

    def pids(self, *words: str) -> list[int]:
        """Processes in the host whose command line holds one of the words (any, without)."""
        found = []
        for pid in sh("ip", "netns", "pids", self.name, check=False).split():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if not words or any(word in line for word in words):
                    found.append(int(pid))
        return found

    def kill(self, *words: str) -> int:
        """SIGKILL; how many were hit."""
        hit = self.pids(*words)
        for pid in hit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(hit)

    def cable(self, plugged: bool) -> None:
        """Pull the network cable, or plug it in."""
        sh("ip", "link", "set", f"v{self.name}", "up" if plugged else "down")


@dataclass
class Hosts:
    """The hosts, one of them the head, and an S3 server that all reach."""

    root: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    hosts: dict[str, Host] = field(default_factory=dict)
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def env(self) -> dict[str, str]:
        """What a process needs to speak with the cluster and S3."""
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        return (
            inherited
            | keys
            | {
                "AWS_ENDPOINT_URL": f"http://{GATEWAY}:{PROXY_PORT}",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": self.token,
                "RAY_USAGE_STATS_ENABLED": "0",
                "OMP_NUM_THREADS": "1",
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "PYTHONUNBUFFERED": "1",
            }
        )

    def start_host(self, name: str, number: int, cpus: int, disk_mib: int = 4096) -> Host:
        """A host with Ray on it, which joins the first one's cluster."""
        host = Host(f"rlc{name}", f"{NET}.{10 + number}", self.root / name)
        host.folder.mkdir()
        sh("ip", "netns", "add", host.name)
        sh("ip", "link", "add", f"v{host.name}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
        sh("ip", "link", "set", f"v{host.name}", "master", BRIDGE, "up")
        for words in (f"addr add {host.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            sh("ip", "-n", host.name, *words.split())
        place = ["--head", f"--port={HEAD_PORT}", f"--dashboard-host={host.address}", "--include-dashboard=true"]
        if self.hosts:
            place = [f"--address={NET}.10:{HEAD_PORT}"]
        busy = [one.core for one in self.hosts.values() if one.pids()]
        host.core = min(range(os.cpu_count() or 1), key=busy.count)
        start = f"taskset -c {host.core} {BIN}/ray start --block --node-ip-address={host.address} --num-cpus={cpus}"
        start += f" {' '.join(place)} --object-store-memory=200000000 --disable-usage-stats"
        sizes = zip(OWN_MOUNTS, (disk_mib, 600))
        mounts = " && ".join(f"mount -t tmpfs -o size={mib}m t {folder}" for folder, mib in sizes)
        with open(host.folder / "ray.log", "wb") as log:
            host.ray = subprocess.Popen(
                ["ip", "netns", "exec", host.name, "unshare", "-m", "sh", "-c", f"{mounts} && exec {start}"],
                env=self.env() | {"HOME": str(host.folder)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.hosts[name] = host
        return host

    def address(self) -> str:
        """The head's dashboard."""
        return f"http://{NET}.10:{DASHBOARD_PORT}"

    def ask(self, path: str) -> dict:
        """JSON of the dashboard."""
        asked = urllib.request.Request(self.address() + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return json.loads(answer.read())

    def alive(self) -> dict[str, str]:
        """Address -> node id of the living nodes."""
        rows = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        return {row["node_ip"]: row["node_id"] for row in rows if row["state"] == "ALIVE"}

    def serve(self, *words: str) -> subprocess.Popen[bytes]:
        with open(self.root / f"server{len(self.servers)}.log", "wb") as log:
            server = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        self.servers.append(server)
        return server

    def close(self) -> None:
        for host in self.hosts.values():
            host.kill()
            if host.ray:
                host.ray.wait()
            delete(host.name)
        for server in self.servers:
            server.kill()
            server.wait()
        sh("ip", "link", "del", BRIDGE, check=False)


def _clear() -> None:
    """What a killed run has left."""
    for one in psutil.process_iter(["cmdline"]):
        if any(GATEWAY in word or "flaky_proxy" in word for word in one.info["cmdline"] or []):
            one.kill()
    for name in [line.split()[0] for line in sh("ip", "netns", "list").splitlines() if line.startswith("rlc")]:
        Host(name, "", Path()).kill()
        delete(name)
    for link in json.loads(sh("ip", "-json", "link")):
        if link["ifname"].startswith("vrlc"):  # of a network whose name is gone, but not its last process
            sh("ip", "link", "del", link["ifname"], check=False)
    sh("ip", "link", "del", BRIDGE, check=False)


def delete(name: str) -> None:
    """A host's network; its cable by itself, which else goes some time after the rest."""
    sh("ip", "link", "del", f"v{name}", check=False)
    sh("ip", "netns", "del", name, check=False)


@contextlib.contextmanager
def running(root: Path, cpus: dict[str, int]) -> Iterator[Hosts]:
    """Hosts of so many logical CPUs, the first of them the head; up when all have joined, gone afterwards."""
    _clear()
    hosts = Hosts(root)
    try:
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        hosts.serve(str(BIN / "moto_server"), "-H", GATEWAY, "-p", str(S3_PORT))
        hosts.serve(sys.executable, str(Path(__file__).with_name("flaky_proxy.py")), str(root / "s3-is-down"))
        for number, (name, count) in enumerate(cpus.items()):
            host = hosts.start_host(name, number, count)
            until(f"Ray on {name}", lambda at=host.address: at in hosts.alive())  # type: ignore[misc]
        yield hosts
    finally:
        hosts.close()
