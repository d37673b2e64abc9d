"""On an EC2 spot machine: wait for the interruption notice, then drain the Ray node before the machine stops.

`ray up` starts it on every worker; Ray itself does not poll for the notice. Draining makes Ray Train save a checkpoint
within the two minutes between notice and interruption. On an on-demand machine it waits forever.

    python spot_notice.py [URL of the metadata service]
"""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone

METADATA = "http://169.254.169.254"
# EC2 recommends polling every 5 seconds.
POLL_S = 5.0
# Seconds that the machine needs to stop, after the checkpoint.
MARGIN_S = 10


def fetch(url: str, method: str, **headers: str) -> str:
    """Response of the metadata service, which is local to the machine: a timeout of 2 s is sufficient."""
    request = urllib.request.Request(url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    with urllib.request.urlopen(request, timeout=2) as response:
        return response.read().decode()


def stop_time(metadata: str) -> datetime | None:
    """Time of the interruption; None without a notice."""
    try:
        token = fetch(f"{metadata}/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
        notice = fetch(f"{metadata}/latest/meta-data/spot/instance-action", "GET", X_aws_ec2_metadata_token=token)
        return datetime.strptime(json.loads(notice)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except (OSError, ValueError, KeyError):  # 404 without a notice; other failures are retried at the next poll
        return None


def drain(seconds: float) -> int:
    """Drain this Ray node, which stops in `seconds`; returns the exit code of `ray drain-node`."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "EC2 spot interruption"]
    command += ["--deadline-remaining-seconds", str(max(1, int(seconds) - MARGIN_S))]
    return subprocess.run(command, check=False).returncode


def main(metadata: str = METADATA) -> int:
    """Poll for the notice, then drain; returns the exit code."""
    while (stop := stop_time(metadata)) is None:
        time.sleep(POLL_S)
    print(f"spot interruption at {stop:%H:%M:%S} UTC", flush=True)
    return drain((stop - datetime.now(timezone.utc)).total_seconds())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
