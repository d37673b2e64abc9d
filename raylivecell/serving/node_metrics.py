"""Prometheus metrics of the service: its own, and those of Ray Serve on the machine that answers."""

import asyncio

import ray
import requests
from ray.util.metrics import Counter, Histogram

SECONDS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300]
PREFIXES = ("ray_serve_", "ray_raylivecell_serve_")


class Recorder:
    """Counts the requests of a process."""

    def __init__(self) -> None:
        self.requests = Counter("raylivecell_serve_requests", "Requests to /segment, by HTTP status.", ("status",))
        self.images = Counter("raylivecell_serve_images", "Segmented images.")
        self.seconds = Histogram("raylivecell_serve_seconds", "Seconds from a request to its answer.", SECONDS)

    def record(self, status: int, images: int, seconds: float) -> None:
        """Count a request to /segment."""
        self.requests.inc(1, {"status": str(status)})
        if images:
            self.images.inc(images)
        self.seconds.observe(seconds)


async def scrape() -> str:
    """The metrics of Ray Serve and of this service that Ray exports on this machine; OSError if it does not answer."""
    return await asyncio.to_thread(_scrape)


def _scrape() -> str:
    own = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == own)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with requests.Session() as session:
        session.trust_env = False  # no proxy: the address is this machine's
        text = session.get(url, timeout=10).text
    return "".join(line for line in text.splitlines(keepends=True) if _is_ours(line))


def _is_ours(line: str) -> bool:
    words = line.split(" ", 3)
    name = words[2] if line.startswith("#") and len(words) > 2 else line
    return name.startswith(PREFIXES)
