"""Rules for a RayService: its Serve config agrees with the code, with its cluster and with the Ingress."""

import importlib
import re
from collections.abc import Iterator
from typing import Any

from kuberay import Doc, Rule, Service, clusters, pods, services
from pydantic import BaseModel, ValidationError
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from raylivecell.serving.settings import TOKEN_VARIABLE, ServeSettings

PORT = "serve"
SPILLING = "RAY_object_spilling_directory"


def config_errors(config: Doc) -> Iterator[str]:
    """Errors of a Serve config file: those that Serve reports, and fields that it would ignore."""
    yield from _unknown("", config, ServeDeploySchema)
    try:
        deployed = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        yield _first(error)
        return
    yield from _unknown("http_options.", config.get("http_options", {}), HTTPOptionsSchema)
    for given, application in zip(config["applications"], deployed.applications):
        yield from _unknown("applications.", given, ServeApplicationSchema)
        module_name, _, builder = application.import_path.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            yield f"no module {module_name}"
            continue
        if not callable(getattr(module, builder, None)):
            yield f"{module_name} has no {builder}"
        yield from (f"no deployment {item.name}" for item in application.deployments if not hasattr(module, item.name))
        try:
            ServeSettings.model_validate(application.args)
        except ValidationError as error:
            yield _first(error)


def _unknown(path: str, given: Doc, schema: type[BaseModel]) -> Iterator[str]:
    yield from (f"Serve ignores {path}{name}" for name in given if name not in schema.model_fields)


def _first(error: ValidationError) -> str:
    details = error.errors()[0]
    return f"{'.'.join(str(part) for part in details['loc'])}: {details['msg']}"


def settings_of(service: Service) -> ServeSettings:
    """Settings of the service's application; defaults where `application` reports an error."""
    try:
        return ServeSettings.model_validate(service.config()["applications"][0]["args"])
    except (KeyError, ValidationError):
        return ServeSettings(checkpoint="")


def application(docs: list[Doc]) -> Iterator[str]:
    """Serve accepts the config, and the application accepts its arguments."""
    for service in services(docs):
        yield from (f"{service.name}: {error}" for error in config_errors(service.config()))


def requests(docs: list[Doc]) -> Iterator[str]:
    """Requests enter at the workers and need the token of a Secret."""
    for service in services(docs):
        settings, config = settings_of(service), service.config()
        if not settings.require_token:
            yield f"{service.name}: requests need no token"
        if settings.token_sha256:
            yield f"{service.name}: the token is not that of the Secret"
        options = config.get("http_options", {})
        if options.get("host") != "0.0.0.0":
            yield f"{service.name}: listens on {options.get('host')}"
        # A worker without a proxy is never ready, and the operator's Service has no endpoint then.
        if config.get("proxy_location") != "EveryNode":
            yield f"{service.name}: no proxy on the workers"
        if not service.spec.get("excludeHeadPodFromServeSvc"):
            yield f"{service.name}: requests would enter at the head, where the policy refuses them"
        for pod in pods(docs):
            env = {variable["name"]: variable for variable in pod.spec["containers"][0].get("env", [])}
            # Any node may run the process that checks the token.
            if TOKEN_VARIABLE not in env:
                yield f"{pod.name}: no {TOKEN_VARIABLE}"
            if pod.ports().get(PORT) != options.get("port"):
                yield f"{pod.name}: port {PORT} is {pod.ports().get(PORT)}, Serve listens on {options.get('port')}"
            # The mount there is in memory: `writable_folders`.
            if env.get(SPILLING, {}).get("value") != "/dev/shm":
                yield f"{pod.name}: Ray may write images to disk: {SPILLING} is not /dev/shm"


def capacity(docs: list[Doc]) -> Iterator[str]:
    """The pool has the CPUs and GPUs of all processes, at its smallest and at its largest size."""
    for cluster in (cluster for cluster in clusters(docs) if cluster.service):
        assert cluster.service
        settings, (group,) = settings_of(cluster.service), cluster.groups()
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        cpus, gpus = float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))
        if gpus and not settings.network_gpus:
            yield f"{cluster.name}: the GPUs are not used"
        for replicas, nodes in (
            (settings.min_replicas, group["minReplicas"]),
            (settings.max_replicas, group["maxReplicas"]),
        ):
            # One process with the network, and one of one CPU that segments.
            needed = replicas * (settings.network_cpus + 1), replicas * settings.network_gpus
            if needed[0] > nodes * cpus or needed[1] > nodes * gpus:
                yield (
                    f"{cluster.name}: {replicas} replicas need {needed[0]:g} CPUs and {needed[1]:g} GPUs, "
                    f"{nodes} Pods have {nodes * cpus:g} and {nodes * gpus:g}"
                )


def model_change(docs: list[Doc]) -> Iterator[str]:
    """Any change of the Serve config starts a new cluster, and the old one finishes its requests."""
    for service in services(docs):
        if service.spec.get("upgradeStrategy", {}).get("type") != "NewCluster":
            yield f"{service.name}: no new cluster for a changed model"
        template = service.spec["rayClusterConfig"]["headGroupSpec"]["template"]
        copied = template["metadata"].get("annotations", {}).get("serve-config")
        if copied != service.spec["serveConfigV2"]:
            yield f"{service.name}: a changed model would be loaded in the running cluster"
        delay, timeout = service.spec.get("rayClusterDeletionDelaySeconds", 60), settings_of(service).timeout_s
        if delay <= timeout:
            yield f"{service.name}: the old cluster is deleted after {delay} s, requests may take {timeout:g} s"


def ingress(docs: list[Doc]) -> Iterator[str]:
    """TLS for each host, to a service that exists, with its limits of size and time."""
    targets = {f"{service.name}-serve-svc": service for service in services(docs)}
    for doc in (doc for doc in docs if doc["kind"] == "Ingress"):
        name, spec, annotations = doc["metadata"]["name"], doc["spec"], doc["metadata"].get("annotations", {})
        encrypted = {host for entry in spec.get("tls", []) if entry.get("secretName") for host in entry["hosts"]}
        if annotations.get("traefik.ingress.kubernetes.io/router.entrypoints") != "websecure":
            yield f"{name}: accepts requests without TLS"
        for rule in spec["rules"]:
            if rule.get("host") not in encrypted:
                yield f"{name}: no certificate for {rule.get('host')}"
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                yield from (f"{name}: {error}" for error in _backend_errors(targets, backend, annotations))


def _backend_errors(targets: dict[str, Service], backend: Doc, annotations: dict[str, str]) -> Iterator[str]:
    service = targets.get(backend["name"])
    if not service:
        yield f"no service {backend['name']}"
        return
    settings: Any = settings_of(service)
    if backend["port"].get("number") != service.config().get("http_options", {}).get("port"):
        yield f"{backend['name']} does not listen on {backend['port']}"
    for annotation, unit, limit in (
        ("nginx.org/client-max-body-size", "m", settings.max_request_mib),
        ("nginx.org/proxy-read-timeout", "s", settings.timeout_s),
    ):
        value = annotations.get(annotation, "")
        if not re.fullmatch(rf"\d+{unit}", value) or int(value[:-1]) != limit:
            yield f"{annotation} is {value}, the service's limit is {limit:g}{unit}"


SERVING: tuple[Rule, ...] = (application, requests, capacity, model_change, ingress)
