"""One head's loss alone, forward and backward: ours, Liger's defaults, PyTorch's own."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from medusa_ds.benchmarks.cases import Case
from medusa_ds.benchmarks.original import torch_linear_ce
from medusa_ds.model.backbone import load_config
from medusa_ds.model.loss import linear_cross_entropy, resolve_impl

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
_WEIGHT = 0.8  # of a head's loss, so that its gradient is scaled once: by ours while it is made


def measure_head(case: Case) -> dict[str, Any]:
    """Milliseconds and MiB of each implementation, at `batch x sequence` rows of the recipe's model."""
    recipe = case.load_recipe()
    config = load_config(recipe.model).get_text_config()
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    num_rows, hidden, vocab = case.batch * case.sequence, config.hidden_size, config.vocab_size
    torch.manual_seed(0)
    rows = torch.randn(num_rows, hidden, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, device=device, dtype=dtype) * 0.02).requires_grad_()
    targets = torch.randint(0, vocab, (num_rows,), device=device)
    impl = resolve_impl(recipe.loss.impl, device)
    chunk_mib, scale = recipe.loss.chunk_mib, torch.tensor(_WEIGHT, device=device)
    ways: dict[str, Loss] = {
        "ours": lambda rows, weight, targets: linear_cross_entropy(rows, weight, targets, impl, chunk_mib, scale)[0]
    }
    if on_gpu:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger  # needs Triton

        ways["liger_bf16"] = lambda *tensors: liger(*tensors, reduction="sum") * _WEIGHT
        ways["liger_fp32"] = lambda *tensors: liger(*tensors, reduction="sum", accum_dtype=torch.float32) * _WEIGHT
    if hasattr(nn.functional, "linear_cross_entropy"):
        ways["torch_linear_ce"] = lambda rows, weight, targets: torch_linear_ce(rows, weight, targets, "sum") * _WEIGHT
    return {
        "rows": num_rows,
        "hidden": hidden,
        "vocab": vocab,
        "chunk_mib": recipe.loss.chunk_mib,
        "ways": {name: _measure(way, rows, weight, targets, case) for name, way in ways.items()},
    }


def _measure(loss: Loss, rows: Tensor, weight: Tensor, targets: Tensor, case: Case) -> dict[str, Any]:
    on_gpu, seconds, before = rows.is_cuda, [], 0
    for number in range(case.warmup + case.steps):
        rows.grad = weight.grad = None
        if on_gpu:
            torch.cuda.synchronize()
            if number == case.warmup:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        loss(rows, weight, targets).backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    seconds = seconds[case.warmup :]
    median = statistics.median(seconds)
    return {
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
        "tflops": 6 * rows.numel() * weight.shape[0] / median / 1e12,
        "extra_gib": (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None,
    }
