"""Rules for cluster/kubernetes beyond those of Kubernetes and KubeRay: rights, sizes, pools, network."""

import re
from collections.abc import Iterator

import ray._private.ray_constants as ray_constants
import yaml
from kuberay import FOLDER, Doc, Rule, clusters, jobs, pods, services
from kuberay_rules import QUEUE
from network_policy import Peer, admits

NAMESPACE = yaml.safe_load((FOLDER / "namespace.yaml").read_text())["metadata"]["name"]
LOCKED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
USER = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
SPOT = {"karpenter.sh/capacity-type", "eks.amazonaws.com/capacityType", "cloud.google.com/gke-spot"}
SPOT |= {"kubernetes.azure.com/scalesetpriority"}
# Seconds between the end of draining and the kill.
MARGIN_S = 10
UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}


def _amount(quantity: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi|)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def namespace(docs: list[Doc]) -> Iterator[str]:
    for doc in docs:
        if doc["metadata"].get("namespace") != NAMESPACE:
            yield f"{doc['kind']} {doc['metadata']['name']} outside {NAMESPACE}"


def least_privilege(docs: list[Doc]) -> Iterator[str]:
    for pod in pods(docs):
        if pod.spec.get("securityContext") != USER:
            yield f"{pod.name}: securityContext of the Pod"
        if not pod.spec["containers"]:
            yield f"{pod.name}: the operator's default Pod has more rights"
        if any(container.get("securityContext") != LOCKED for container in pod.spec["containers"]):
            yield f"{pod.name}: securityContext of a container"
        if {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec) or any(
            "hostPath" in volume for volume in pod.spec["volumes"]
        ):
            yield f"{pod.name}: accesses its host"
    for cluster in clusters(docs):
        if cluster.autoscaled() and cluster.spec.get("autoscalerOptions", {}).get("securityContext") != LOCKED:
            yield f"{cluster.name}: securityContext of the autoscaler"


def writable_folders(docs: list[Doc]) -> Iterator[str]:
    """The root is read-only: Ray writes to /tmp, programs to HOME, objects to shared memory."""
    for pod in pods(docs):
        volumes = {volume["name"]: volume.get("emptyDir") for volume in pod.spec.get("volumes", [])}
        for container in pod.spec["containers"]:
            mounted = {mount["mountPath"]: volumes.get(mount["name"]) for mount in container.get("volumeMounts", [])}
            for path in ("/tmp", "/home/ray", *(["/dev/shm"] if pod.ray else [])):
                if not mounted.get(path):
                    yield f"{pod.name}: {path} is not writable"
            if pod.ray and (mounted.get("/dev/shm") or {}).get("medium") != "Memory":
                yield f"{pod.name}: /dev/shm is not in memory"
    for cluster in clusters(docs):
        mounts = cluster.spec.get("autoscalerOptions", {}).get("volumeMounts", [])
        if cluster.autoscaled() and {"name": "tmp", "mountPath": "/tmp"} not in mounts:
            yield f"{cluster.name}: the autoscaler cannot write to /tmp"


def resource_limits(docs: list[Doc]) -> Iterator[str]:
    """Requests equal limits, so that a full node does not kill a Pod within its limits."""
    for pod in pods(docs):
        for container in pod.spec["containers"]:
            limits = container.get("resources", {}).get("limits", {})
            if not {"cpu", "memory"} <= set(limits) or limits != container["resources"].get("requests"):
                yield f"{pod.name}: requests and limits of CPU and memory differ or are missing"
                continue
            volumes = [volume["emptyDir"] for volume in pod.spec["volumes"]]
            # Ray's object store uses 30 % of the memory, in these volumes.
            for volume in (volume for volume in volumes if volume.get("medium") == "Memory"):
                share = _amount(volume.get("sizeLimit", "0")) / _amount(limits["memory"])
                if not 0.3 <= share <= 0.5:
                    yield f"{pod.name}: shared memory of {share:.0%} of its memory"
        if not all(volume["emptyDir"].get("sizeLimit") for volume in pod.spec["volumes"]):
            yield f"{pod.name}: a volume without a sizeLimit"


