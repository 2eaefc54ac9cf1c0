"""What a report of `medusa-ds bench` says: figures that follow from others, and its tables."""

from typing import Any

from medusa_ds.benchmarks.cases import EPOCHS

_HEADER = (
    "part",
    "stage",
    "heads",
    "batch x seq",
    "GPUs",
    "implementation",
    "ZeRO",
    "ms (range)",
    "tokens/s",
    "supervised/s",
    "TFLOP/s",
    "of ceiling",
    "peak GiB",
    "reserved",
    "x original",
    "x one GPU",
)


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
        f"{machine['device']}: bf16 matrix product {machine['matmul_tflops']:.4g} TFLOP/s, copy "
        f"{machine['copy_gb_per_s']:.4g} GB/s",
        "",
    ]
    rows = [_HEADER, *(_row(result) for result in report["results"] if result["part"] != "head")]
    if len(rows) > 1:
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for result in report["results"]:
        if result["part"] == "head":
            lines.append(_head(result))
        if "total_s" in result:
            lines.append(
                f"{EPOCHS} epochs, {result['impl']}: {result['num_steps']} steps, before them "
                f"{result['startup_s']:.1f} s, {result['total_s']:.1f} s in all"
            )
        if "profile" in result:
            lines.append(_profile(result))
    return "\n".join(lines)


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    place = (
        result["part"],
        str(result["stage"]),
        str(result["heads"]),
        f"{result['batch']} x {result['sequence']}",
        str(result["gpus"]),
        result["impl"],
        result["zero"] if result["zero"] != "auto" else f"auto: {result.get('trained_with')}",
    )
    if "median_s" not in result:
        note = "out of memory" if "out_of_memory" in result else f"failed: {result['failed']}"
        return (*place, note, *[""] * (len(_HEADER) - len(place) - 1))
    milliseconds = [1e3 * result[key] for key in ("median_s", "min_s", "max_s")]
    memory = [
        f"{result[key]:.1f}" if result[key] is not None else "" for key in ("peak_allocated_gib", "peak_reserved_gib")
    ]
    times = [f"{result[key]:.2f}" if key in result else "" for key in ("times_original", "times_one_gpu")]
    return (
        *place,
        "{:.0f} ({:.0f}-{:.0f})".format(*milliseconds),
        f"{result['tokens_per_s']:.0f}",
        f"{result['supervised_tokens_per_s']:.0f}",
        f"{result['tflops']:.3g}",
        f"{result['of_ceiling']:.2f}",
        *memory,
        *times,
    )


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
