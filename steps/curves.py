"""Step 9: ROC and precision-recall curves of the test images, each class against the rest."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from .lettering import explain, letter

FEW, WORST = 10, 5  # up to FEW classes are all named, else the WORST
GRID = np.linspace(0, 1, 201)  # where the curves of many classes are averaged
# Okabe and Ito, told apart by colour-blind readers: first drawn through, then dashed.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]
STYLES = [{"color": colour, "linestyle": style} for style in ("-", "--") for colour in COLOURS]
BOLD = {"linewidth": 1.6, "zorder": 3}  # above the frame, where the best curves run
MARKS = {"specificity": "o", "sensitivity": "s"}


@dataclass(frozen=True)
class Curve:
    """What differs between the two charts."""

    points: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # (true, score) to x, y
    average: Callable[[np.ndarray, np.ndarray], np.ndarray]  # x, y to y on GRID
    labels: tuple[str, str]  # of the axes
    area: str  # its key in metrics.json
    name: str
    corner: tuple[float, float]  # of x, where a good curve runs; y from 0.8 to 1


def roc_points(true: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 1 - specificity and sensitivity at each threshold, from booleans (n,) and scores (n,)."""
    return roc_curve(true, score)[:2]


def recall_points(true: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision as the corners of steps, from booleans (n,) and scores (n,).

    Steps, because a straight line between two points would promise too much (Davis and Goadrich 2006, doi
    10.1145/1143844.1143874). The area below them is the average precision.
    """
    precision, recall, _ = precision_recall_curve(true, score)
    reached, first = np.unique(recall[::-1], return_index=True)  # with the fewest false alarms
    return np.repeat(reached, 2)[1:-1], np.repeat(precision[::-1][first], 2)[2:]


def recall_average(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the precision at each recall of GRID, of corners of steps."""
    return y[np.searchsorted(x, GRID)]


ROC = Curve(
    roc_points, lambda x, y: np.interp(GRID, x, y),
    ("1 - specificity (false alarms)", "sensitivity (recall)"),
    "auroc", "AUROC", (0.0, 0.2),
)  # fmt: skip
PRECISION_RECALL = Curve(
    recall_points, recall_average, ("recall (sensitivity)", "precision"),
    "average_precision", "average precision", (0.8, 1.0),
)  # fmt: skip


def draw_curves(kind: Curve, labels: np.ndarray, probabilities: np.ndarray, results: dict) -> Figure:
    """Draw one chart from labels (n,), probabilities (n, classes) and the content of metrics.json.

    Of two classes the second alone, with the operating points; of more than FEW the average, and by name
    those of the lowest area. Good curves crowd into a corner, which is then drawn a second time, enlarged.
    """
    per_class, numbers = results["per_class"], {name: n for n, name in enumerate(results["per_class"])}
    measured = [name for name in numbers if kind.area in per_class[name]]
    measured = measured[1:] if len(numbers) == 2 else measured
    areas = np.array([per_class[name][kind.area] for name in measured])
    truths = [labels == numbers[name] for name in measured]
    shares, good = np.array([true.mean() for true in truths]), areas.mean() >= 0.9
    scores = (probabilities[:, numbers[name]] for name in measured)
    curves = [kind.points(*pair) for pair in zip(truths, scores, strict=True)]
    figure = Figure(layout="constrained")
    panels = figure.subplots(1, 2 if good else 1, squeeze=False)[0]
    many, shown = len(measured) > FEW, letter([*numbers])
    named = np.argsort(areas, kind="stable")[:WORST] if many else range(len(measured))
    for axes, sides, bottom in zip(panels, ((0, 1), kind.corner), (0, 0.8), strict=False):
        draw_chance(axes, kind, shares, many)
        if many:
            draw_all(axes, kind, curves, areas.mean())
        for style, place in zip(STYLES, named, strict=False):
            name = measured[place]
            found = [per_class[name][kind.area + end] for end in ("", "_low", "_high")]
            text = "{}: {:.3f} ({:.3f} to {:.3f})".format(shown[name], *found)
            axes.plot(*curves[place], **style, **BOLD, clip_on=axes is not panels[0], label=text)
        axes.set(xlim=sides, ylim=(bottom, 1), aspect="equal", xlabel=kind.labels[0], ylabel=kind.labels[1])
        axes.grid(alpha=0.3)
        draw_points(axes, kind, shares, results)
    for axes in panels[1:]:
        axes.set_title("the corner, enlarged")
        axes.locator_params(nbins=4)
    title = f"{kind.name} (95 % interval)" + (f"; named: the {len(named)} lowest" if many else "")
    lines = panels[0].get_legend_handles_labels()
    style = {"loc": "outside lower center", "ncols": len(panels), "fontsize": 8, "title_fontsize": 9}
    figure.legend(*lines, title=title, **style)
    figure.set_size_inches(10 if good else 6, 5.2 + 0.18 * -(-len(lines[0]) // len(panels)))
    explain(figure, [measured[place] for place in named], shown)
    return figure


def draw_chance(axes: Axes, kind: Curve, shares: np.ndarray, many: bool) -> None:
    """Draw what guessing reaches: in precision the share of the class, of many classes the mean share."""
    style = {"linewidth": 1, "linestyle": ":"}
    if kind is ROC:
        axes.plot([0, 1], [0, 1], color="grey", label="guessing", **style)
        return
    levels = [shares.mean()] if many else shares
    text = "guessing: the share of the class"
    for number, level in enumerate(levels):
        colour = "grey" if many else STYLES[number]["color"]
        axes.axhline(level, color=colour, label=None if number else text, **style)


def draw_all(axes: Axes, kind: Curve, curves: list, area: float) -> None:
    """Draw all curves thin and grey, their average bold."""
    lines, faint = [np.stack(curve, axis=1) for curve in curves], max(0.04, 5 / len(curves))
    axes.add_collection(LineCollection(lines, colors="black", linewidths=0.8, alpha=min(0.25, faint)))
    average = np.mean([kind.average(x, y) for x, y in curves], axis=0)
    axes.plot(
        GRID, average, color="black", linewidth=2.5, label=f"average of {len(curves):,} classes: {area:.3f}"
    )


def draw_points(axes: Axes, kind: Curve, shares: np.ndarray, results: dict) -> None:
    """Mark the operating points of two classes, whose thresholds the validation images chose."""
    limits = axes.get_xlim(), axes.get_ylim()
    for place, point in enumerate(results.get("operating_points", {}).get("points", ())):
        sensitivity, specificity = (point[name]["value"] for name in ("sensitivity", "specificity"))
        hits, false = sensitivity * shares[0], (1 - specificity) * (1 - shares[0])
        at = (1 - specificity, sensitivity) if kind is ROC else (sensitivity, hits / max(hits + false, 1e-12))
        if not all(low <= value <= high for value, (low, high) in zip(at, limits, strict=True)):
            continue
        text = f"{point['at']:.0%} {point['wanted']} on validation: threshold {point['threshold']:.3f}"
        style = {"color": COLOURS[1 + place], "markersize": 8, "markeredgecolor": "black"}
        axes.plot(*at, MARKS[point["wanted"]], label=text, clip_on=False, zorder=5, **style)
