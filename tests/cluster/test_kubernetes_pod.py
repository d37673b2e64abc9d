"""A Pod's container simulated without Kubernetes: its user, its mounts, a read-only root.

Ray starts there, the job of overlays/train runs twice (a retry resumes), and SIGTERM drains the node.
"""

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kuberay import ROOT, jobs, pods, render

# The root is a read-only tmpfs into which the system, the interpreter and the project are bind-mounted. $1: its path;
# $2: the dataset; $3: folders to bind; $4: folders that the Pod may write to. Those are mounted first, as the
# project may be in /tmp.
CONTAINER = """
set -e
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs "$1"
for path in $4; do mkdir -p "$1$path"; mount -t tmpfs -o mode=1777 tmpfs "$1$path"; done
for path in /usr /bin /sbin /lib /lib64 /etc $3; do
  mkdir -p "$1${path%/*}"
  if [ -L "$path" ]; then cp -a "$path" "$1$path"; continue; fi
  [ -d "$path" ] || continue
  mkdir -p "$1$path"; mount --bind "$path" "$1$path"; mount -o remount,bind,ro "$1$path"
done
mkdir -p "$1/app/jobs" "$1/proc" "$1/sys" "$1/dev"
mount --bind "$PWD/jobs" "$1/app/jobs"; mount -o remount,bind,ro "$1/app/jobs"
mount -t proc proc "$1/proc"; mount --rbind /sys "$1/sys"; mount --rbind /dev "$1/dev"
mkdir "$1/tmp/bucket"; cp -r "$2" "$1/tmp/bucket/shards"; chown -R 1000:1000 "$1/tmp/bucket"
mount -o remount,ro "$1"
exec chroot "$1" setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \\
  bash -c 'cd /app && eval "$NODE"'
"""

NODE = """
fail() { cat "$@" /tmp/node.log; tail -n 40 /tmp/ray/session_latest/logs/dashboard*.log; exit 1; }
touch /app/jobs/x /usr/x /x 2>&1
start="ray start --head --block --num-cpus=3 --object-store-memory=200000000"
bash -c -- "ulimit -n 65536; $start" >/tmp/node.log 2>&1 &
node=$!
until (: </dev/tcp/127.0.0.1/8265) 2>/dev/null; do kill -0 $node || fail; sleep 1; done
ray health-check --address 127.0.0.1:6379 || fail
for run in first retry; do
  until ray job submit --address http://127.0.0.1:8265 -- $ENTRYPOINT >/tmp/$run.log 2>&1; do
    grep -q "try again later" /tmp/$run.log || fail /tmp/$run.log
    sleep 1
  done
  cat /tmp/$run.log
done
RAY_AUTH_TOKEN=wrong ray job list --address http://127.0.0.1:8265 2>&1 | grep -qi authentication \\
  && echo "unauthenticated calls refused: yes"
grep -rlE "Read-only file system|Permission denied" /tmp/ray/session_latest/logs \\
  | sed "s/^/log with a permission error: /"
kill -TERM $node; wait $node; cat /tmp/node.log; ls /tmp/bucket/runs/paper
"""

SMALL = "--crop 40 40 --model.features 4 8 --phases.0.epochs 1 --loop.precision float32"


def has_namespaces() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run(["unshare", "-m", "-n", "-p", "-f", "true"], capture_output=True).returncode == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)  # uses its own namespaces, so it may run in parallel with other tests of Ray
def test_ray_and_a_job_run_within_the_limits_of_the_pod(tiny_dataset: str, tmp_path: Path) -> None:
    if not has_namespaces():
        pytest.skip("needs Linux, util-linux, iproute2 and root with the right to create namespaces")
    overlay = render("train")
    (job,) = jobs(overlay)
    (head,) = [pod for pod in pods(overlay) if pod.name == "head"]
    writable = [mount["mountPath"] for mount in head.spec["containers"][0]["volumeMounts"]]
    env = {variable["name"]: variable["value"] for variable in head.spec["containers"][0]["env"]} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin:/usr/sbin:/bin:/sbin",
        "HOME": "/home/ray",
        "NODE": NODE,
        "ENTRYPOINT": f"{job.spec['entrypoint'].replace('s3://BUCKET', '/tmp/bucket')} {SMALL}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "3",
    }
    bind_folders = " ".join(dict.fromkeys([sys.base_prefix, sys.prefix, str(ROOT)]))
    command = ["unshare", "-m", "-n", "-p", "-f", "--propagation", "private", "bash", "-c", CONTAINER, "container"]
    command += [str(tmp_path), tiny_dataset, bind_folders, " ".join(writable)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1100)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert [output.count(f"touch: cannot touch '{path}'") for path in ("/app/jobs/x", "/usr/x", "/x")] == [1, 1, 1]
    assert output.count("succeeded") == 2
    assert "unauthenticated calls refused: yes" in output
    assert "log with a permission error" not in output, output
    assert "received SIGTERM. Draining for up to 3.0 seconds" in output
    assert "report.html" in output
