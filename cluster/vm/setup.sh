#!/usr/bin/env bash
# Set up a node of `ray up`: ~/venv with this project and the versions in constraints.txt. Repeated runs change nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! python3 -m venv --help >/dev/null 2>&1 || ! python3 -c 'import ensurepip' 2>/dev/null; then
  # On a machine that has just booted, its initialisation may hold apt's lock.
  sudo env DEBIAN_FRONTEND=noninteractive sh -c 'apt-get -o DPkg::Lock::Timeout=300 update -qq &&
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends python3-venv'
fi
[ -x ~/venv/bin/pip ] || python3 -m venv ~/venv

# Ray's launcher calls `ray` over ssh: `ray down` and `ray exec` need it on PATH, and token authentication.
# shellcheck disable=SC2016  # expanded by the shell that reads .bashrc
line='export PATH=$HOME/venv/bin:$PATH RAY_AUTH_MODE=token'
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >>~/.bashrc

# PyPI's torch includes gigabytes of CUDA, which a machine without a GPU does not need.
index=()
nvidia-smi -L >/dev/null 2>&1 || index=(--index-url https://download.pytorch.org/whl/cpu)
~/venv/bin/pip install -q --no-deps "${index[@]}" -c constraints.txt torch
~/venv/bin/pip install -q -c constraints.txt .
