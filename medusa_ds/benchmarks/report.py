"""What a report of `medusa-ds bench` says: figures that follow from others, and its tables."""

from typing import Any

from medusa_ds.benchmarks.cases import EPOCHS


def compare(report: dict[str, Any]) -> None:
    """Add what follows from other figures of the run: the share of the GPUs' ceiling, and how much faster than others.

    `times_original` compares supervised tokens per GPU-second with the original's at the same settings,
    `times_one_gpu` those per second with the same on one GPU.
    """
    results = [result for result in report["results"] if "median_s" in result]
    settings = ("part", "stage", "heads", "sequence", "batch")
    places = [tuple(result[key] for key in settings) for result in results]
    single = {(*place, r["impl"], r["zero"]): r for place, r in zip(places, results, strict=True) if r["gpus"] == 1}
    originals = {key[:-2]: result for key, result in single.items() if key[-2] == "original"}
    for place, result in zip(places, results, strict=True):
        speed, alone = result["supervised_tokens_per_s"], single.get((*place, result["impl"], result["zero"]))
        result["of_ceiling"] = result["tflops"] / result["gpus"] / report["machine"]["matmul_tflops"]
        if original := originals.get(place):
            result["times_original"] = speed / result["gpus"] / original["supervised_tokens_per_s"]
        if result["gpus"] > 1 and alone:
            result["times_one_gpu"] = speed / alone["supervised_tokens_per_s"]


def describe(report: dict[str, Any]) -> str:
    """The tables of a report."""
    machine = report["machine"]
    lines = [
        f"{machine['device']}: {'fp32' if machine['device'] == 'cpu' else 'bf16'} matrix product "
        f"{machine['matmul_tflops']:.4g} TFLOP/s, copy "
        f"{machine['copy_gb_per_s']:.4g} GB/s",
        "",
    ]
    if rows := [_row(result) for result in report["results"] if result["part"] != "head"]:
        widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in max(rows, key=len)}
        table = [{name: name for name in widths}, *rows]
        lines += ["  ".join(row.get(name, "").ljust(widths[name]) for name in widths).rstrip() for row in table]
    for result in report["results"]:
        if result["part"] == "head":
            lines.append(_head(result))
        if "total_s" in result:
            lines.append(
                f"{EPOCHS} epochs, {result['impl']}: {result['num_steps']} steps, before them "
                f"{result['startup_s']:.1f} s, {result['total_s']:.1f} s in all"
            )
        if "profile" in result and result["profile"]["kernels"]:  # a CPU's trace has none
            lines.append(_profile(result))
    return "\n".join(lines)


def _row(result: dict[str, Any]) -> dict[str, str]:
    """A line of the table, by column; one without figures ends with the reason."""
    row = {
        "part": result["part"],
        "stage": str(result["stage"]),
        "heads": str(result["heads"]),
        "batch x seq": f"{result['batch']} x {result['sequence']}",
        "GPUs": str(result["gpus"]),
        "implementation": result["impl"],
        "ZeRO": result["zero"] if result["zero"] != "auto" else f"auto: {result.get('trained_with')}",
    }
    if "median_s" not in result:
        return row | {"ms (range)": "out of memory" if "out_of_memory" in result else f"failed: {result['failed']}"}
    milliseconds = [1e3 * result[key] for key in ("median_s", "min_s", "max_s")]
    gib = [result["peak_allocated_gib"], result["peak_reserved_gib"]]
    allocated, reserved = ("" if size is None else f"{size:.1f}" for size in gib)
    times = [f"{result[key]:.2f}" if key in result else "" for key in ("times_original", "times_one_gpu")]
    return row | {
        "ms (range)": "{:.0f} ({:.0f}-{:.0f})".format(*milliseconds),
        "tokens/s": f"{result['tokens_per_s']:.0f}",
        "supervised/s": f"{result['supervised_tokens_per_s']:.0f}",
        "TFLOP/s": f"{result['tflops']:.3g}",
        "of ceiling": f"{result['of_ceiling']:.2f}",
        "peak GiB": allocated,
        "reserved": reserved,
        "x original": times[0],
        "x one GPU": times[1],
    }


def _head(result: dict[str, Any]) -> str:
    if "ways" not in result:
        return f"head: {result.get('failed') or 'out of memory'}"
    lines = [
        f"\none head's loss, forward and backward, {result['rows']} rows, hidden {result['hidden']}, vocabulary "
        f"{result['vocab']}"
    ]
    for name, way in result["ways"].items():
        memory = f", {way['extra_gib']:.2f} GiB beyond the inputs" if way["extra_gib"] is not None else ""
        lines.append(
            f"  {name:16} {way['median_ms']:.1f} ms ({way['min_ms']:.1f}-{way['max_ms']:.1f}), "
            f"{way['tflops']:.3g} TFLOP/s{memory}"
        )
    return "\n".join(lines)


def _profile(result: dict[str, Any]) -> str:
    profile = result["profile"]
    lines = [f"\nwhere {profile['step_ms']:.1f} ms of a profiled step went, {result['impl']}:"]
    gaps = {name: ms for name, ms in profile["gaps"].items() if ms >= 0.2}
    for title, values in (("part", profile["parts"]), ("idle", gaps), ("kernel", profile["kernels"])):
        lines += [f"  {title:7} {ms:8.2f} ms  {name}" for name, ms in sorted(values.items(), key=lambda x: -x[1])]
    return "\n".join(lines)
