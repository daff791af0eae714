"""Step 11: differences of two models on the same images, against other implementations and by hand."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import (
    accuracy_score, f1_score, log_loss, matthews_corrcoef, precision_score, recall_score, roc_auc_score,
)  # fmt: skip

from steps.paired import COMPARED, Answers, Images, compare_recalls, compare_scores, cost_of_mistakes
from steps.paired import mcnemar, score_parts, swap_test, t_interval


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


def scikit_learn(labels, guesses, probabilities, weights):
    """COMPARED, as scikit-learn computes them from weighted images."""
    pair, weighted = (labels, guesses), {"sample_weight": weights}
    more = weighted | {"average": "macro", "zero_division": 0}
    return [
        accuracy_score(*pair, **weighted), f1_score(*pair, **more), matthews_corrcoef(*pair, **weighted),
        recall_score(*pair, **more), precision_score(*pair, **more),
        roc_auc_score(labels, probabilities, multi_class="ovr", **weighted),
        log_loss(labels, probabilities, labels=range(probabilities.shape[1]), **weighted),
    ]  # fmt: skip


def test_scores_and_what_a_group_adds_to_them_are_scikit_learns():
    """To macro AUROC and log loss, what changes as its weight grows; to others, as it is left out."""
    images = draw()
    answers = answer(images, 1.0, 1)
    rows = images.labels, answers.guesses, answers.probabilities
    values, parts = score_parts(images, answers)
    wanted = np.array(scikit_learn(*rows, np.ones(60)))
    assert [*values.index] == [*parts] == COMPARED and len(parts) == 12
    assert values.tolist() == pytest.approx(wanted)
    for group in range(12):
        kept = images.group != group
        gone = (wanted - scikit_learn(*(row[kept] for row in rows), np.ones(kept.sum()))) * 11 / 12
        grown = (np.array(scikit_learn(*rows, 1 + 1e-5 * ~kept)) - wanted) / 1e-5
        assert parts.iloc[group].tolist() == pytest.approx([*gone[:5], *grown[5:]], abs=1e-4)


@pytest.mark.parametrize("name, kind", [("macro_auroc", roc_auc_score), ("log_loss", log_loss)])
def test_the_variance_is_a_jackknifes(name, kind):
    """Of many groups, for the two scores that leave no group out."""
    images = draw(400, 80, 2)
    first, other = (answer(images, skill, seed) for seed, skill in enumerate((1.0, 1.5)))
    scores = [[], []]
    for group in range(80):
        kept = images.group != group
        for one, found in zip((first, other), scores, strict=True):
            chances = one.probabilities[kept]
            found.append(kind(images.labels[kept], chances[:, 1] if name == "macro_auroc" else chances))
    wanted = np.subtract(*scores).var() * 79
    parts = score_parts(images, other)[1][name] - score_parts(images, first)[1][name]
    assert (parts**2).sum() * 80 / 79 == pytest.approx(wanted, rel=0.05)


def test_one_class_alone_has_no_auroc():
    images, first, other = binary([1, 1, 0, -1])
    assert compare_scores(images, first, other).keys() == {*COMPARED} - {"macro_auroc"}
    images = Images(np.array([0, 0, 1]), np.array([0, 0, 1]), 3)
    chances = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.4, 0.4, 0.2]])
    assert score_parts(images, Answers(chances.argmax(1), chances))[0]["macro_auroc"] == 0.5  # of two


@pytest.mark.parametrize("n, unseen, heavy", [(9, 0.5, False), (9, 0.5, True), (400, 0.01, False)])
def test_the_interval_of_a_mean_is_students_with_one_more_value(n, unseen, heavy):
    values = np.random.default_rng(0).normal(size=n)
    found = t_interval((values.mean(), (values - values.mean()) / n), unseen, 9.0, heavy)
    squares = (values - values.mean()) ** 2
    carriers = squares.sum() ** 2 / (squares**2).sum()
    variance = values.var(ddof=1) / n
    reach = np.sqrt(variance + (variance + unseen**2) / (carriers + 1))
    reach *= scipy.stats.t.ppf(0.975, carriers if heavy else n - 1)
    assert list(found.values()) == pytest.approx(
        [values.mean(), values.mean() - reach, values.mean() + reach]
    )
    if n == 400:
        ends = scipy.stats.ttest_1samp(values, 0).confidence_interval()
        assert [found["low"], found["high"]] == pytest.approx([*ends], abs=0.001)


def test_a_mistake_costs_what_the_second_guess_does():
    """Two images, of which the second is four times as likely to be wrong."""
    chances = np.array([[0.1, 0.9], [0.6, 0.4]])
    wanted = -0.2 * np.log(0.1) - 0.8 * np.log(0.4)
    assert cost_of_mistakes(Answers(chances.argmax(1), chances)) == pytest.approx(wanted)
    sure = Answers(np.array([1, 0]), np.eye(2)[[1, 0]])
    assert cost_of_mistakes(sure) == pytest.approx(-np.log(np.finfo(float).eps))


def test_the_order_of_two_models_turns_the_sign():
    images = draw()
    pair = [answer(images, skill, seed) for seed, skill in enumerate((0.5, 2.5))]
    found, turned = compare_scores(images, *pair), compare_scores(images, *pair[::-1])
    for name in COMPARED:
        ends = [-turned[name][end] for end in ("value", "high", "low")]
        assert list(found[name].values()) == pytest.approx(ends), name
    assert found["accuracy"]["low"] > 0 > found["log_loss"]["high"]


def test_models_that_agree_everywhere_may_still_differ_elsewhere():
    labels = np.repeat([0, 1], [40, 4])
    images = Images(labels, np.arange(44), 2)
    same = Answers(labels, np.eye(2)[labels])
    found = compare_scores(images, same, same)
    assert all(score["value"] == 0 and score["low"] == -score["high"] for score in found.values())
    assert 0.03 < found["accuracy"]["high"] < 0.06
    assert found["macro_recall"]["high"] > 0.15  # the rare class has four groups
    worst = -np.log(np.finfo(float).eps) / 44  # a mistake of a model that has no doubt
    assert found["log_loss"]["high"] == pytest.approx(scipy.stats.t.ppf(0.975, 1) * worst)
    recalls = compare_recalls(images, same, same)
    assert recalls[1]["high"] > 0.5 > 0.1 > recalls[0]["high"]


def test_the_recall_of_a_class_rests_on_its_own_groups():
    images, first, other = binary([1, 1, 0, 0, -1, 1, *[0] * 6], [5, 5, 7, 8, 8, *range(9, 16)])
    images = Images(images.labels, np.unique(images.group, return_inverse=True)[1], 2)
    found = compare_recalls(images, first, other)
    assert found.keys() == {0} and found[0]["value"] == pytest.approx(2 / 12)
    assert (found[0]["n"], found[0]["groups"]) == (12, 10)
    # gains, less what as many images gain on average
    parts = np.array([2 - 2 / 6, 0 - 1 / 6, -1 - 2 / 6, 1 - 1 / 6, *[0 - 1 / 6] * 6]) / 12
    squares = parts**2 * 10 / 9
    more = (squares.sum() + 1 / 10**2) / (1 + squares.sum() ** 2 / (squares**2).sum())
    reach = scipy.stats.t.ppf(0.975, 9) * np.sqrt(squares.sum() + more)
    assert [found[0]["low"], found[0]["high"]] == pytest.approx([2 / 12 - reach, 2 / 12 + reach])


def test_one_group_says_nothing_of_others():
    images = draw(groups=1)
    pair = [answer(images, skill, 0) for skill in (0.5, 2.5)]
    found = compare_scores(images, *pair)
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
    assert compare_scores(images, *(answer(images, 1.0, seed) for seed in (0, 1))).keys() == {*COMPARED}
