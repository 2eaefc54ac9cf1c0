#!/usr/bin/env bash
# Two versions of ninja that share a build folder rebuild each other's output every time.
#
# ninja 1.11.1 and 1.13.0 write .ninja_log in different versions, and each starts over where it finds the other's: a
# finished build is out of date for the other one. PyTorch keeps compiled extensions (DeepSpeed's among them: minutes of
# C++) in one folder for a user, whose name says Python and CUDA and not ninja. With a system ninja on PATH in one shell
# and a virtual environment's in another, every start compiles again, and ranks that wait for the folder's lock look hung.
# Seen 2026-11-28 with the wheels ninja 1.11.1.1 and 1.13.0 on x86-64 Linux:
#     after a build by 1.11.1: 1.11.1 says "no work to do", 1.13.0 warns "build log version is too old;
#     starting over" and plans 1 command; the other way round 1.11.1 plans it, without the warning.
# What helps: one ninja for everybody, or TORCH_EXTENSIONS_DIR for each environment.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pin in ninja==1.11.1.1 ninja==1.13.0; do
  python3 -m venv "$work/${pin#ninja==}"
  "$work/${pin#ninja==}/bin/pip" install --quiet "$pin"
done
mkdir "$work/build" && cd "$work/build"
echo 'int answer(void) { return 42; }' >source.c
printf 'rule copy\n  command = cp $in $out\nbuild object: copy source.c\n' >build.ninja
plan() { "$work/$1/bin/ninja" -n | tail -n 1; }
for pair in "1.11.1.1 1.13.0" "1.13.0 1.11.1.1"; do
  read -r first second <<<"$pair"
  rm -f .ninja_log object
  "$work/$first/bin/ninja" >/dev/null
  same=$(plan "$first") other=$(plan "$second")
  echo "built by $first: $first: $same | $second: $other"
  [ "$same" = "ninja: no work to do." ] && [ "$other" != "ninja: no work to do." ] || { echo "this has changed"; exit 1; }
done
