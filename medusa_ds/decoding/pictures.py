"""Pictures of an evaluation and of a tree."""

from pathlib import Path
from typing import Any

from medusa_ds.decoding.trees import RankCounts, Tree
from medusa_ds.errors import UserError
from medusa_ds.files import check_writable, explained


def draw_evaluation(heads: dict[str, Any], distribution: dict[str, int], file: str | Path) -> None:
    """Accuracy per head, `heads["head{k}"]["top{n}"]`, and the histogram of steps by their accepted tokens.

    Raises:
        UserError: the file cannot be written.
    """
    figure = new_figure(9, 3.5)
    left, right = figure.subplots(1, 2)
    names = [name for name in heads if name.startswith("head")]
    for name in names:
        left.plot([top.removeprefix("top") for top in heads[name]], list(heads[name].values()), marker="o", label=name)
    left.set(xlabel="among the first n guesses", ylabel="share of right guesses", ylim=(0, 1), title="Heads")
    left.legend()
    total = max(sum(distribution.values()), 1)
    right.bar(list(distribution), [count / total for count in distribution.values()])
    right.set(xlabel="tokens of a step", ylabel="share of steps", title="Accepted tokens")
    save_figure(figure, file)


def draw_tree(tree: Tree, counts: RankCounts, file: str | Path) -> None:
    """The tree, its nodes as large as they are probable; the ranks stand beside the more probable ones.

    Raises:
        UserError: the file cannot be written.
    """
    figure = new_figure(10, 2 + 1.2 * tree.depth)
    axes = figure.subplots()
    paths = [(), *tree.paths]
    leaves = [path for path in paths if not any(other[:-1] == path for other in paths if other)]
    place = {path: float(column) for column, path in enumerate(sorted(leaves))}
    for path in sorted(paths, key=len, reverse=True):
        below = [place[other] for other in paths if other and other[:-1] == path]
        place.setdefault(path, sum(below) / max(len(below), 1))
    for path in paths:
        probability = counts.joint_probability(path) if path else 1.0
        if path:
            axes.plot([place[path[:-1]], place[path]], [1 - len(path), -len(path)], color="0.7", zorder=1)
        axes.scatter(place[path], -len(path), s=20 + 400 * probability, color="C0", zorder=2)
        if path and probability > 0.02:
            axes.annotate(f"{path[-1]}: {probability:.0%}", (place[path], -len(path)), fontsize=7, va="bottom")
    axes.set_axis_off()
    axes.set_title(f"{tree.nodes} nodes; rank of each head's guess and how often its path is right")
    save_figure(figure, file)


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches."""
    from matplotlib.figure import Figure  # half a second that most commands do not need

    return Figure(figsize=(width, height), layout="constrained")


def check_picture(file: Path) -> None:
    """Refuse, before what it shows is measured, a picture that could not be written.

    Raises:
        UserError: see `check_writable`; or a suffix that is no format.
    """
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--picture: {file}: found no picture's suffix; name a .png, .svg or .pdf file")
    check_writable(file, "--picture")


def save_figure(figure: Any, file: str | Path) -> None:
    """Write a figure; the suffix says the format.

    Raises:
        UserError: it cannot be written.
    """
    with explained(f"{file}: cannot be written", "name another file"):
        Path(file).absolute().parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
