"""cluster/kubernetes: every overlay passes every check, and every check rejects broken manifests."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay import FOLDER, OVERLAYS, Rule, broken, clusters, render, render_folder
from kuberay_rules import RULES
from kubernetes_broken import BROKEN
from kubernetes_code import AGREEMENTS
from kubernetes_promises import PROMISES
from kubernetes_schemas import SCHEMAS, core_errors
from kubernetes_serve import SERVING

CHECKS: tuple[Rule, ...] = (*SCHEMAS, *RULES, *PROMISES, *AGREEMENTS, *SERVING)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_passes(overlay: str, check: Rule) -> None:
    assert list(check(render(overlay))) == []


@pytest.mark.parametrize(
    ("check", "where", "edits", "message"),
    BROKEN,
    ids=[f"{check.__name__}-{message}" for check, _, _, message in BROKEN],
)
def test_check_rejects_broken_manifest(check: Rule, where: str, edits: dict[str, Any], message: str) -> None:
    errors = list(check(broken(where, edits)))
    assert any(message in error for error in errors), errors


def test_every_check_has_a_broken_example() -> None:
    assert {check for check, *_ in BROKEN} == set(CHECKS)


def test_namespace_refuses_privileged_pods() -> None:
    doc = yaml.safe_load((FOLDER / "namespace.yaml").read_text())
    assert core_errors(json.dumps(doc)) == ()
    assert doc["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name not in ("cpu", "gpu")])
def test_overlay_of_a_job_or_service_has_no_separate_cluster(overlay: str) -> None:
    kinds = [doc["kind"] for doc in render(overlay)]
    assert "RayCluster" not in kinds
    assert sum(kind in ("RayJob", "RayCronJob", "RayService") for kind in kinds) == 1


def test_the_service_passes_with_redis(tmp_path: Path) -> None:
    """With the component that its kustomization.yaml lists as a comment."""
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes" / "overlays" / "serve"
    text = (file := overlay / "kustomization.yaml").read_text()
    assert "  # - ../../components/redis" in text
    file.write_text(text.replace("  # - ../../components/redis", "  - ../../components/redis"))
    docs = render_folder(overlay)
    (cluster,) = clusters(docs)
    assert "redisAddress" in cluster.spec["gcsFaultToleranceOptions"]
    assert [error for check in CHECKS for error in check(docs)] == []


def test_job_names_differ_between_overlays() -> None:
    """Overlays share base/; their jobs have different names, so that one can be deleted while another runs."""
    names = [(doc["kind"], doc["metadata"]["name"]) for name in ("train", "sweep", "predict") for doc in render(name)]
    assert sorted(name for kind, name in names if kind == "RayJob") == ["predict", "sweep", "train"]


def test_paths_in_the_readme_exist() -> None:
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"overlays/([a-z-]+)", text)) == set(OVERLAYS)
    for path in re.findall(r"cluster/kubernetes/[\w./-]+", text):
        assert (FOLDER.parents[1] / path).exists(), path


def test_sed_in_the_readme_replaces_every_placeholder(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "cluster" / "kubernetes")
    (command,) = re.findall(r"(?s)```\n(grep .*?)```", (FOLDER / "README.md").read_text())
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True)
    for file in (tmp_path / "cluster").rglob("*.yaml"):
        assert not re.search(r"BUCKET|registry\.example|cells\.example|0{12}", file.read_text()), file
    assert "s3://my-cells/runs/paper" in (tmp_path / "cluster/kubernetes/overlays/train/rayjob.yaml").read_text()
