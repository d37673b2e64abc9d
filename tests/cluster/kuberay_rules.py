"""Rules: reimplementation of the validation by KubeRay 1.7 and Kueue that their schemas do not cover.

A rule maps an overlay's documents to errors.
"""

import re
from collections.abc import Iterator
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from kuberay import Doc, Job, Rule, clusters, jobs, services

# Kubernetes' label names, with or without a domain.
LABEL = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
# Maximum lengths; the operator appends suffixes to the names.
MAX_LENGTH = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 47, "RayService": 47}
# Fields that need a feature gate which is off by default in KubeRay 1.7.
GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
QUEUE = "kueue.x-k8s.io/queue-name"


def names(docs: list[Doc]) -> Iterator[str]:
    for doc in docs:
        name, limit = doc["metadata"]["name"], MAX_LENGTH.get(doc["kind"])
        if limit and not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{name}: not a DNS-1035 name"
        if limit and len(name) > limit:
            yield f"{name}: over {limit} characters"


def containers(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        for name, group in cluster.pods():
            if not group["template"]["spec"].get("containers"):
                yield f"{name}: no container"


def resources_once(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        for name, group in cluster.pods():
            params = {"num-cpus", "num-gpus", "memory", "resources"} & set(group.get("rayStartParams", {}))
            if params and group.get("resources"):
                yield f"{name}: {', '.join(sorted(params))} in rayStartParams and resources"


def labels(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        for name, group in cluster.pods():
            if "labels" in group.get("rayStartParams", {}):
                yield f"{name}: labels in rayStartParams"
            for key, value in group.get("labels", {}).items():
                if not (LABEL.fullmatch(key) and VALUE.fullmatch(value)):
                    yield f"{name}: invalid label {key}={value}"


def replicas(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        for group in cluster.groups():
            name, low, high = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
            if None in (low, high):
                if not cluster.autoscaled():
                    yield f"{name}: minReplicas and maxReplicas are required without the autoscaler"
            elif not 0 <= low <= high:
                yield f"{name}: {low} to {high} replicas"


def group_options(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        for group in cluster.groups():
            name, idle = group["groupName"], group.get("idleTimeoutSeconds")
            if idle is not None and (idle < 0 or not cluster.autoscaled_v2()):
                yield f"{name}: idleTimeoutSeconds {idle} needs autoscaler v2, and must not be negative"
            if group.get("priority") and (cluster.version() < (2, 56) or not cluster.autoscaled_v2()):
                yield f"{name}: priority needs Ray 2.56 and autoscaler v2"
            if group.get("suspend") and cluster.autoscaled():
                yield f"{name}: suspended with the autoscaler on"


def autoscaler(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        options, switch = cluster.spec.get("autoscalerOptions", {}), "RAY_enable_autoscaler_v2"
        if switch in cluster.head_env() and ("version" in options or not cluster.autoscaled()):
            yield f"{cluster.name}: {switch} with autoscalerOptions.version, or without the autoscaler"
        if options.get("idleTimeoutSeconds", 0) < 0:
            yield f"{cluster.name}: autoscalerOptions.idleTimeoutSeconds below 0"
        if any(env["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for env in options.get("env", [])):
            yield f"{cluster.name}: KUBERAY_GEN_AUTOSCALER_START_CMD is reserved for the operator"
        for name, group in cluster.pods() if cluster.autoscaled_v2() else ():
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield f"{name}: restartPolicy with autoscaler v2"


def authentication(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        options = cluster.spec.get("authOptions", {})
        token, delegated = options.get("mode") == "token", options.get("enableK8sTokenAuth")
        if token and cluster.version() < (2, 52):
            yield f"{cluster.name}: token authentication needs rayVersion of at least 2.52"
        if delegated and (not token or options.get("secretName") or cluster.version() < (2, 55) or cluster.job):
            yield f"{cluster.name}: enableK8sTokenAuth needs mode token, no secretName, Ray 2.55, no job"


def gcs(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        options, env = cluster.spec.get("gcsFaultToleranceOptions"), cluster.head_env()
        params = cluster.spec["headGroupSpec"].get("rayStartParams", {})
        if options is None and "RAY_REDIS_ADDRESS" in env:
            yield f"{cluster.name}: RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        if "redis-username" in params or "REDIS_USERNAME" in env:
            yield f"{cluster.name}: Redis user outside gcsFaultToleranceOptions"
        if options is None:
            continue
        if {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & env or "redis-password" in params:
            yield f"{cluster.name}: Redis settings also outside gcsFaultToleranceOptions"
        if {"ray.io/ft-enabled", "ray.io/external-storage-namespace"} & set(cluster.annotations):
            yield f"{cluster.name}: annotations of fault tolerance with gcsFaultToleranceOptions"
        if options.get("backend") == "rocksdb":
            yield f"{cluster.name}: backend rocksdb needs the feature gate GCSFaultToleranceEmbeddedStorage"
        elif "storage" in options:
            yield f"{cluster.name}: storage needs the backend rocksdb"


def gates(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        for field, gate in GATED.items():
            if field in cluster.spec:
                yield f"{cluster.name}: {field} needs the feature gate {gate}"
        if (cluster.job or cluster.service) and "upgradeStrategy" in cluster.spec:
            yield f"{cluster.name}: upgradeStrategy in the cluster of a job or service"


def cleanup(docs: list[Doc]) -> Iterator[str]:
    """Deletion of a job's cluster after the job."""
    for job in jobs(docs):
        shutdown, seconds = job.spec.get("shutdownAfterJobFinishes"), job.spec.get("ttlSecondsAfterFinished", 0)
        if seconds < 0 or (seconds and not shutdown):
            yield f"{job.name}: ttlSecondsAfterFinished {seconds} is negative or without shutdownAfterJobFinishes"
        if job.spec.get("suspend") and not shutdown:
            yield f"{job.name}: suspend needs shutdownAfterJobFinishes"
        if "deletionStrategy" in job.spec:
            yield from _deletion(job)


def _deletion(job: Job) -> Iterator[str]:
    strategy, shutdown = job.spec["deletionStrategy"], job.spec.get("shutdownAfterJobFinishes")
    rules, legacy = strategy.get("deletionRules", []), {"onSuccess", "onFailure"} & set(strategy)
    policies = [rule.get("policy") for rule in (*rules, *(strategy[name] for name in sorted(legacy)))]
    if rules and (shutdown or legacy):
        yield f"{job.name}: deletionRules with shutdownAfterJobFinishes, onSuccess or onFailure"
    if not rules and len(legacy) != 2:
        yield f"{job.name}: deletionStrategy needs deletionRules, or both onSuccess and onFailure"
    if not rules and shutdown and "DeleteNone" in policies:
        yield f"{job.name}: shutdownAfterJobFinishes with DeleteNone"
    if "DeleteWorkers" in policies and job.spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling"):
        yield f"{job.name}: DeleteWorkers with the autoscaler on"


def cluster_selector(docs: list[Doc]) -> Iterator[str]:
    for job in jobs(docs):
        selector = job.spec.get("clusterSelector")
        if not selector and "rayClusterSpec" not in job.spec:
            yield f"{job.name}: neither rayClusterSpec nor clusterSelector"
        if not selector:
            continue
        if not selector.get("ray.io/cluster"):
            yield f"{job.name}: clusterSelector without ray.io/cluster"
        for field in ("suspend", "backoffLimit"):
            if job.spec.get(field):
                yield f"{job.name}: {field} on a selected cluster"
        if job.spec.get("submissionMode") == "SidecarMode":
            yield f"{job.name}: SidecarMode on a selected cluster"


def submission(docs: list[Doc]) -> Iterator[str]:
    for job in jobs(docs):
        mode = job.spec.get("submissionMode", "K8sJobMode")
        if mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
            yield f"{job.name}: unknown submissionMode {mode}"
        if mode == "InteractiveMode" and job.spec.get("backoffLimit"):
            yield f"{job.name}: backoffLimit in InteractiveMode"
        if mode == "SidecarMode":
            for field in sorted({"submitterPodTemplate", "submitterConfig"} & set(job.spec)):
                yield f"{job.name}: {field} in SidecarMode"
            head = job.spec.get("rayClusterSpec", {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})
            if head.get("restartPolicy", "Never") != "Never":
                yield f"{job.name}: the head's restartPolicy in SidecarMode"


def limits(docs: list[Doc]) -> Iterator[str]:
    for job in jobs(docs):
        for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
            if job.spec.get(field, 1) <= 0:
                yield f"{job.name}: {field} must be positive"
        if job.spec.get("backoffLimit", 0) < 0:
            yield f"{job.name}: backoffLimit below 0"


def runtime_environment(docs: list[Doc]) -> Iterator[str]:
    for job in jobs(docs):
        try:
            environment = yaml.safe_load(job.spec.get("runtimeEnvYAML", "{}"))
        except yaml.YAMLError:
            environment = None
        if not isinstance(environment, dict):
            yield f"{job.name}: runtimeEnvYAML is not a mapping"


def schedule(docs: list[Doc]) -> Iterator[str]:
    field = r"(\*|\d+(-\d+)?)(/\d+)?(,(\*|\d+(-\d+)?)(/\d+)?)*"
    for doc in (doc for doc in docs if doc["kind"] == "RayCronJob"):
        name, cron = doc["metadata"]["name"], doc["spec"]["schedule"]
        parts = cron.split()
        if not re.fullmatch(r"@(hourly|daily|midnight|weekly|monthly|yearly|annually)", cron) and (
            len(parts) != 5 or not all(re.fullmatch(field, part) for part in parts)
        ):
            yield f"{name}: invalid schedule {cron}"
        try:
            ZoneInfo(doc["spec"].get("timeZone", "Etc/UTC"))
        except (ZoneInfoNotFoundError, ValueError):
            yield f"{name}: unknown time zone {doc['spec']['timeZone']}"


def upgrade(docs: list[Doc]) -> Iterator[str]:
    """How a service changes to a new cluster."""
    for service in services(docs):
        strategy = service.spec.get("upgradeStrategy", {})
        kind, options = strategy.get("type", "NewCluster"), strategy.get("clusterUpgradeOptions")
        if kind not in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"):
            yield f"{service.name}: unknown upgradeStrategy {kind}"
        if kind == "NewClusterWithIncrementalUpgrade" and not options:
            yield f"{service.name}: {kind} needs clusterUpgradeOptions"
        if service.spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
            yield f"{service.name}: rayClusterDeletionDelaySeconds below 0"


def serve_service(docs: list[Doc]) -> Iterator[str]:
    """The Service for requests, which the operator creates for the head's port `serve` and names itself."""
    for cluster in (cluster for cluster in clusters(docs) if cluster.service):
        head = cluster.spec["headGroupSpec"]
        if head.get("headService", {}).get("metadata", {}).get("name"):
            yield f"{cluster.name}: headService has a name"
        ports = [port.get("name") for port in head["template"]["spec"]["containers"][0].get("ports", [])]
        if "serve" not in ports and "serveService" not in cluster.service.spec:
            yield f"{cluster.name}: the head has no port named serve"


def kueue(docs: list[Doc]) -> Iterator[str]:
    """The checks of Kueue's webhook for jobs in a queue."""
    for job in jobs(docs):
        if QUEUE not in job.labels:
            continue
        cluster = job.spec.get("rayClusterSpec", {})
        groups = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
        if not job.spec.get("shutdownAfterJobFinishes"):
            yield f"{job.name}: a queued job needs shutdownAfterJobFinishes"
        if cluster.get("enableInTreeAutoscaling"):
            yield f"{job.name}: a queued job must not set enableInTreeAutoscaling"
        if job.spec.get("clusterSelector"):
            yield f"{job.name}: a queued job must not use clusterSelector"
        if len(groups) > 7 or "head" in groups:
            yield f"{job.name}: a queued job has at most 7 worker groups, none named head"


RULES: tuple[Rule, ...] = (
    names,
    containers,
    resources_once,
    labels,
    replicas,
    group_options,
    autoscaler,
    authentication,
    gcs,
    gates,
    cleanup,
    cluster_selector,
    submission,
    limits,
    runtime_environment,
    schedule,
    upgrade,
    serve_service,
    kueue,
)
