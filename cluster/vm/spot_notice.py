"""On a spot machine of EC2: wait for the notice that it will be taken away, and drain its Ray node in time.

`ray up` starts it on every worker; Ray itself does not look for the notice. Draining tells Ray Train, which saves a
checkpoint within the two minutes that EC2 leaves. A machine that is not a spot one waits forever and does nothing.

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
# EC2 recommends to look every 5 seconds.
LOOK_S = 5.0
# What the machine needs to stop, after the checkpoint.
MARGIN_S = 10


def fetch(url: str, method: str, **headers: str) -> str:
    """The answer of the metadata service, which is on this machine: an answer that takes seconds is none."""
    request = urllib.request.Request(url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    with urllib.request.urlopen(request, timeout=2) as answer:
        return answer.read().decode()


def end(metadata: str) -> datetime | None:
    """When the machine will be taken away; none as long as nobody said so."""
    try:
        token = fetch(f"{metadata}/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
        notice = fetch(f"{metadata}/latest/meta-data/spot/instance-action", "GET", X_aws_ec2_metadata_token=token)
        return datetime.strptime(json.loads(notice)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except (OSError, ValueError, KeyError):  # 404 is the usual answer; a service that stutters is asked again
        return None


def drain(seconds: float) -> int:
    """Tell Ray that this node goes away in so many seconds; the exit code of `ray drain-node`."""
    words = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "EC2 takes this spot machine away"]
    words += ["--deadline-remaining-seconds", str(max(1, int(seconds) - MARGIN_S))]
    return subprocess.run(words, check=False).returncode


def main(metadata: str = METADATA) -> int:
    """Look until there is a notice, then drain; the exit code."""
    while (known := end(metadata)) is None:
        time.sleep(LOOK_S)
    print(f"this machine goes at {known:%H:%M:%S} UTC", flush=True)
    return drain((known - datetime.now(timezone.utc)).total_seconds())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
