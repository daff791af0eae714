"""Step 9: ROC and precision-recall curves, checked against the areas that scikit-learn gives."""

import numpy as np
import pytest
from conftest import predict_by_chance
from sklearn.metrics import average_precision_score, roc_auc_score
from test_figures import assert_legible, long_names, results_of

from steps.curves import GRID, PRECISION_RECALL, ROC, draw_curves, recall_average, recall_points
from steps.scores import truth_of


def draw(kind, names, n=300, more=None):
    """Draw a chart of predictions that are mostly right; return it, the truth and the results."""
    table = predict_by_chance(names, n=n)
    truth, results = truth_of(table, names), results_of(table, names) | (more or {})
    return draw_curves(kind, *truth, results), truth, results


def area_under(x, y):
    return np.trapezoid(y, x)


@pytest.mark.parametrize("classes", [2, 8, 10])
@pytest.mark.parametrize("kind", [ROC, PRECISION_RECALL], ids=["roc", "precision-recall"])
def test_each_curve_has_the_area_that_its_label_names(kind, classes):
    names = long_names(classes)
    figure, (labels, probabilities), results = draw(kind, names)
    lines = {line.get_label().split(":")[0]: line for line in figure.axes[0].lines}
    expected = {ROC: roc_auc_score, PRECISION_RECALL: average_precision_score}[kind]
    for number, name in enumerate(names):
        if classes == 2 and number == 0:  # of two classes the second says all
            assert name not in lines
            continue
        area = expected(labels == number, probabilities[:, number])
        assert area_under(*lines[name].get_data()) == pytest.approx(area)
        row = results["per_class"][name]
        text = f"{name}: {area:.3f} ({row[kind.area + '_low']:.3f} to {row[kind.area + '_high']:.3f})"
        assert lines[name].get_label() == text
    named = [line for name, line in lines.items() if name in names]
    assert len({(line.get_color(), line.get_linestyle()) for line in named}) == len(named)
    assert_legible(figure)


def test_guessing_reaches_the_share_of_the_class():
    figure, (labels, _), _ = draw(PRECISION_RECALL, long_names(3))
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert levels == pytest.approx(np.bincount(labels) / len(labels))
    assert figure.legends[0].get_texts()[0].get_text() == "guessing: the share of the class"


POINTS = [
    {
        "wanted": wanted,
        "at": at,
        "threshold": 0.4,
        "sensitivity": {"value": 0.8},
        "specificity": {"value": 0.6},
    }
    for wanted in ("specificity", "sensitivity")
    for at in (0.9, 0.95)
]


def test_operating_points_of_two_classes_are_marked():
    names = long_names(2)
    more = {"operating_points": {"positive": names[1], "points": POINTS}}
    figure, (labels, _), _ = draw(ROC, names, more=more)
    marks = [line for line in figure.axes[0].lines if "on validation" in line.get_label()]
    assert [line.get_label() for line in marks][0] == "90% specificity on validation: threshold 0.400"
    assert [line.get_xydata()[0].tolist() for line in marks] == [[pytest.approx(0.4), 0.8]] * 4
    assert_legible(figure)
    figure, _, _ = draw(PRECISION_RECALL, names, more=more)
    mark = next(line for line in figure.axes[0].lines if "95% sensitivity" in line.get_label())
    share = labels.mean()
    assert mark.get_xydata()[0] == pytest.approx([0.8, 0.8 * share / (0.8 * share + 0.4 * (1 - share))])


@pytest.mark.parametrize(
    "kind, classes", [(ROC, 100), (PRECISION_RECALL, 23)], ids=["roc", "precision-recall"]
)
def test_of_many_classes_the_average_and_the_lowest_are_named(kind, classes):
    names = long_names(classes)
    figure, _, results = draw(kind, names, n=1000)
    areas = {name: row[kind.area] for name, row in results["per_class"].items() if kind.area in row}
    lines = {line.get_label().split(":")[0]: line for line in figure.axes[0].lines}
    lowest = sorted(areas, key=areas.get)[:5]
    average = lines.pop(f"average of {len(areas):,} classes")
    assert [*lines][1:] == lowest
    assert area_under(*average.get_data()) == pytest.approx(np.mean([*areas.values()]), abs=0.02)
    assert len(figure.axes[0].collections[0].get_paths()) == len(areas)
    assert_legible(figure)


def test_a_class_without_images_has_no_curve():
    names = long_names(3)
    table = predict_by_chance(names)
    table = table[table["label"] != names[1]]
    figure = draw_curves(ROC, *truth_of(table, names), results_of(table, names))
    lines = [line.get_label().split(":")[0] for line in figure.axes[0].lines]
    assert lines == ["guessing", names[0], names[2]]


@pytest.mark.parametrize("right, panels", [(0.0, 1), (1.0, 2)])
def test_the_corner_is_enlarged_where_good_curves_crowd(right, panels):
    names = long_names(3)
    table = predict_by_chance(names, n=200, right=right)
    truth, results = truth_of(table, names), results_of(table, names)
    for kind in (ROC, PRECISION_RECALL):
        figure = draw_curves(kind, *truth, results)
        good = np.mean([row[kind.area] for row in results["per_class"].values()]) >= 0.9
        assert len(figure.axes) == (2 if good else 1)
        assert [axes.get_ylim()[1] for axes in figure.axes] == [1] * len(figure.axes)
        if good:
            assert figure.axes[1].get_ylim()[0] == 0.8
    assert len(draw_curves(ROC, *truth, results).axes) == panels


def test_steps_hold_the_average_precision():
    true = np.array([1, 0, 1, 1, 0, 0, 1], bool)
    score = np.array([0.9, 0.9, 0.8, 0.7, 0.65, 0.6, 0.2])
    x, y = recall_points(true, score)
    assert area_under(x, y) == pytest.approx(average_precision_score(true, score))
    assert recall_average(x, y)[[0, 50, 100, -1]] == pytest.approx([1 / 2, 1 / 2, 2 / 3, 4 / 7])
    assert GRID[[50, 100]] == pytest.approx([0.25, 0.5])
