"""Simulate several hosts on one machine: each is a network namespace with its own address, /tmp, /dev/shm and Ray.

Needs root and iproute2 on Linux. Hosts cannot access each other's disks; they share an S3 server. Their network cables
(veth pairs on one bridge) can be unplugged.
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
"""Folders that each host mounts for itself."""


def unsupported_reason() -> str:
    """Why hosts cannot be simulated on this machine, in one line; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "hosts need Linux, root and iproute2"
    for path in (Path(__file__).resolve().parents[1], Path(sys.prefix), Path(sys.base_prefix)):
        for own in OWN_MOUNTS:
            if path.resolve().is_relative_to(own):
                return f"each host mounts its own {own}, which hides {path}; use a checkout elsewhere"
    done = subprocess.run(["ip", "netns", "add", "rlcprobe"], capture_output=True, text=True)
    sh("ip", "netns", "del", "rlcprobe", check=False)
    return "" if done.returncode == 0 else f"network namespaces cannot be created here ({done.stderr.strip()})"


def sh(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def wait_until(
    what: str, ready: Callable[[], bool], limit_s: float = 120.0, strict: bool = True, pause: float = 0.2
) -> float:
    """Call `ready`, which may raise, every `pause` seconds until it returns true; return the seconds waited.

    After `limit_s` raise TimeoutError if `strict`, otherwise return.
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
    """A host; `ray` is its process `ray start --block`."""

    name: str
    address: str
    folder: Path
    core: int = 0
    ray: subprocess.Popen[bytes] | None = None

    def pids(self, *words: str) -> list[int]:
        """Ids of the host's processes whose command line contains one of `words`; without words all."""
        pids = []
        for pid in sh("ip", "netns", "pids", self.name, check=False).split():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if not words or any(word in line for word in words):
                    pids.append(int(pid))
        return pids

    def kill(self, *words: str) -> int:
        """Send SIGKILL to `pids(*words)`; return their number."""
        pids = self.pids(*words)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def set_cable(self, plugged: bool) -> None:
        """Plug in the network cable, or unplug it."""
        sh("ip", "link", "set", f"v{self.name}", "up" if plugged else "down")


@dataclass
class Hosts:
    """The hosts (the first is the head) and their S3 server."""

    root: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    hosts: dict[str, Host] = field(default_factory=dict)
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def env(self) -> dict[str, str]:
        """Environment of a process that uses the cluster and S3."""
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
        """Start a host with Ray; the first is the head, others join it."""
        host = Host(f"rlc{name}", f"{NET}.{10 + number}", self.root / name)
        host.folder.mkdir()
        sh("ip", "netns", "add", host.name)
        sh("ip", "link", "add", f"v{host.name}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
        sh("ip", "link", "set", f"v{host.name}", "master", BRIDGE, "up")
        for words in (f"addr add {host.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            sh("ip", "-n", host.name, *words.split())
        role = ["--head", f"--port={HEAD_PORT}", f"--dashboard-host={host.address}", "--include-dashboard=true"]
        if self.hosts:
            role = [f"--address={NET}.10:{HEAD_PORT}"]
        busy = [other.core for other in self.hosts.values() if other.pids()]
        host.core = min(range(os.cpu_count() or 1), key=busy.count)
        start = f"taskset -c {host.core} {BIN}/ray start --block --node-ip-address={host.address} --num-cpus={cpus}"
        start += f" {' '.join(role)} --object-store-memory=200000000 --disable-usage-stats"
        sizes = zip(OWN_MOUNTS, (disk_mib, 600))
        mounts = " && ".join(f"mount -t tmpfs -o size={mib}m t {folder}" for folder, mib in sizes)
        log_file = host.folder / "ray.log"
        # On a busy machine `ray start` gives up after 30 s; a cluster's manager would start it again.
        again = f'while ! {start}; do tail -n 1 {log_file} | grep -q "timed out during startup" || exit 1; done'
        with log_file.open("wb") as log:
            host.ray = subprocess.Popen(
                ["ip", "netns", "exec", host.name, "unshare", "-m", "sh", "-c", f"{mounts} && {again}"],
                env=self.env() | {"HOME": str(host.folder)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.hosts[name] = host
        return host

    def address(self) -> str:
        """URL of the head's dashboard."""
        return f"http://{NET}.10:{DASHBOARD_PORT}"

    def get(self, path: str) -> dict:
        """JSON from the dashboard."""
        request = urllib.request.Request(self.address() + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=5) as response:
            return json.loads(response.read())

    def alive(self) -> dict[str, str]:
        """Address -> id of each live node."""
        rows = self.get("/api/v0/nodes")["data"]["result"]["result"]
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
    """Remove processes, namespaces and links that a killed run has left."""
    for process in psutil.process_iter(["cmdline"]):
        if any(GATEWAY in word or "flaky_proxy" in word for word in process.info["cmdline"] or []):
            process.kill()
    for name in [line.split()[0] for line in sh("ip", "netns", "list").splitlines() if line.startswith("rlc")]:
        Host(name, "", Path()).kill()
        delete(name)
    for link in json.loads(sh("ip", "-json", "link")):
        if link["ifname"].startswith("vrlc"):  # its namespace has lost its name but still has a process
            sh("ip", "link", "del", link["ifname"], check=False)
    sh("ip", "link", "del", BRIDGE, check=False)


def delete(name: str) -> None:
    """Delete a host's network namespace, and first its cable, which otherwise disappears some time later."""
    sh("ip", "link", "del", f"v{name}", check=False)
    sh("ip", "netns", "del", name, check=False)


@contextlib.contextmanager
def running_hosts(root: Path, cpus: dict[str, int]) -> Iterator[Hosts]:
    """Start hosts (name -> logical CPUs; the first is the head), and wait until all have joined the cluster."""
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
            wait_until(f"Ray on {name}", lambda at=host.address: at in hosts.alive())  # type: ignore[misc]
        yield hosts
    finally:
        hosts.close()
