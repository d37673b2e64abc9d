"""What cluster/kubernetes promises beyond what Kubernetes and KubeRay ask for: rights, sizes, pools, network.

Promises are rules as those of kuberay_rules.py are.
"""

import re
from collections.abc import Iterator

import ray._private.ray_constants as ray_constants
import yaml
from kuberay import FOLDER, Doc, Rule, clusters, jobs, pods
from kuberay_rules import QUEUE
from network_policy import Peer, admits

NAMESPACE = yaml.safe_load((FOLDER / "namespace.yaml").read_text())["metadata"]["name"]
LOCKED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
USER = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
SPOT = {"karpenter.sh/capacity-type", "eks.amazonaws.com/capacityType", "cloud.google.com/gke-spot"}
SPOT |= {"kubernetes.azure.com/scalesetpriority"}
# Between the end of draining and the kill.
MARGIN_S = 10
UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}


def _amount(quantity: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi|)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def namespace(docs: list[Doc]) -> Iterator[str]:
    for doc in docs:
        if doc["metadata"].get("namespace") != NAMESPACE:
            yield f"{doc['kind']} {doc['metadata']['name']} outside {NAMESPACE}"


def no_rights(docs: list[Doc]) -> Iterator[str]:
    for pod in pods(docs):
        if pod.spec.get("securityContext") != USER:
            yield f"{pod.name}: securityContext of the Pod"
        if not pod.spec["containers"]:
            yield f"{pod.name}: the operator's own Pod has more rights"
        if any(one.get("securityContext") != LOCKED for one in pod.spec["containers"]):
            yield f"{pod.name}: securityContext of a container"
        if {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec) or any(
            "hostPath" in one for one in pod.spec["volumes"]
        ):
            yield f"{pod.name}: reaches into its host"
    for cluster in clusters(docs):
        if cluster.autoscaled() and cluster.spec.get("autoscalerOptions", {}).get("securityContext") != LOCKED:
            yield f"{cluster.name}: securityContext of the autoscaler"


def writable(docs: list[Doc]) -> Iterator[str]:
    """The root is read-only: Ray writes to /tmp, programs to HOME, objects to shared memory."""
    for pod in pods(docs):
        volumes = {one["name"]: one.get("emptyDir") for one in pod.spec.get("volumes", [])}
        for one in pod.spec["containers"]:
            mounted = {mount["mountPath"]: volumes.get(mount["name"]) for mount in one.get("volumeMounts", [])}
            for path in ("/tmp", "/home/ray", *(["/dev/shm"] if pod.ray else [])):
                if not mounted.get(path):
                    yield f"{pod.name}: nothing to write on at {path}"
            if pod.ray and (mounted.get("/dev/shm") or {}).get("medium") != "Memory":
                yield f"{pod.name}: /dev/shm is no memory"
    for cluster in clusters(docs):
        mounts = cluster.spec.get("autoscalerOptions", {}).get("volumeMounts", [])
        if cluster.autoscaled() and {"name": "tmp", "mountPath": "/tmp"} not in mounts:
            yield f"{cluster.name}: nothing to write on for the autoscaler"


def bounded(docs: list[Doc]) -> Iterator[str]:
    """What is asked for is what may be had, so that a full node kills nobody who keeps to it."""
    for pod in pods(docs):
        for one in pod.spec["containers"]:
            limits = one.get("resources", {}).get("limits", {})
            if not {"cpu", "memory"} <= set(limits) or limits != one["resources"].get("requests"):
                yield f"{pod.name}: requests and limits of CPU and memory differ or are missing"
                continue
            shared = [one["emptyDir"] for one in pod.spec["volumes"] if one["emptyDir"].get("medium") == "Memory"]
            # Ray takes 30 % of the memory for objects, and they lie there.
            for volume in shared:
                part = _amount(volume.get("sizeLimit", "0")) / _amount(limits["memory"])
                if not 0.3 <= part <= 0.5:
                    yield f"{pod.name}: shared memory of {part:.0%} of its memory"
        if not all(one["emptyDir"].get("sizeLimit") for one in pod.spec["volumes"]):
            yield f"{pod.name}: a volume without a sizeLimit"


