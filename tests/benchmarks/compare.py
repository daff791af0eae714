"""How often the 95 % interval of the difference between two models holds the true difference.

    python tests/benchmarks/compare.py --repetitions 200

Two models are drawn that answer the same images, of groups of 1 to 7 with one class each. A logit is the
model's skill for the true class, noise that both models share, and noise of its own; `correlation` is the
share of both noises' variance that all images of a group have in common. The truth is measured on 15,000
groups. Every class has images, unless there are more classes than groups. Beside the interval of `--compare`
stands the percentile bootstrap over groups, 1,000 draws. The last two columns: how often each test finds
p < 0.05 where both models have the same skill. Summed up at the end: the worst of four cells.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from steps.counts import count, scores_of
from steps.paired import COMPARED, Answers, Images, compare_scores, mcnemar, score_parts, swap_test

CLASSES = {
    "2": [0.5, 0.5],
    "2, one rare": [0.95, 0.05],
    "5, one rare": [0.02] + [0.245] * 4,
    "8": [1 / 8] * 8,
}
SKILLS = {"often wrong": (2.0, 2.6), "seldom wrong": (3.5, 4.1)}  # with 2 classes 0.92, 0.97; 0.993, 0.998
BOTH = ["accuracy", "macro_f1"]  # by the bootstrap, too
GROUPS = (3, 5, 10, 30, 100)


def draw(random, groups, shares, correlation, skills):
    """Return images of this many groups, and the answers of a model of each skill."""
    classes, labels = len(shares), []
    while len(set(labels)) < classes and (groups >= classes or not len(labels)):
        labels = random.choice(classes, groups, p=shares)
    group = np.repeat(np.arange(groups), random.integers(1, 8, groups))
    labels = labels[group]

    def noise(size):
        together = random.normal(size=(groups, classes))[group]
        alone = random.normal(size=(len(group), classes))
        return size * (np.sqrt(correlation) * together + np.sqrt(1 - correlation) * alone)

    hard, answers = noise(0.8), []
    for skill in skills:
        logits = 2 * (skill * np.eye(classes)[labels] + hard + noise(0.6))
        chances = np.exp(logits - logits.max(1, keepdims=True))
        answers.append(Answers(logits.argmax(1), chances / chances.sum(1, keepdims=True)))
    return Images(labels, group, classes), *answers


def cover(cell, skills, groups, repetitions):
    """Return how often, in per cent, intervals hold the truth, and tests of equal models find p < 0.05."""
    random, hits, boot, found = np.random.default_rng(groups), [], [], []
    big = [draw(random, 1500, *cell, skills) for _ in range(10)]
    truth = np.mean([whole(images, other) - whole(images, first) for images, first, other in big], axis=0)
    truth = dict(zip(COMPARED, truth, strict=True))
    times = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=1000)
    for _ in range(repetitions):
        images, first, other = draw(random, groups, *cell, skills)
        hits.append({
            name: end["low"] <= truth[name] <= end["high"]
            for name, end in compare_scores(images, first, other).items()
        })  # fmt: skip
        drawn = [resampled(images, one.guesses, times) for one in (first, other)]
        ends = (drawn[1] - drawn[0]).quantile([0.025, 0.975])
        inside = {name: ends[name].iloc[0] <= truth[name] <= ends[name].iloc[1] for name in BOTH}
        boot.append({f"{name}, bootstrap": held for name, held in inside.items()})
        same = draw(random, groups, *cell, [skills[0]] * 2)
        found.append({"McNemar": mcnemar(*same)["p"] < 0.05, "groups swapped": swap_test(*same) < 0.05})
    return 100 * pd.concat([pd.DataFrame(rows).astype(float).mean() for rows in (hits, boot, found)])


def resampled(images, guesses, times):
    """Return METRICS, a row per row of times (draws, groups): how often each group is drawn."""
    counts = count(images.labels, guesses, images.group, images.classes)
    return scores_of(*(times @ table for table in counts))


def whole(images, answers):
    """Return COMPARED of all images."""
    return score_parts(Images(images.labels, images.group * 0, images.classes), answers)[0].to_numpy()


def main():
    parser = argparse.ArgumentParser(usage=__doc__.replace("%", "%%"))
    parser.add_argument("--repetitions", type=int, default=200)
    options, rows = parser.parse_args(), {}
    for classes, skills, correlation in itertools.product(CLASSES, SKILLS, (0, 0.5)):
        for groups in GROUPS:
            key = classes, skills, correlation, groups
            cell = CLASSES[classes], correlation
            rows[key] = cover(cell, SKILLS[skills], groups, options.repetitions)
            print(*key, rows[key].round().astype(int).to_dict(), flush=True)
    table = pd.DataFrame(rows).T.rename_axis(["classes", "models", "correlation", "groups"])
    parts = table.groupby(["classes", "groups"])
    worst = pd.concat([parts.min().iloc[:, :-2], parts.max().iloc[:, -2:]], axis=1)
    print(worst.round().astype(int).to_string())


if __name__ == "__main__":
    main()
