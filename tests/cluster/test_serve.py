"""cluster/vm/serve.yaml for `serve deploy`; the RayService's application in a Pod's container, without Kubernetes."""

import os
import re
import secrets
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from kuberay import ROOT, pods, render, services
from kubernetes_serve import SPILLING, config_errors
from test_kubernetes_pod import CONTAINER, has_namespaces

from raylivecell.cli import main
from raylivecell.core.errors import UserError
from raylivecell.runtime import session
from raylivecell.serving import application, service
from raylivecell.serving.guard import LOOPBACK_NAMES
from raylivecell.serving.settings import TOKEN_VARIABLE, ServeSettings

TEXT = (ROOT / "cluster" / "vm" / "serve.yaml").read_text()
HASH = "0" * 64
CONFIG = yaml.safe_load(TEXT.replace('"SHA256"', f'"{HASH}"'))


def test_serve_accepts_the_config() -> None:
    assert list(config_errors(CONFIG)) == []
    (deployed,) = CONFIG["applications"]
    settings = ServeSettings.model_validate(deployed["args"])
    assert deployed["name"] == application.NAME
    assert settings.require_token
    assert settings.token_sha256
    assert CONFIG["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("HeadOnly", "Head", "proxy_location"),
        ("host:", "hosts:", "Serve ignores http_options.hosts"),
        ("application:build", "application:run", "has no run"),
        ("max_replicas: 4", "max_replicas: 0", "max_replicas"),
        ('"SHA256"', '"secret"', "token_sha256"),
        ("min_replicas", "replicas", "replicas: Extra inputs"),
    ],
)
def test_a_broken_config_is_rejected(old: str, new: str, message: str) -> None:
    assert old in TEXT
    errors = list(config_errors(yaml.safe_load(TEXT.replace(old, new).replace('"SHA256"', f'"{HASH}"'))))
    assert any(message in error for error in errors), errors


def test_the_docker_command_of_the_guide_serves() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    (command,) = re.findall(r"^docker run ((?:.*\\\n)*.*)$", guide, re.MULTILINE)
    options, arguments = command.split("raylivecell:")
    tag, *words = shlex.split(arguments)
    assert f"docker build -t raylivecell:{tag} ." in (ROOT / "Dockerfile").read_text()
    with mock.patch("raylivecell.serving.service.run") as run:
        main.main(words)
    checkpoint, host, port, *_ = run.call_args.args
    assert f"-p 127.0.0.1:{port}:{port} " in options
    assert f":{Path(checkpoint).parent}:ro" in options
    assert host not in LOOPBACK_NAMES
    assert f"-e {TOKEN_VARIABLE} " in options


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_a_ray_that_serve_starts_spills_to_memory(random_checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(**_: int) -> None:
        raise UserError(f"spills to {os.environ[SPILLING]}")

    monkeypatch.setattr(session, "connect", connect)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match="spills to /dev/shm"):
        service.run(random_checkpoint, "127.0.0.1", 0, 1, 512)


# The node waits as KubeRay's probe of a worker does (/-/healthz), then for the application itself (/healthz).
NODE = """
fail() { cat /tmp/node.log /tmp/serve.log "$@"; tail -n 40 /tmp/ray/session_latest/logs/serve/*.log; exit 1; }
start="ray start --head --block --num-cpus=3 --object-store-memory=200000000"
bash -c -- "ulimit -n 65536; $start" >/tmp/node.log 2>&1 &
node=$!
until (: </dev/tcp/127.0.0.1/8265) 2>/dev/null; do kill -0 $node || fail; sleep 1; done
RAY_AUTH_TOKEN=wrong serve deploy --address http://127.0.0.1:8265 /tmp/bucket/shards/serve.yaml 2>&1 \\
  | grep -qi authentication && echo "deployment without the token refused: yes"
until serve deploy --address http://127.0.0.1:8265 /tmp/bucket/shards/serve.yaml >/tmp/serve.log 2>&1; do
  grep -q "try again later" /tmp/serve.log || fail
  sleep 1
done
until wget -q -T 2 -O - http://localhost:8000/-/healthz | grep success; do kill -0 $node || fail; sleep 1; done
until wget -q -T 9 -O - http://localhost:8000/healthz | grep ok; do kill -0 $node || fail; sleep 1; done
python - <<'END' || fail
import os, sys, httpx, numpy as np, cv2
image = cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (90, 120), np.uint8))[1].tobytes()
for headers in ({}, {"authorization": "Bearer " + os.environ["RAYLIVECELL_SERVE_TOKEN"]}):
    answer = httpx.post("http://127.0.0.1:8000/segment", content=image, headers=headers, timeout=60)
    print("segment", answer.status_code, len(answer.json().get("cells", [])) > 0)
END
tr '\\0' ' ' </proc/$(pgrep -o -x raylet)/cmdline | grep -o -- "--fallback_directory=[^ ]*"
grep -rlE "Read-only file system|Permission denied" /tmp/ray/session_latest/logs \\
  | sed "s/^/log with a permission error: /"
kill -TERM $node; wait $node; cat /tmp/node.log
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)  # uses its own namespaces, so it may run in parallel with other tests of Ray
def test_the_service_runs_within_the_limits_of_the_pod(random_checkpoint: str, tmp_path: Path) -> None:
    if not has_namespaces():
        pytest.skip("needs Linux, util-linux, iproute2 and root with the right to create namespaces")
    overlay = render("serve-cpu")
    (deployed,) = services(overlay)
    (worker,) = [pod for pod in pods(overlay) if pod.name == "serving"]
    config = deployed.spec["serveConfigV2"].replace("s3://BUCKET/runs/paper", "/tmp/bucket/shards")
    (Path(random_checkpoint) / "serve.yaml").write_text(config.replace("max_replicas: 2", "max_replicas: 1"))
    variables = worker.spec["containers"][0]["env"]
    env = {variable["name"]: variable["value"] for variable in variables if "value" in variable} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin:/usr/sbin:/bin:/sbin",
        "HOME": "/home/ray",
        "NODE": NODE,
        "PYTHONPATH": str(ROOT),
        TOKEN_VARIABLE: secrets.token_hex(32),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "3",
    }
    writable = " ".join(mount["mountPath"] for mount in worker.spec["containers"][0]["volumeMounts"])
    bind_folders = " ".join(dict.fromkeys([sys.base_prefix, sys.prefix, str(ROOT)]))
    command = ["unshare", "-m", "-n", "-p", "-f", "--propagation", "private", "bash", "-c", CONTAINER, "container"]
    command += [str(tmp_path), random_checkpoint, bind_folders, writable]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "deployment without the token refused: yes" in output
    assert "segment 401 False\nsegment 200 True" in output
    assert "--fallback_directory=/dev/shm" in output
    assert "log with a permission error" not in output, output
    assert "received SIGTERM. Draining for up to 3.0 seconds" in output
