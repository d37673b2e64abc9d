"""Broken manifests of the RayService overlays: as in `kubernetes_broken`."""

from collections.abc import Callable

import kuberay_rules as rules
import kubernetes_code as code
import kubernetes_promises as promises
import kubernetes_schemas as schemas
import kubernetes_serve as serving
from kuberay import REMOVE, Breakage

CONFIG, CLUSTER = "spec/serveConfigV2", "spec/rayClusterConfig"
HEAD, GROUP = f"{CLUSTER}/headGroupSpec", f"{CLUSTER}/workerGroupSpecs/0"
POD = f"{GROUP}/template/spec"
POLICY, INGRESS = "serve NetworkPolicy raylivecell-serve", "serve Ingress cells"
BACKEND = "spec/rules/0/http/paths/0/backend/service"
ENTRY_POINTS = "metadata/annotations/traefik.ingress.kubernetes.io~1router.entrypoints"


def edited(old: str, new: str) -> Callable[[str], str]:
    """Edit of a text that contains `old`."""

    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


SERVICE_ERRORS: list[Breakage] = [
    (schemas.core_schema, INGRESS, {"spec/rules/0/http/paths/0/pathType": REMOVE}, "pathType"),
    (schemas.kuberay_schema, "serve", {"spec/serveConfig": "a: b"}, "serveConfig"),
    (schemas.kuberay_schema, "serve", {CLUSTER: REMOVE}, "rayClusterConfig"),
    (schemas.kuberay_schema, "serve-cpu", {f"{GROUP}/maxReplicas": "2"}, "'2'"),
    (rules.names, "serve", {"metadata/name": "c" * 48}, "over 47"),
    (rules.gates, "serve", {f"{CLUSTER}/upgradeStrategy": {"type": "None"}}, "of a job or service"),
    (rules.upgrade, "serve", {"spec/upgradeStrategy/type": "Rolling"}, "unknown upgradeStrategy Rolling"),
    (rules.upgrade, "serve", {"spec/upgradeStrategy/type": "NewClusterWithIncrementalUpgrade"}, "needs clusterUpgrade"),
    (rules.upgrade, "serve", {"spec/rayClusterDeletionDelaySeconds": -1}, "below 0"),
    (rules.serve_service, "serve", {f"{HEAD}/headService": {"metadata": {"name": "a"}}}, "has a name"),
    (rules.serve_service, "serve", {f"{HEAD}/template/spec/containers/0/ports/6": REMOVE}, "no port named serve"),
    (promises.worker_pools, "serve", {f"{POD}/affinity": REMOVE}, "serving: a service may be"),
    (promises.secrets, "serve", {f"{CLUSTER}/authOptions": REMOVE}, "no token authentication"),
    (
        promises.secrets,
        "serve",
        {f"{POD}/containers/0/env/4": {"name": "RAYLIVECELL_SERVE_TOKEN", "value": "x"}},
        "serving: RAYLIVECELL_SERVE_TOKEN in the manifest",
    ),
    (
        promises.network,
        "serve",
        {f"{GROUP}/template/metadata/labels/app.kubernetes.io~1component": REMOVE},
        "the ingress controller cannot reach serving at 8000",
    ),
    (
        promises.network,
        POLICY,
        {"spec/podSelector/matchLabels/app.kubernetes.io~1component": REMOVE},
        "the ingress controller can reach head at 8000",
    ),
    (promises.network, POLICY, {"spec/ingress/0/ports": REMOVE}, "the ingress controller can reach serving at 8265"),
    (promises.network, POLICY, {"spec/ingress/0/from": REMOVE}, "the internet can reach serving at 8000"),
    (
        promises.network,
        POLICY,
        {"spec/ingress/0/from/0/podSelector": REMOVE},
        "a Pod next to the ingress controller can reach serving at 8000",
    ),
    (
        promises.network,
        POLICY,
        {"spec/ingress/0/from/0/namespaceSelector": {}},
        "a fake ingress controller can reach serving at 8000",
    ),
    (promises.network, POLICY, {"spec/ingress/0/ports/0/port": 8080}, "the ingress controller cannot reach serving"),
    (code.images, "serve", {f"{POD}/containers/0/image": "rayproject/ray:2.60.0"}, "rayproject/ray:2.60.0"),
    (code.versions, "serve", {f"{CLUSTER}/rayVersion": "2.59.0"}, "rayVersion 2.59.0"),
    (
        code.variables,
        "serve",
        {f"{POD}/containers/0/env/5": {"name": "RAY_object_spill_directory"}},
        "Ray has no RAY_object_spill_directory",
    ),
    (serving.application, "serve", {CONFIG: "a: ["}, "applications: Field required"),
    (serving.application, "serve", {CONFIG: edited("application:build", "application:main")}, "has no main"),
    (serving.application, "serve", {CONFIG: edited("serving.application", "serve")}, "no module raylivecell.serve"),
    (serving.application, "serve", {CONFIG: edited("min_replicas", "replicas")}, "replicas: Extra inputs"),
    (serving.application, "serve", {CONFIG: edited("max_replicas: 4", "max_replicas: 0")}, "max_replicas"),
    (serving.application, "serve", {CONFIG: edited("min_replicas: 1", "min_replicas: 5")}, "is below min_replicas 5"),
    (serving.application, "serve", {CONFIG: edited("checkpoint", "model")}, "checkpoint: Field required"),
    (serving.application, "serve", {CONFIG: edited("proxy_location", "proxy")}, "Serve ignores proxy"),
    (serving.application, "serve", {CONFIG: edited("host:", "address:")}, "Serve ignores http_options.address"),
    (serving.application, "serve", {CONFIG: edited("args:", "arguments:")}, "Serve ignores applications.arguments"),
    (serving.application, "serve", {CONFIG: edited("EveryNode", "Everywhere")}, "proxy_location"),
    (
        serving.application,
        "serve",
        {CONFIG: edited("    args:", "    deployments: [{name: API}]\n    args:")},
        "no deployment API",
    ),
    (serving.requests, "serve", {CONFIG: edited("min_replicas: 1", "require_token: false")}, "requests need no token"),
    (
        serving.requests,
        "serve",
        {CONFIG: edited("min_replicas: 1", f"token_sha256: '{'0' * 64}'")},
        "not that of the Secret",
    ),
    (serving.requests, "serve", {CONFIG: edited("0.0.0.0", "127.0.0.1")}, "listens on 127.0.0.1"),
    (serving.requests, "serve", {CONFIG: edited("EveryNode", "HeadOnly")}, "no proxy on the workers"),
    (serving.requests, "serve", {CONFIG: edited("8000", "8001")}, "serving: port serve is 8000, Serve listens on 8001"),
    (serving.requests, "serve", {"spec/excludeHeadPodFromServeSvc": REMOVE}, "would enter at the head"),
    (serving.requests, "serve", {f"{POD}/containers/0/env/4": REMOVE}, "serving: no RAYLIVECELL_SERVE_TOKEN"),
    (serving.requests, "serve", {f"{POD}/containers/0/env/5/value": "/tmp"}, "serving: Ray may write images"),
    (serving.capacity, "serve", {f"{GROUP}/maxReplicas": 3}, "4 replicas need 8 CPUs and 4 GPUs, 3 Pods"),
    (serving.capacity, "serve-cpu", {f"{GROUP}/minReplicas": 0}, "1 replicas need 2 CPUs and 0 GPUs, 0 Pods"),
    (serving.capacity, "serve", {CONFIG: edited("network_gpus: 1", "network_gpus: 0")}, "the GPUs are not used"),
    (serving.model_change, "serve", {"spec/upgradeStrategy": REMOVE}, "no new cluster for a changed model"),
    (serving.model_change, "serve", {CONFIG: edited("runs/paper", "runs/new")}, "loaded in the running cluster"),
    (serving.model_change, "serve", {"spec/rayClusterDeletionDelaySeconds": 600}, "deleted after 600 s"),
    (serving.ingress, INGRESS, {"spec/tls": REMOVE}, "no certificate for cells.example.org"),
    (serving.ingress, INGRESS, {"spec/rules/0/host": "other.example.org"}, "no certificate for other.example.org"),
    (serving.ingress, INGRESS, {ENTRY_POINTS: "web,websecure"}, "accepts requests without TLS"),
    (serving.ingress, INGRESS, {f"{BACKEND}/name": "cells-head-svc"}, "no service cells-head-svc"),
    (serving.ingress, INGRESS, {f"{BACKEND}/port/number": 8265}, "does not listen on"),
    (serving.ingress, INGRESS, {"metadata/annotations/nginx.org~1client-max-body-size": "1m"}, "limit is 512m"),
    (serving.ingress, INGRESS, {"metadata/annotations/nginx.org~1proxy-read-timeout": REMOVE}, "limit is 600s"),
]
