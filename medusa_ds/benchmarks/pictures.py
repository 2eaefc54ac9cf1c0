"""Pictures of a benchmark's JSON: memory and throughput over the sequence length, by stage and number of heads."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medusa_ds.decoding.pictures import new_figure, save_figure

_LABELS = {
    "ours": "ours, with Liger",
    "ours_fp8": "ours, fp8 frozen forward",
    "eager": "ours, without Liger",
    "original": "original, corrected",
    "torch_linear_ce": "original, PyTorch's loss",
}


def draw(report: dict[str, Any], directory: str | Path) -> list[Path]:
    """One picture of memory and one of throughput for every stage and number of heads; out of memory is a cross.

    Args:
        report: what `medusa-ds bench` wrote.
        directory: made if missing.

    Returns:
        The files.

    Raises:
        UserError: a file cannot be written.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    steps = [result for result in report["results"] if result["part"] == "step"]
    files = []
    for stage, heads in sorted({(result["stage"], result["heads"]) for result in steps}):
        chosen = [result for result in steps if (result["stage"], result["heads"]) == (stage, heads)]
        for kind, key, label in (
            ("memory", "peak_reserved_gib", "peak reserved memory of a GPU, GiB"),
            ("throughput", "tokens_per_s", "tokens/s a GPU"),
        ):
            figure = new_figure(6, 4)
            axes = figure.subplots()
            _lines(axes, chosen, key)
            if kind == "throughput":
                _ceiling(axes, chosen, report["machine"]["matmul_tflops"])
            batch = chosen[0]["batch"]
            axes.set(
                xlabel="sequence length",
                ylabel=label,
                xscale="log",
                ylim=(0, None),
                title=f"stage {stage}, {heads} heads, batch {batch}, {report['machine']['device']}",
            )
            lengths = sorted({result["sequence"] for result in chosen})
            axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
            axes.minorticks_off()
            axes.legend(fontsize=8)
            files.append(Path(directory) / f"{kind}_stage{stage}_heads{heads}.svg")
            save_figure(figure, files[-1])
    return files


def _lines(axes: Any, results: Iterable[dict[str, Any]], key: str) -> None:
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        lines.setdefault((result["impl"], result["gpus"]), []).append(result)
    for number, ((impl, gpus), points) in enumerate(lines.items()):
        share = gpus if key == "tokens_per_s" else 1
        good = sorted((point["sequence"], point[key] / share) for point in points if point.get(key) is not None)
        missing = [point["sequence"] for point in points if "out_of_memory" in point]
        color, label = f"C{number}", _LABELS[impl] + (f", {gpus} GPUs" if gpus > 1 else "")
        axes.plot(*zip(*good, strict=True) if good else ([], []), marker="o", color=color, label=label)
        if missing:
            axes.plot(missing, [0] * len(missing), "x", color=color, clip_on=False, label=f"{label}: no memory")


def _ceiling(axes: Any, results: list[dict[str, Any]], tflops: float) -> None:
    """Tokens/s if every model FLOP ran at the measured rate of a large matrix product."""
    flops = {result["sequence"]: result["flops"] / result["tokens"] for result in results if "flops" in result}
    points = sorted((sequence, tflops * 1e12 / each) for sequence, each in flops.items())
    if points:
        axes.plot(*zip(*points, strict=True), "--", color="0.5", label=f"matmul ceiling, {tflops:.0f} TFLOP/s")
