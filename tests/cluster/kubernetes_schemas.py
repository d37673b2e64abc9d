"""Rules: overlays conform to the schemas of Kubernetes and KubeRay."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from conftest import SHARED
from kuberay import Doc, Rule, pods

KUBERNETES = "1.33"


@functools.cache
def core_errors(text: str) -> tuple[str, ...]:
    """Schema errors of one JSON document of a built-in kind."""
    try:
        kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'/'.join(str(part) for part in error.path)}: {error.message}",)
    return ()


def core_schema(docs: list[Doc]) -> Iterator[str]:
    """The built-in kinds, and the Pods inside KubeRay's kinds."""
    for doc in docs:
        if not doc["apiVersion"].startswith(("ray.io/", "monitoring.")):
            yield from core_errors(json.dumps(doc))
    for pod in pods(docs):
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.name}, "spec": pod.spec}
        yield from core_errors(json.dumps(document))


@functools.cache
def _kuberay_schemas() -> dict[str, Any]:
    file = SHARED / "kuberay" / "crds.json"
    if not file.is_file():
        pytest.skip(
            f"no schemas of KubeRay at {file}: set RAYLIVECELL_SHARED to the folder that holds kuberay/crds.json"
        )
    return json.loads(file.read_text())


def kuberay_schema(docs: list[Doc]) -> Iterator[str]:
    for doc in (doc for doc in docs if doc["apiVersion"].startswith("ray.io/")):
        schema = _kuberay_schemas()[f"{doc['apiVersion']}|{doc['kind']}"]
        for error in jsonschema.Draft202012Validator(schema).iter_errors(doc):
            yield f"{'/'.join(str(part) for part in error.path)}: {error.message}"


SCHEMAS: tuple[Rule, ...] = (core_schema, kuberay_schema)
