#!/usr/bin/env bash
# Triton 3.9.0's interpreter refuses a mask that joins a block's condition with a scalar's; 3.8.0 runs the same kernel.
#
# `tl.store(pointers, values, mask=(block < n) & (flag >= 0))` with `flag` a scalar is ordinary Triton, and compiles.
# Under TRITON_INTERPRET=1 Triton 3.9.0 ends in "mask has unsupported dtype". Kernels of vLLM are written so, among them
# the one that draws drafts by probability (vllm/v1/worker/gpu/sample/gumbel.py: gumbel_block_argmax).
# Seen 2026-11-28 on x86-64 Linux, Python 3.11, numpy 2.3.5:
#     3.8.0: [1 2 3 4 5 0 0 0]
#     3.9.0: InterpreterError: ValueError('mask has unsupported dtype')
# What helps: Triton 3.8.0 where kernels are interpreted, or `tl.full(block.shape, flag, tl.int32) >= 0` in the mask.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/kernel.py" <<'PYTHON'
import numpy, triton, triton.language as tl

@triton.jit
def kernel(address, flag, block_size: tl.constexpr):
    block = tl.arange(0, block_size)
    mask = (block < 5) & (flag >= 0)
    tl.store(address.to(tl.pointer_type(tl.int64)) + block, block + 1, mask=mask)

out = numpy.zeros(8, dtype=numpy.int64)
try:
    kernel[(1,)](out.ctypes.data, 3, 8)
    print(f"{triton.__version__}: {out}")
except Exception as error:
    print(f"{triton.__version__}: {type(error).__name__}: {error}")
PYTHON
ask() {
  python3 -m venv "$work/$1"
  "$work/$1/bin/pip" install --quiet "triton==$1" numpy==2.3.5
  TRITON_INTERPRET=1 "$work/$1/bin/python" "$work/kernel.py"
}
old=$(ask 3.8.0) found=$(ask 3.9.0)
printf '%s\n%s\n' "$old" "$found"
[ "$old" = "3.8.0: [1 2 3 4 5 0 0 0]" ] && [[ $found == *"mask has unsupported dtype"* ]] || { echo "this has changed"; exit 1; }
