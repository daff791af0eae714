"""Step 11: differences of two models on the same images, against other implementations and by hand."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import (
    accuracy_score, f1_score, log_loss, matthews_corrcoef, precision_score, recall_score, roc_auc_score,
)  # fmt: skip

from steps.paired import Answers, Images, compare_recalls, compare_scores, jackknife, macro_auroc, mcnemar
from steps.paired import COMPARED, score_without, swap_test


def answer(images, skill, seed):
    """What a model of this skill answers; probabilities are rounded, so that some are equal."""
    logits = np.random.default_rng(seed).normal(size=(len(images.labels), images.classes))
    logits += skill * np.eye(images.classes)[images.labels]
    chances = np.exp(logits).round(1) + 0.05
    return Answers(chances.argmax(1), chances / chances.sum(1, keepdims=True))


def draw(n=60, groups=12, classes=3):
    random = np.random.default_rng(0)
    group = np.append(np.arange(groups), random.integers(0, groups, n - groups))
    return Images(random.integers(0, classes, n), group, classes)


def binary(gains, groups=None):
    """Images of one class, and two models of which the first, the other or both are right: -1, 1, 0."""
    gains = np.array(gains)
    images = Images(
        np.zeros(len(gains), int), np.arange(len(gains)) if groups is None else np.array(groups), 2
    )
    chances = np.full((len(gains), 2), 0.5)
    return images, Answers((gains > 0).astype(int), chances), Answers((gains < 0).astype(int), chances)


def test_scores_of_all_images_and_without_each_group_are_scikit_learns():
    images = draw()
    answers = answer(images, 1.0, 1)
    table = score_without(images, answers)
    assert [*table] == COMPARED and len(table) == 13
    for row, without in enumerate([-1, *range(12)]):
        kept = images.group != without
        pair = images.labels[kept], answers.guesses[kept]
        more = {"average": "macro", "zero_division": 0}
        wanted = [accuracy_score(*pair), f1_score(*pair, **more), matthews_corrcoef(*pair)]
        wanted += [recall_score(*pair, **more), precision_score(*pair, **more)]
        wanted.append(roc_auc_score(pair[0], answers.probabilities[kept], multi_class="ovr"))
        wanted.append(log_loss(pair[0], answers.probabilities[kept], labels=range(3)))
        assert table.iloc[row].tolist() == pytest.approx(wanted)


def test_an_auroc_without_pairs_is_not_a_number():
    images = Images(np.array([0, 0, 1]), np.array([0, 0, 1]), 3)
    auroc = macro_auroc(images, np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.4, 0.4, 0.2]]))
    assert auroc[0] == 0.5  # of classes 0 and 1, both with a right and a wrong pair
    assert np.isnan(auroc[1:]).all()  # one class alone
    found = compare_scores(*(images, *[score_without(images, answer(images, 1.0, seed)) for seed in (0, 1)]))
    assert (found["macro_auroc"]["low"], found["macro_auroc"]["high"]) == (-1, 1)


@pytest.mark.parametrize("n, unseen", [(9, 0.5), (9, 0.0), (400, 0.01)])
def test_the_interval_of_a_mean_is_students_with_one_more_value(n, unseen):
    values = np.random.default_rng(0).normal(size=n)
    without = [np.delete(values, row).mean() for row in range(n)]
    found = jackknife(np.array([values.mean(), *without]), unseen, 9.0)
    squares = (values - values.mean()) ** 2
    carriers = squares.sum() ** 2 / (squares**2).sum()
    variance = values.var(ddof=1) / n
    reach = np.sqrt(variance + (variance + unseen**2) / (carriers + 1))
    reach *= scipy.stats.t.ppf(0.975, n - 1 if unseen else carriers)
    assert list(found.values()) == pytest.approx(
        [values.mean(), values.mean() - reach, values.mean() + reach]
    )
    if n == 400:
        ends = scipy.stats.ttest_1samp(values, 0).confidence_interval()
        assert [found["low"], found["high"]] == pytest.approx([*ends], abs=0.001)


def test_the_order_of_two_models_turns_the_sign():
    images = draw()
    pair = [score_without(images, answer(images, skill, seed)) for seed, skill in enumerate((0.5, 2.5))]
    found, turned = compare_scores(images, *pair), compare_scores(images, *pair[::-1])
    for name in COMPARED:
        ends = [-turned[name][end] for end in ("value", "high", "low")]
        assert list(found[name].values()) == pytest.approx(ends), name
    assert found["accuracy"]["low"] > 0 > found["log_loss"]["high"]


def test_models_that_agree_everywhere_may_still_differ_elsewhere():
    labels = np.repeat([0, 1], [40, 4])
    images = Images(labels, np.arange(44), 2)
    same = Answers(labels, np.eye(2)[labels])
    table = score_without(images, same)
    found = compare_scores(images, table, table)
    assert all(score["value"] == 0 and score["low"] == -score["high"] for score in found.values())
    assert 0.03 < found["accuracy"]["high"] < 0.06
    assert found["macro_recall"]["high"] > 0.15  # the rare class has four groups
    assert found["log_loss"]["high"] == 0  # the same probabilities everywhere
    recalls = compare_recalls(images, same, same)
    assert recalls[1]["high"] > 0.5 > 0.1 > recalls[0]["high"]


def test_the_recall_of_a_class_rests_on_its_own_groups():
    images, first, other = binary([1, 1, 0, 0, -1, 1], [5, 5, 7, 8, 8, 9])
    images = Images(images.labels, np.unique(images.group, return_inverse=True)[1], 2)
    found = compare_recalls(images, first, other)
    assert found.keys() == {0} and found[0]["value"] == pytest.approx(2 / 6)
    assert (found[0]["n"], found[0]["groups"]) == (6, 4)
    without = np.array([0 / 4, 2 / 5, 3 / 4, 1 / 5])
    assert found[0] == jackknife(np.array([2 / 6, *without]), 1 / 4, 1.0) | {"n": 6, "groups": 4}


def test_one_group_says_nothing_of_others():
    images = draw(groups=1)
    pair = [answer(images, skill, 0) for skill in (0.5, 2.5)]
    found = compare_scores(images, *(score_without(images, one) for one in pair))
    assert {(score["low"], score["high"]) for score in found.values()} > {(-1, 1), (-2, 2)}
    assert compare_recalls(images, *pair)[0]["low"] == -1 and swap_test(images, *pair) == 1


def test_mcnemar_is_a_binomial_test_of_the_images_that_differ():
    images, first, other = binary([-1] * 3 + [1] * 10 + [0] * 20)
    found = mcnemar(images, first, other)
    assert (found["only_first_right"], found["only_other_right"]) == (3, 10)
    assert found["p"] == pytest.approx(2 * scipy.stats.binom.cdf(3, 13, 0.5))
    assert swap_test(images, first, other) == pytest.approx(found["p"])  # each image is its own group
    assert mcnemar(*binary([0, 0]))["p"] == swap_test(*binary([0, 0])) == 1


def test_swapping_groups_is_an_exact_permutation_test():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(9), 4)
    images, first, other = binary(random.choice([-1, 0, 1, 1], 36), group)
    gains = np.bincount(group, (other.guesses == 0) * 1.0 - (first.guesses == 0))
    wanted = scipy.stats.permutation_test((gains,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert swap_test(images, first, other) == pytest.approx(wanted.pvalue)
    together = binary([1] * 12 + [0] * 8, np.repeat(range(5), 4))
    assert mcnemar(*together)["p"] < 0.001 and swap_test(*together) == 0.25  # three groups only


def test_many_images_are_compared_in_seconds():
    images = draw(10_000, 3_000, 23)
    one, other = (score_without(images, answer(images, 1.0, seed)) for seed in (0, 1))
    assert compare_scores(images, one, other).keys() == {*COMPARED}
