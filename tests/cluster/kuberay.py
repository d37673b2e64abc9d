"""Kubernetes documents for the tests: rendered overlays, their clusters, jobs and Pods, and broken variants."""

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from conftest import skip_or_fail

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())

Doc = dict[str, Any]
Rule = Callable[[list[Doc]], Iterator[str]]
"""Function from an overlay's documents to its errors."""

Breakage = tuple[Rule, str, dict[str, Any], str]
"""Check, `where` and `edits` of `broken`, and a part of the error."""

REMOVE = object()
"""Value in `broken` that removes the field."""


@functools.cache
def kubectl() -> str:
    """Path of a kubectl with kustomize 5; skip the test if there is none."""
    path = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    version = (
        path and subprocess.run([path, "version", "--client", "-o", "json"], capture_output=True, text=True).stdout
    )
    if not (path and version and json.loads(version).get("kustomizeVersion", "").startswith("v5")):
        skip_or_fail("no kubectl of 1.27 or later: `.venv/bin/python .ci/kubectl.py .venv/bin` fetches one")
    return path


def render_folder(folder: Path) -> list[Doc]:
    """The documents of an overlay at another place."""
    done = subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def _rendered(overlay: str) -> list[Doc]:
    return render_folder(FOLDER / "overlays" / overlay)


def render(overlay: str) -> list[Doc]:
    """The documents that `kubectl apply -k` would send to the cluster."""
    return copy.deepcopy(_rendered(overlay))


def broken(where: str, edits: Mapping[str, Any]) -> list[Doc]:
    """An overlay in which fields of one document are changed.

    Args:
        where: an overlay, to edit its Ray document; a kind of document in the overlay `cpu`; or "OVERLAY KIND NAME".
        edits: JSON pointer -> value, function of the present value, or REMOVE.
    """
    if where in OVERLAYS:
        overlay, kinds, name = where, {"RayCluster", "RayJob", "RayCronJob", "RayService"}, None
    else:
        overlay, kind, name = where.split() if " " in where else ("cpu", where, None)
        kinds = {kind}
    docs = render(overlay)
    for pointer, value in edits.items():
        node: Any = next(doc for doc in docs if doc["kind"] in kinds and name in (None, doc["metadata"]["name"]))
        *parents, last = (part.replace("~1", "/") for part in pointer.removeprefix("/").split("/"))
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[int(last) : int(last) + 1] = [] if value is REMOVE else [value]
        elif value is REMOVE:
            del node[last]
        else:
            node[last] = value(node[last]) if callable(value) else value
    return docs


class Job(NamedTuple):
    """A RayJob, or the job template of a RayCronJob."""

    name: str
    spec: Doc
    labels: Doc


class Service(NamedTuple):
    """A RayService."""

    name: str
    spec: Doc

    def config(self) -> Doc:
        """Configuration of Ray Serve; empty if it is not a YAML mapping."""
        try:
            config = yaml.safe_load(self.spec.get("serveConfigV2", ""))
        except yaml.YAMLError:
            config = None
        return config if isinstance(config, dict) else {}


class Cluster(NamedTuple):
    """A RayCluster, or the cluster template of a job or service."""

    name: str
    spec: Doc
    annotations: Doc
    job: Job | None = None
    service: Service | None = None

    def groups(self) -> list[Doc]:
        """Worker groups."""
        return self.spec.get("workerGroupSpecs", [])

    def pods(self) -> Iterator[tuple[str, Doc]]:
        """(name, group) of the head and of each worker group."""
        yield "head", self.spec["headGroupSpec"]
        yield from ((group["groupName"], group) for group in self.groups())

    def head_env(self) -> set[str]:
        """Names of the environment variables of the head's container."""
        containers = self.spec["headGroupSpec"]["template"]["spec"]["containers"]
        return {variable["name"] for variable in containers[0].get("env", [])} if containers else set()

    def version(self) -> tuple[int, ...]:
        """Ray's version."""
        return tuple(int(part) for part in re.findall(r"\d+", self.spec.get("rayVersion", "")))

    def autoscaled(self) -> bool:
        """Whether Ray's autoscaler sets the size."""
        return bool(self.spec.get("enableInTreeAutoscaling"))

    def autoscaled_v2(self) -> bool:
        """Whether it is autoscaler v2, the default since Ray 2.47."""
        version = self.spec.get("autoscalerOptions", {}).get("version")
        return self.autoscaled() and (version == "v2" or (version is None and self.version() >= (2, 47)))


def jobs(docs: list[Doc]) -> Iterator[Job]:
    """All jobs of an overlay."""
    for doc in docs:
        name, labels = doc["metadata"]["name"], doc["metadata"].get("labels", {})
        if doc["kind"] == "RayJob":
            yield Job(name, doc["spec"], labels)
        if doc["kind"] == "RayCronJob":
            yield Job(name, doc["spec"]["jobTemplate"], labels)


def services(docs: list[Doc]) -> Iterator[Service]:
    """All services of an overlay."""
    yield from (Service(doc["metadata"]["name"], doc["spec"]) for doc in docs if doc["kind"] == "RayService")


def clusters(docs: list[Doc]) -> Iterator[Cluster]:
    """All clusters of an overlay."""
    for doc in docs:
        if doc["kind"] == "RayCluster":
            yield Cluster(doc["metadata"]["name"], doc["spec"], doc["metadata"].get("annotations", {}))
    for service in services(docs):
        if "rayClusterConfig" in service.spec:
            yield Cluster(service.name, service.spec["rayClusterConfig"], {}, service=service)
    for job in jobs(docs):
        if "rayClusterSpec" in job.spec:
            yield Cluster(job.name, job.spec["rayClusterSpec"], {}, job=job)


class Pod(NamedTuple):
    """A Pod that the operator creates."""

    name: str
    spec: Doc
    labels: dict[str, str]
    ray: bool
    """Whether it is a Ray node; if so, `labels` include the operator's."""

    def ports(self) -> dict[str, int]:
        """Ports of the first container: name -> number."""
        return {port["name"]: port["containerPort"] for port in self.spec["containers"][0].get("ports", [])}


def pods(docs: list[Doc]) -> Iterator[Pod]:
    """One Pod of each kind in an overlay, including the jobs' submitters."""
    for cluster in clusters(docs):
        for name, group in cluster.pods():
            own = group["template"].get("metadata", {}).get("labels", {})
            operator = {"ray.io/node-type": "head" if name == "head" else "worker", "ray.io/cluster": cluster.name}
            yield Pod(name, group["template"]["spec"], own | group.get("labels", {}) | operator, True)
    for job in jobs(docs):
        template = job.spec.get("submitterPodTemplate", {"spec": {"containers": [], "volumes": []}})
        yield Pod("submitter", template["spec"], template.get("metadata", {}).get("labels", {}), False)
