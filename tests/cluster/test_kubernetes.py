"""cluster/kubernetes: every overlay rendered and checked, and every check shown to reject a manifest broken for it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay import FOLDER, OVERLAYS, Rule, broken, render
from kuberay_rules import RULES
from kubernetes_broken import BROKEN
from kubernetes_code import AGREEMENTS
from kubernetes_promises import PROMISES
from kubernetes_schemas import SCHEMAS, core_faults

CHECKS: tuple[Rule, ...] = (*SCHEMAS, *RULES, *PROMISES, *AGREEMENTS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_overlay_passes(overlay: str, check: Rule) -> None:
    assert list(check(render(overlay))) == []


@pytest.mark.parametrize(
    ("check", "where", "edits", "told"), BROKEN, ids=[f"{one[0].__name__}-{one[3]}" for one in BROKEN]
)
def test_the_check_rejects_what_is_broken(check: Rule, where: str, edits: dict[str, Any], told: str) -> None:
    faults = list(check(broken(where, edits)))
    assert any(told in fault for fault in faults), faults


def test_every_check_is_shown_to_reject() -> None:
    assert {check for check, *_ in BROKEN} == set(CHECKS)


def test_the_namespace_refuses_pods_with_rights() -> None:
    doc = yaml.safe_load((FOLDER / "namespace.yaml").read_text())
    assert core_faults(json.dumps(doc)) == ()
    assert doc["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name not in ("cpu", "gpu")])
def test_a_job_brings_its_cluster_and_no_other_is_left(overlay: str) -> None:
    kinds = [doc["kind"] for doc in render(overlay)]
    assert "RayCluster" not in kinds
    assert sum(kind in ("RayJob", "RayCronJob") for kind in kinds) == 1


def test_no_two_overlays_of_jobs_take_each_others_names() -> None:
    """They share base/; beyond it each has names of its own, so that one can be deleted while another runs."""
    made = [(doc["kind"], doc["metadata"]["name"]) for name in ("train", "sweep", "predict") for doc in render(name)]
    assert sorted(name for kind, name in made if kind == "RayJob") == ["predict", "sweep", "train"]


def test_the_readme_names_what_is_there() -> None:
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"overlays/([a-z-]+)", text)) == set(OVERLAYS)
    for path in re.findall(r"cluster/kubernetes/[\w./-]+", text):
        assert (FOLDER.parents[1] / path).exists(), path


def test_the_readmes_sed_leaves_no_placeholder(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "cluster" / "kubernetes")
    (command,) = re.findall(r"(?s)```\n(grep .*?)```", (FOLDER / "README.md").read_text())
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True)
    for file in (tmp_path / "cluster").rglob("*.yaml"):
        assert not re.search(r"BUCKET|registry\.example|0{12}", file.read_text()), file
    assert "s3://my-cells/runs/paper" in (tmp_path / "cluster/kubernetes/overlays/train/rayjob.yaml").read_text()
