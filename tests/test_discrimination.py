"""Step 8: ranks and thresholds, by hand, against scikit-learn and against weights that are nudged."""

import numpy as np
import pytest
from sklearn import metrics

from steps.discrimination import discriminate, operating_points, rank
from steps.intervals import share_interval


def answers(n, classes, seed, decimals=2):
    """Labels, probabilities with ties, and groups."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels, chances.round(decimals), rng.integers(0, n // 3, n)


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_ranks_are_scikit_learns(classes):
    labels, chances, groups = answers(200, classes, classes)
    found = discriminate(labels, chances, groups)
    of = {"auroc": metrics.roc_auc_score, "average_precision": metrics.average_precision_score}
    for name, measure in of.items():
        values = [measure(labels == label, chances[:, label]) for label in range(classes)]
        assert [found[label][name]["value"] for label in range(classes)] == pytest.approx(values)
        assert found["macro"][f"macro_{name}"]["value"] == pytest.approx(np.mean(values))
        for ends in (*(found[label][name] for label in range(classes)), found["macro"][f"macro_{name}"]):
            assert 0 <= ends["low"] < ends["value"] < ends["high"] <= 1
    if classes > 2:
        exact = answers(200, classes, classes, decimals=12)
        both = [discriminate(*exact)["macro"]["macro_auroc"]["value"]]
        both += [
            metrics.roc_auc_score(exact[0], exact[1] / exact[1].sum(1, keepdims=True), multi_class="ovr")
        ]
        assert both[0] == pytest.approx(both[1])


def parts_of(name, labels, chances):
    """What each image of the second class and the others adds to the error of its score: each is a group."""
    return rank(labels, chances, np.arange(len(labels)))[name][1][1]


@pytest.mark.parametrize(
    "name, measure",
    [("auroc", metrics.roc_auc_score), ("average_precision", metrics.average_precision_score)],
)
def test_what_an_image_adds_is_what_a_heavier_image_changes(name, measure):
    labels, chances, _ = answers(60, 2, 1, decimals=1)
    positive, scores, weights = labels == 1, chances[:, 1], np.ones(60)
    value, changes = measure(positive, scores), []
    for image in range(60):
        weights[image] += 1e-6
        changes.append((measure(positive, scores, sample_weight=weights) - value) / 1e-6)
        weights[image] -= 1e-6
    assert parts_of(name, labels, chances) == pytest.approx(changes, abs=1e-6)


def test_the_error_of_the_auroc_is_delongs():
    """Each image alone: the variances of what positives and negatives beat, written out in pairs."""
    labels, chances, _ = answers(3000, 2, 4)
    positive, scores = labels == 1, chances[:, 1]
    beats = scores[positive][:, None] - scores[~positive]
    beats = (beats > 0) + 0.5 * (beats == 0)
    delong = sum(beats.mean(axis).var(ddof=1) / beats.shape[1 - axis] for axis in (0, 1))
    assert (parts_of("auroc", labels, chances) ** 2).sum() == pytest.approx(delong, rel=0.001)


def test_classes_are_ranked_in_blocks_with_the_same_result(monkeypatch):
    labels, chances, groups = answers(200, 23, 0)
    at_once = discriminate(labels, chances, groups)
    monkeypatch.setattr("steps.discrimination.BLOCK", 1000)  # five classes at a time
    assert discriminate(labels, chances, groups) == at_once


def test_where_nothing_is_told_apart_there_is_no_rank():
    labels, chances, groups = answers(30, 3, 0)
    assert discriminate(np.full(30, 2), chances, groups) == {"macro": {}}
    some = discriminate(np.where(labels == 2, 0, labels), chances, groups)
    assert set(some) == {"macro", 0, 1}  # the mean over the classes with images


def test_ranks_of_a_rare_class_are_uncertain():
    """All right, but two positives in 37: less certain than all classes together, and the macro knows."""
    labels = np.repeat([0, 1], [35, 2])
    found = discriminate(labels, np.eye(2)[labels], np.arange(37))
    assert found[1]["auroc"]["value"] == 1 and found[1]["auroc"]["low"] < 0.45
    assert found[1]["average_precision"]["low"] == pytest.approx(0.025**0.5)
    for name in ("auroc", "average_precision"):
        assert found["macro"][f"macro_{name}"]["low"] <= 1 - (1 - found[1][name]["low"]) / 2


def test_operating_points_worked_out_by_hand():
    """Thresholds from ten negatives, 0.0 to 0.9, and ten positives: 0.25, 0.55, 0.65 and seven above 0.9."""
    scores = np.concatenate([np.arange(10) / 10, [0.25, 0.55, 0.65], 0.91 + np.arange(7) / 100])
    validation = np.repeat([0, 1], 10), np.column_stack([1 - scores, scores])
    scores = np.array([0.1, 0.3, 0.6, 0.92, 0.2, 0.6, 0.95, 0.99])
    test = np.repeat([0, 1], 4), np.column_stack([1 - scores, scores])
    result = operating_points(validation, test, np.arange(8), ["well", "ill"])
    assert result["positive"] == "ill"
    found = {(point["wanted"], point["at"]): point for point in result["points"]}
    for key, threshold, sensitivity, specificity in (
        (("specificity", 0.9), 0.91, 2 / 4, 3 / 4),  # 0.9 would call a negative more and no positive more
        (("specificity", 0.95), 0.91, 2 / 4, 3 / 4),
        (("sensitivity", 0.9), 0.55, 3 / 4, 2 / 4),  # nine of ten
        (("sensitivity", 0.95), 0.25, 3 / 4, 1 / 4),  # all
    ):
        point = found.pop(key)
        assert point["threshold"] == pytest.approx(threshold)
        called = scores >= threshold
        assert point["sensitivity"] == share_interval(called[4:], np.arange(4))
        assert point["specificity"] == share_interval(~called[:4], np.arange(4))
        assert (point["sensitivity"]["value"], point["specificity"]["value"]) == (sensitivity, specificity)
    assert not found


def test_a_threshold_above_all_scores_is_a_number():
    """The highest score is a negative's: no positive may be called. JSON has no infinity."""
    scores = np.array([0.9, 0.2, 0.3, 0.8])
    part = np.array([0, 0, 1, 1]), np.column_stack([1 - scores, scores])
    points = operating_points(part, part, np.arange(4), ["a", "b"])["points"]
    assert 0.9 < points[0]["threshold"] < 0.9001 and points[0]["sensitivity"]["value"] == 0
    assert points[0]["specificity"]["value"] == 1


def test_only_two_classes_with_images_have_operating_points():
    labels, chances, groups = answers(30, 3, 0)
    assert operating_points((labels, chances), (labels, chances), groups, ["a", "b", "c"]) == {}
    two = labels % 2, chances[:, :2]
    assert operating_points((np.zeros(30, int), two[1]), two, groups, ["a", "b"]) == {}
    assert operating_points(two, (np.zeros(30, int), two[1]), groups, ["a", "b"]) == {}
