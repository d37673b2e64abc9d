"""Kubernetes documents as tests read them: overlays, their clusters, jobs and Pods; and how to break one."""

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
from conftest import missing

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())

Doc = dict[str, Any]
Rule = Callable[[list[Doc]], Iterator[str]]
"""Takes an overlay's documents and gives what is wrong with them."""

REMOVE = object()
"""As a value in `broken`: take the field away."""


@functools.cache
def kubectl() -> str:
    """A kubectl whose kustomize is of version 5, the test skipped where there is none."""
    found = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    told = found and subprocess.run([found, "version", "--client", "-o", "json"], capture_output=True, text=True).stdout
    if not (found and told and json.loads(told).get("kustomizeVersion", "").startswith("v5")):
        missing("no kubectl of 1.27 or later: `.venv/bin/python .ci/kubectl.py .venv/bin` fetches one")
    return found


@functools.cache
def _rendered(overlay: str) -> list[Doc]:
    done = subprocess.run([kubectl(), "kustomize", FOLDER / "overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return list(yaml.safe_load_all(done.stdout))


def render(overlay: str) -> list[Doc]:
    """What `kubectl apply -k` would send to the cluster."""
    return copy.deepcopy(_rendered(overlay))


def broken(where: str, edits: Mapping[str, Any]) -> list[Doc]:
    """An overlay with fields of a document set, each by its JSON pointer.

    Args:
        where: an overlay, whose Ray document is meant; or a kind of document of the overlay cpu.
        edits: pointers and values.
    """
    kinds = {where} if where not in OVERLAYS else {"RayCluster", "RayJob", "RayCronJob"}
    docs = render(where if where in OVERLAYS else "cpu")
    for pointer, value in edits.items():
        place: Any = next(doc for doc in docs if doc["kind"] in kinds)
        *way, last = (part.replace("~1", "/") for part in pointer.removeprefix("/").split("/"))
        for part in way:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if isinstance(place, list):
            place[int(last) : int(last) + 1] = [] if value is REMOVE else [value]
        elif value is REMOVE:
            del place[last]
        else:
            place[last] = value
    return docs


class Job(NamedTuple):
    """A RayJob, or what a RayCronJob makes one of."""

    name: str
    spec: Doc
    labels: Doc


class Cluster(NamedTuple):
    """A RayCluster, or what a job makes one of."""

    name: str
    spec: Doc
    annotations: Doc
    job: Job | None

    def groups(self) -> list[Doc]:
        """Its worker groups."""
        return self.spec.get("workerGroupSpecs", [])

    def pods(self) -> Iterator[tuple[str, Doc]]:
        """Each group's name and itself, the head's too."""
        yield "head", self.spec["headGroupSpec"]
        yield from ((group["groupName"], group) for group in self.groups())

    def head_env(self) -> set[str]:
        """Names of the variables of the head's container."""
        containers = self.spec["headGroupSpec"]["template"]["spec"]["containers"]
        return {one["name"] for one in containers[0].get("env", [])} if containers else set()

    def version(self) -> tuple[int, ...]:
        """Of Ray."""
        return tuple(int(part) for part in re.findall(r"\d+", self.spec.get("rayVersion", "")))

    def autoscaled(self) -> bool:
        """Whether Ray's autoscaler sets the size."""
        return bool(self.spec.get("enableInTreeAutoscaling"))

    def autoscaled_v2(self) -> bool:
        """Whether that is version 2, the default since Ray 2.47."""
        named = self.spec.get("autoscalerOptions", {}).get("version")
        return self.autoscaled() and (named == "v2" or (named is None and self.version() >= (2, 47)))


def jobs(docs: list[Doc]) -> Iterator[Job]:
    """Every job in an overlay."""
    for doc in docs:
        name, labels = doc["metadata"]["name"], doc["metadata"].get("labels", {})
        if doc["kind"] == "RayJob":
            yield Job(name, doc["spec"], labels)
        if doc["kind"] == "RayCronJob":
            yield Job(name, doc["spec"]["jobTemplate"], labels)


def clusters(docs: list[Doc]) -> Iterator[Cluster]:
    """Every cluster in an overlay."""
    for doc in docs:
        if doc["kind"] == "RayCluster":
            yield Cluster(doc["metadata"]["name"], doc["spec"], doc["metadata"].get("annotations", {}), None)
    for job in jobs(docs):
        if "rayClusterSpec" in job.spec:
            yield Cluster(job.name, job.spec["rayClusterSpec"], {}, job)


class Pod(NamedTuple):
    """A Pod that the operator makes."""

    name: str
    spec: Doc
    labels: dict[str, str]
    ray: bool
    """Whether a node of Ray, with the operator's labels beside its own."""

    def ports(self) -> dict[str, int]:
        """Of its first container, by name."""
        return {one["name"]: one["containerPort"] for one in self.spec["containers"][0].get("ports", [])}


def pods(docs: list[Doc]) -> Iterator[Pod]:
    """Every kind of Pod of an overlay, the jobs' submitters too."""
    for cluster in clusters(docs):
        for name, group in cluster.pods():
            own = group["template"].get("metadata", {}).get("labels", {})
            given = {"ray.io/node-type": "head" if name == "head" else "worker", "ray.io/cluster": cluster.name}
            yield Pod(name, group["template"]["spec"], own | group.get("labels", {}) | given, True)
    for job in jobs(docs):
        template = job.spec.get("submitterPodTemplate", {"spec": {"containers": [], "volumes": []}})
        yield Pod("submitter", template["spec"], template.get("metadata", {}).get("labels", {}), False)