def idle_head(docs: list[Doc]) -> Iterator[str]:
    """The head has no CPUs to give, and does not lie on a node that may go away."""
    for cluster in clusters(docs):
        if cluster.spec["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
            yield f"{cluster.name}: tasks would run on the head"
    for pod in pods(docs):
        if pod.name == "head":
            affinity = pod.spec.get("affinity", {}).get("nodeAffinity", {})
            terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
            kept_off = [
                {one["key"] for one in term["matchExpressions"] if one["operator"] == "NotIn"} for term in terms
            ]
            if not kept_off or any(SPOT - off for off in kept_off):
                yield "head: may come to lie on a spot node"


def pools(docs: list[Doc]) -> Iterator[str]:
    """Each pool is told apart by a label, stays within its bounds and has time to drain."""
    for cluster in clusters(docs):
        told = [group.get("labels", {}).get("ray-subcluster") for group in cluster.groups()]
        if None in told or len(set(told)) != len(told):
            yield f"{cluster.name}: pools without a label of their own: {told}"
        for group in cluster.groups():
            name, spec = group["groupName"], group["template"]["spec"]
            env = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
            drain = env.get(
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
            )
            if spec.get("terminationGracePeriodSeconds", 30) < float(drain) + MARGIN_S:
                yield f"{name}: killed within {float(drain):g} s of draining"
            if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                yield f"{name}: {group['replicas']} replicas"
            gpus = spec["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
            if (gpus is not None) != (told[cluster.groups().index(group)] == "training"):
                yield f"{name}: GPUs are for training, {gpus} here"
            if gpus is not None:
                yield from (f"{name}: {told}" for told in _spot(spec))


def _spot(spec: Doc) -> Iterator[str]:
    tolerated = {one["key"] for one in spec.get("tolerations", [])}
    for key in {
        "nvidia.com/gpu",
        "spot",
        "cloud.google.com/gke-spot",
        "kubernetes.azure.com/scalesetpriority",
    } - tolerated:
        yield f"does not tolerate {key}"
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    wished = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    asked = {one["key"] for term in wished for one in term["preference"]["matchExpressions"]}
    yield from (f"does not prefer {key}" for key in SPOT - asked)


def sized_by(docs: list[Doc]) -> Iterator[str]:
    """By the autoscaler, or by the queue's quota."""
    for cluster in clusters(docs):
        if not cluster.autoscaled_v2() and not (cluster.job and QUEUE in cluster.job.labels):
            yield f"{cluster.name}: neither autoscaler v2 nor a queue"


def secrets(docs: list[Doc]) -> Iterator[str]:
    """Token authentication, and no secret in the manifests."""
    for cluster in clusters(docs):
        options = cluster.spec.get("authOptions", {})
        if options.get("mode") != "token" or not options.get("secretName"):
            yield f"{cluster.name}: no token asked for, or one that the operator would make"
        redis = cluster.spec.get("gcsFaultToleranceOptions")
        if redis and set(redis.get("redisPassword", {}).get("valueFrom", {})) != {"secretKeyRef"}:
            yield f"{cluster.name}: Redis' password is not a Secret's"
    for pod in pods(docs):
        for one in (env for container in pod.spec["containers"] for env in container.get("env", [])):
            if re.search("TOKEN|SECRET|PASSW|KEY|CREDENTIAL", one["name"]):
                yield f"{pod.name}: {one['name']} in the manifest"
    yield from (f"Secret {doc['metadata']['name']} in the manifests" for doc in docs if doc["kind"] == "Secret")


def credentials(docs: list[Doc]) -> Iterator[str]:
    """The object store knows the Pods by a service account; the API server is for the head's autoscaler."""
    accounts = {doc["metadata"]["name"]: doc["metadata"] for doc in docs if doc["kind"] == "ServiceAccount"}
    for pod in pods(docs):
        if pod.ray and not accounts.get(pod.spec.get("serviceAccountName", "default"), {}).get("annotations"):
            yield f"{pod.name}: no service account that the object store knows"
        if pod.name != "head" and pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: holds a token of the API server"


# What lies around a Pod: who, and at which of PORTS each may reach it, or it them.
PORTS = (22, 53, 80, 443, 6379, 6443, 8080, 8265, 10001, 44217, 44227, 52365)
PROMETHEUS = Peer("Prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"})
OPERATOR = Peer("the operator", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
STRANGERS = (
    Peer("a neighbour", NAMESPACE, {"app": "other"}),
    Peer("another's Ray", "elsewhere", {"app.kubernetes.io/part-of": "raylivecell"}),
    Peer("a false Prometheus", "elsewhere", {"app.kubernetes.io/name": "prometheus"}),
    Peer("a false operator", "elsewhere", {"app.kubernetes.io/name": "kuberay-operator"}),
    Peer("the internet", address="52.216.0.1"),
)
INTO = ((PROMETHEUS, {8080, 44217, 44227}), (OPERATOR, {8265}), *((one, set[int]()) for one in STRANGERS))
DNS = Peer("DNS", "kube-system", {"k8s-app": "kube-dns"})


def network(docs: list[Doc]) -> Iterator[str]:
    """Who speaks to whom, by the policies alone: every wanted connection, and of those around it no other."""
    redis = any("gcsFaultToleranceOptions" in cluster.spec for cluster in clusters(docs))
    peers = [Peer(pod.name, NAMESPACE, pod.labels) for pod in pods(docs)]
    for own in peers:
        api = {6443} if own.name == "head" else set()
        out_of = [
            (Peer("S3", address="52.216.0.1"), {443} | api),
            (Peer("Redis", address="10.1.2.3"), {443} | api | ({6379} if redis and own.name == "head" else set())),
            (DNS, {53}),
            *((one, set[int]()) for one in STRANGERS if one.namespace),
        ]
        tried = [(source, own, ports) for source, ports in INTO]
        tried += [(own, target, ports) for target, ports in out_of]
        tried += [(own, other, set(PORTS)) for other in peers]
        for source, target, ports in tried:
            for port in PORTS:
                if admits(docs, source, target, port) != (port in ports):
                    yield f"{source.name} {'cannot' if port in ports else 'can'} reach {target.name} at {port}"
        if not admits(docs, own, DNS, 53, "UDP"):
            yield f"{own.name} cannot reach DNS at 53 by UDP"


def monitor(docs: list[Doc]) -> Iterator[str]:
    """The PodMonitor, whose schema is not here: its fields, and that it finds ports which it may reach."""
    (doc,) = [doc for doc in docs if doc["kind"] == "PodMonitor"]
    spec = doc["spec"]
    if doc["apiVersion"] != "monitoring.coreos.com/v1" or set(spec) - {
        "selector",
        "podTargetLabels",
        "podMetricsEndpoints",
    }:
        yield f"PodMonitor: {doc['apiVersion']}, {sorted(spec)}"
    named: set[str] = set()
    for pod in (pod for pod in pods(docs) if pod.ray):
        if not spec["selector"]["matchLabels"].items() <= pod.labels.items():
            yield f"PodMonitor: does not select {pod.name}"
        if pod.ports().get("metrics") != 8080:
            yield f"{pod.name}: metrics are at 8080, where the operator has Ray put them"
        named |= set(pod.ports())
        for one in spec["podMetricsEndpoints"]:
            port = pod.ports().get(one.get("port", ""))
            if port and not admits(docs, PROMETHEUS, Peer(pod.name, NAMESPACE, pod.labels), port):
                yield f"PodMonitor: may not reach {pod.name}:{port}"
    for one in spec["podMetricsEndpoints"]:
        if (
            set(one) != {"port", "interval"}
            or one["port"] not in named
            or not re.fullmatch(r"\d+(s|m)", one["interval"])
        ):
            yield f"PodMonitor: no such end: {one}"


def watched(docs: list[Doc]) -> Iterator[str]:
    for pod in (pod for pod in pods(docs) if pod.ray):
        env = {one["name"]: one.get("value") for one in pod.spec["containers"][0]["env"]}
        for name, value in {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items():
            if env.get(name) != value:
                yield f"{pod.name}: {name} is not {value}"


def ends(docs: list[Doc]) -> Iterator[str]:
    """A job's nodes are given back, and no mistake runs for ever."""
    for job in jobs(docs):
        needed = {"shutdownAfterJobFinishes", "activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit"}
        yield from (f"{job.name}: no {field}" for field in sorted(needed) if not job.spec.get(field))


PROMISES: tuple[Rule, ...] = (
    namespace,
    no_rights,
    writable,
    bounded,
    idle_head,
    pools,
    sized_by,
    secrets,
    credentials,
    network,
    monitor,
    watched,
    ends,
)
