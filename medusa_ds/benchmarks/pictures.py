"""Pictures of a benchmark's JSON: memory and throughput by length, stage and number of heads; tokens/s by GPUs."""

from collections import defaultdict
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
_SIZE = ("heads", "batch", "sequence")


def draw(report: dict[str, Any], directory: str | Path) -> list[Path]:
    """One picture of memory and one of throughput for every stage and number of heads; out of memory is a cross.

    They show each implementation on the most GPUs that it was measured on. Where there are several numbers of GPUs, one
    more picture shows how tokens/s grow with them. Returns the files, in a directory that is made if missing.

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
            axes.set(xlabel="sequence length", ylabel=label, xscale="log", ylim=(0, None))
            axes.set_title(f"stage {stage}, {heads} heads, batch {batch}\n{_machine(report)}", fontsize=9)
            lengths = sorted({result["sequence"] for result in chosen})
            axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
            axes.minorticks_off()
            axes.legend(fontsize=8)
            files.append(Path(directory) / f"{kind}_stage{stage}_heads{heads}.svg")
            save_figure(figure, files[-1])
    if lines := _by_gpus(steps):
        figure = new_figure(6, 4)
        _scaling(figure.subplots(), lines, _machine(report))
        files.append(Path(directory) / "scaling.svg")
        save_figure(figure, files[-1])
    return files


def _machine(report: dict[str, Any]) -> str:
    versions = {name: version for name, version in report["machine"]["versions"].items() if version}
    shown = [f"{name} {versions[name]}" for name in ("torch", "deepspeed", "liger-kernel") if name in versions]
    return ", ".join([report["machine"]["device"], *shown])


def _by_gpus(steps: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Tokens/s of all GPUs by their number, of each stage, implementation and ZeRO config at its most measured size."""
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in sorted(steps, key=lambda step: (step["heads"], step["sequence"])):
        if result.get("tokens_per_s") is not None:
            line, size = [tuple(result[key] for key in keys) for keys in (("stage", "impl", "zero"), _SIZE)]
            found[line][size][result["gpus"]] = result["tokens_per_s"]
    lines = {}
    for (stage, impl, zero), sizes in sorted(found.items()):
        (heads, batch, sequence), rates = max(sizes.items(), key=lambda item: len(item[1]))  # of equals the first
        if len(rates) > 1:
            lines[f"stage {stage}, {_LABELS[impl]}, {zero}: {heads} heads, {batch} x {sequence} a GPU"] = rates
    return lines


def _scaling(axes: Any, lines: dict[str, dict[int, float]], machine: str) -> None:
    for number, (label, rates) in enumerate(lines.items()):
        gpus = sorted(rates)
        ideal = [rates[gpus[0]] / gpus[0] * count for count in gpus]
        axes.plot(gpus, [rates[count] for count in gpus], marker="o", color=f"C{number}", label=label)
        axes.plot(gpus, ideal, "--", color=f"C{number}", label=None if number else "ideal")
    counts = sorted({count for rates in lines.values() for count in rates})
    axes.set(xlabel="GPUs", ylabel="tokens/s of all", ylim=(0, None), xticks=counts)
    axes.set_title(machine, fontsize=9)
    axes.legend(fontsize=7)


def _lines(axes: Any, results: Iterable[dict[str, Any]], key: str) -> None:
    lines: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        lines[result["impl"], result["zero"]].append(result)
    for number, ((impl, zero), of_all_gpus) in enumerate(lines.items()):
        gpus = max(point["gpus"] for point in of_all_gpus)
        points = [point for point in of_all_gpus if point["gpus"] == gpus]
        share = gpus if key == "tokens_per_s" else 1
        good = sorted((point["sequence"], point[key] / share) for point in points if point.get(key) is not None)
        missing = [point["sequence"] for point in points if "out_of_memory" in point]
        several = len({other for each, other in lines if each == impl}) > 1
        color, label = f"C{number}", _LABELS[impl] + f", {zero}" * several + (f", {gpus} GPUs" if gpus > 1 else "")
        axes.plot(*zip(*good, strict=True) if good else ([], []), marker="o", color=color, label=label)
        if missing:
            axes.plot(missing, [0] * len(missing), "x", color=color, clip_on=False, label=f"{label}: no memory")


def _ceiling(axes: Any, results: list[dict[str, Any]], tflops: float) -> None:
    """Tokens/s if every model FLOP ran at the measured rate of a large matrix product."""
    flops = {result["sequence"]: result["flops"] / result["tokens"] for result in results if "flops" in result}
    points = sorted((sequence, tflops * 1e12 / each) for sequence, each in flops.items())
    if points:
        axes.plot(*zip(*points, strict=True), "--", color="0.5", label=f"matmul ceiling, {tflops:.0f} TFLOP/s")