def no_work_on_head(docs: list[Doc]) -> Iterator[str]:
    """The head offers no CPUs and is not scheduled on a spot node."""
    for cluster in clusters(docs):
        if cluster.spec["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
            yield f"{cluster.name}: tasks would run on the head"
    for pod in pods(docs):
        if pod.name == "head" and not _excludes_spot(pod.spec):
            yield "head: may be scheduled on a spot node"


def _excludes_spot(spec: Doc) -> bool:
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    excluded = [{label["key"] for label in term["matchExpressions"] if label["operator"] == "NotIn"} for term in terms]
    return bool(excluded) and not any(SPOT - keys for keys in excluded)


def worker_pools(docs: list[Doc]) -> Iterator[str]:
    """Each pool has a distinct label, replicas within its bounds and time to drain."""
    for cluster in clusters(docs):
        pools = [group.get("labels", {}).get("ray-subcluster") for group in cluster.groups()]
        if None in pools or len(set(pools)) != len(pools):
            yield f"{cluster.name}: pools without distinct labels: {pools}"
        for group in cluster.groups():
            name, spec = group["groupName"], group["template"]["spec"]
            env = {variable["name"]: variable.get("value") for variable in spec["containers"][0]["env"]}
            drain = env.get(
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
            )
            if spec.get("terminationGracePeriodSeconds", 30) < float(drain) + MARGIN_S:
                yield f"{name}: killed within {float(drain):g} s of draining"
            if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                yield f"{name}: {group['replicas']} replicas"
            gpus = spec["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
            if cluster.service:  # GPUs by its network_gpus: kubernetes_serve.py
                if not _excludes_spot(spec):
                    yield f"{name}: a service may be scheduled on a spot node"
                continue
            if (gpus is not None) != (pools[cluster.groups().index(group)] == "training"):
                yield f"{name}: only the pool `training` has GPUs, not {gpus}"
            if gpus is not None:
                yield from (f"{name}: {error}" for error in _spot_errors(spec))


def _spot_errors(spec: Doc) -> Iterator[str]:
    tolerated = {toleration["key"] for toleration in spec.get("tolerations", [])}
    for key in {
        "nvidia.com/gpu",
        "spot",
        "cloud.google.com/gke-spot",
        "kubernetes.azure.com/scalesetpriority",
    } - tolerated:
        yield f"does not tolerate {key}"
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    preferred = {label["key"] for term in terms for label in term["preference"]["matchExpressions"]}
    yield from (f"does not prefer {key}" for key in SPOT - preferred)


def sized_automatically(docs: list[Doc]) -> Iterator[str]:
    """The autoscaler or a queue's quota sets the size."""
    for cluster in clusters(docs):
        if not cluster.autoscaled_v2() and not (cluster.job and QUEUE in cluster.job.labels):
            yield f"{cluster.name}: neither autoscaler v2 nor a queue"


def secrets(docs: list[Doc]) -> Iterator[str]:
    """Token authentication, and no secret in the manifests."""
    for cluster in clusters(docs):
        options = cluster.spec.get("authOptions", {})
        if options.get("mode") != "token" or not options.get("secretName"):
            yield f"{cluster.name}: no token authentication, or a token that the operator would generate"
        redis = cluster.spec.get("gcsFaultToleranceOptions")
        if redis and set(redis.get("redisPassword", {}).get("valueFrom", {})) != {"secretKeyRef"}:
            yield f"{cluster.name}: Redis' password is not from a Secret"
    for pod in pods(docs):
        for env in (env for container in pod.spec["containers"] for env in container.get("env", [])):
            from_secret = "value" not in env and set(env.get("valueFrom", {})) == {"secretKeyRef"}
            if re.search("TOKEN|SECRET|PASSW|KEY|CREDENTIAL", env["name"]) and not from_secret:
                yield f"{pod.name}: {env['name']} in the manifest"
    yield from (f"Secret {doc['metadata']['name']} in the manifests" for doc in docs if doc["kind"] == "Secret")


def credentials(docs: list[Doc]) -> Iterator[str]:
    """Pods use a service account for the object store; only the head's autoscaler may use the API server."""
    accounts = {doc["metadata"]["name"]: doc["metadata"] for doc in docs if doc["kind"] == "ServiceAccount"}
    for pod in pods(docs):
        if pod.ray and not accounts.get(pod.spec.get("serviceAccountName", "default"), {}).get("annotations"):
            yield f"{pod.name}: no service account with access to the object store"
        if pod.name != "head" and pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: has a token of the API server"


# Peers of a Pod, and the PORTS at which each may connect to it or be connected to.
PORTS = (22, 53, 80, 443, 6379, 6443, 8000, 8080, 8265, 10001, 44217, 44227, 52365)
PROMETHEUS = Peer("Prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"})
OPERATOR = Peer("the operator", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
CONTROLLER = Peer("the ingress controller", "traefik", {"app.kubernetes.io/name": "traefik"})
OTHERS = (
    Peer("another Pod", NAMESPACE, {"app": "other"}),
    Peer("another Ray", "elsewhere", {"app.kubernetes.io/part-of": "raylivecell"}),
    Peer("a fake Prometheus", "elsewhere", {"app.kubernetes.io/name": "prometheus"}),
    Peer("a fake operator", "elsewhere", {"app.kubernetes.io/name": "kuberay-operator"}),
    Peer("a fake ingress controller", "elsewhere", {"app.kubernetes.io/name": "traefik"}),
    Peer("a Pod next to the ingress controller", "traefik", {"app.kubernetes.io/name": "other"}),
    Peer("the internet", address="52.216.0.1"),
)
INGRESS = ((PROMETHEUS, {8080, 44217, 44227}), (OPERATOR, {8265}), *((peer, set[int]()) for peer in OTHERS))
DNS = Peer("DNS", "kube-system", {"k8s-app": "kube-dns"})


def network(docs: list[Doc]) -> Iterator[str]:
    """The policies allow exactly the listed connections between the Pods and their peers."""
    redis = any("gcsFaultToleranceOptions" in cluster.spec for cluster in clusters(docs))
    serves = any(True for _ in services(docs))
    peers = [Peer(pod.name, NAMESPACE, pod.labels) for pod in pods(docs)]
    for own in peers:
        api = {6443} if own.name == "head" else set()
        egress = [
            (Peer("S3", address="52.216.0.1"), {443} | api),
            (Peer("Redis", address="10.1.2.3"), {443} | api | ({6379} if redis and own.name == "head" else set())),
            (DNS, {53}),
            *((peer, set[int]()) for peer in OTHERS if peer.namespace),
        ]
        requests = (CONTROLLER, {8000} if serves and own.name != "head" else set[int]())
        connections = [(source, own, ports) for source, ports in (*INGRESS, requests)]
        connections += [(own, target, ports) for target, ports in egress]
        connections += [(own, other, set(PORTS)) for other in peers]
        for source, target, ports in connections:
            for port in PORTS:
                if admits(docs, source, target, port) != (port in ports):
                    yield f"{source.name} {'cannot' if port in ports else 'can'} reach {target.name} at {port}"
        if not admits(docs, own, DNS, 53, "UDP"):
            yield f"{own.name} cannot reach DNS at 53 by UDP"


def monitor(docs: list[Doc]) -> Iterator[str]:
    """The PodMonitor (no schema is available): its fields are known, and its ports exist and are reachable."""
    (doc,) = [doc for doc in docs if doc["kind"] == "PodMonitor"]
    spec = doc["spec"]
    if doc["apiVersion"] != "monitoring.coreos.com/v1" or set(spec) - {
        "selector",
        "podTargetLabels",
        "podMetricsEndpoints",
    }:
        yield f"PodMonitor: {doc['apiVersion']}, {sorted(spec)}"
    port_names: set[str] = set()
    for pod in (pod for pod in pods(docs) if pod.ray):
        if not spec["selector"]["matchLabels"].items() <= pod.labels.items():
            yield f"PodMonitor: does not select {pod.name}"
        if pod.ports().get("metrics") != 8080:
            yield f"{pod.name}: metrics are at 8080, where the operator makes Ray export them"
        port_names |= set(pod.ports())
        for endpoint in spec["podMetricsEndpoints"]:
            port = pod.ports().get(endpoint.get("port", ""))
            if port and not admits(docs, PROMETHEUS, Peer(pod.name, NAMESPACE, pod.labels), port):
                yield f"PodMonitor: cannot reach {pod.name}:{port}"
    for endpoint in spec["podMetricsEndpoints"]:
        if (
            set(endpoint) != {"port", "interval"}
            or endpoint["port"] not in port_names
            or not re.fullmatch(r"\d+(s|m)", endpoint["interval"])
        ):
            yield f"PodMonitor: invalid endpoint {endpoint}"


def monitoring_variables(docs: list[Doc]) -> Iterator[str]:
    for pod in (pod for pod in pods(docs) if pod.ray):
        env = {variable["name"]: variable.get("value") for variable in pod.spec["containers"][0]["env"]}
        for name, value in {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items():
            if env.get(name) != value:
                yield f"{pod.name}: {name} is not {value}"


def deadlines(docs: list[Doc]) -> Iterator[str]:
    """A job releases its nodes at its end, and each of its phases has a time limit."""
    for job in jobs(docs):
        needed = {"shutdownAfterJobFinishes", "activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit"}
        yield from (f"{job.name}: no {field}" for field in sorted(needed) if not job.spec.get(field))


PROMISES: tuple[Rule, ...] = (
    namespace,
    least_privilege,
    writable_folders,
    resource_limits,
    no_work_on_head,
    worker_pools,
    sized_automatically,
    secrets,
    credentials,
    network,
    monitor,
    monitoring_variables,
    deadlines,
)
