#!/usr/bin/env bash
# What a node of `ray up` needs: ~/venv with this project, as constraints.txt pins it. Done before, it does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! python3 -m venv --help >/dev/null 2>&1 || ! python3 -c 'import ensurepip' 2>/dev/null; then
  # A machine that has just started may still be at its own first steps, which hold the lock of apt.
  sudo env DEBIAN_FRONTEND=noninteractive sh -c 'apt-get -o DPkg::Lock::Timeout=300 update -qq &&
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends python3-venv'
fi
[ -x ~/venv/bin/pip ] || python3 -m venv ~/venv

# Ray's launcher calls plain `ray` through ssh: `ray down` and `ray exec` should find it, and the token's use too.
# shellcheck disable=SC2016  # the shell that reads it says where its home is
line='export PATH=$HOME/venv/bin:$PATH RAY_AUTH_MODE=token'
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >>~/.bashrc

# PyPI's torch brings CUDA along, gigabytes that a machine without a GPU does not need.
index=()
nvidia-smi -L >/dev/null 2>&1 || index=(--index-url https://download.pytorch.org/whl/cpu)
~/venv/bin/pip install -q --no-deps "${index[@]}" -c constraints.txt torch
~/venv/bin/pip install -q -c constraints.txt .
