"""The benchmark of recipes: its divisions are fair, its numbers right, its runs are not done twice."""

import importlib.util
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import ViTForImageClassification

spec = importlib.util.spec_from_file_location("recipe", ROOT / "tests" / "benchmarks" / "recipe.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


@pytest.mark.parametrize("protocol, parts", [("groups", 3), ("scenes", 3), ("few", 1), ("uneven", 1)])
def test_no_group_teaches_and_tests(protocol, parts):
    random = np.random.default_rng(0)
    groups = random.integers(0, 300, 900)
    labels = groups % 4
    labels[:60] = random.integers(0, 4, 60)  # scenes with two labels
    tests = []
    for seed in (0, 1):
        options = Namespace(protocol=protocol, folds=3)
        found = list(recipe.divisions(options, labels, groups, seed))
        assert len(found) == parts
        for taught, tested in found:
            assert not set(groups[taught]) & set(groups[tested])
            assert set(labels[tested]) == {0, 1, 2, 3}
            tests.append(tested.tolist())
        if protocol in ("few", "uneven"):
            counts = np.bincount(labels[taught])
            assert sorted(counts)[:3] == [20, 20, 20]
            assert bool(counts.max() > 100) is (protocol == "uneven")
        else:
            assert sorted(sum(tests[-3:], [])) == list(range(900))
    assert tests[0] != tests[parts]  # another seed, another division


def test_difference_is_paired_and_relative_to_the_tutorial():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    groups = np.arange(400) // 4
    logits = np.eye(2)[labels] * 2.0
    some, half = random.permutation(400)[:80], slice(0, 400, 2)
    worse = logits.copy()
    worse[some] = worse[some, ::-1]
    better = worse.copy()
    better[half] = logits[half]
    rows = np.arange(400)
    results = {name: {0: [(rows, values, 1.0)]} for name, values in
               (("better", better), ("tutorial", worse), ("same", worse))}  # fmt: skip
    table = recipe.summarise(results, labels, groups)
    assert table["accuracy"].to_dict()["tutorial"] == 0.8
    fixed = np.isin(some, rows[half]).mean()
    assert table["relative"]["better"] == pytest.approx(-fixed, abs=0.02)
    assert table["relative low"]["better"] < -fixed < table["relative high"]["better"] < 0
    assert table.loc["same", ["difference", "difference low", "difference high"]].tolist() == [0, 0, 0]
    found = recipe.against_tutorial(results, labels, groups)
    low, high = [float(end) for end in re.findall(r"[+-][\d.]+", found["macro_f1"]["better"])[1:]]
    assert 0 < low < 0.2 * fixed < high  # one mistake in five is made
    assert float(found["log_loss"]["better"].split()[0]) < 0
    assert found["accuracy"]["same"].startswith("+0.000 (-")


def test_only_folds_that_both_runs_have_are_compared():
    labels, groups = np.repeat([0, 1], 200), np.arange(400) // 4
    folds = [
        (rows, np.eye(2)[(labels[rows] + (rows % 5 == 0)) % 2], 1.0)
        for rows in (np.arange(0, 400, 2), np.arange(1, 400, 2))
    ]
    right = [(rows, np.eye(2)[labels[rows]], 1.0) for rows, *_ in folds]
    found = recipe.against_tutorial(
        {"tutorial": {0: folds[:1]}, "some": {0: right}, "none": {0: right[1:]}}, labels, groups
    )
    assert found["accuracy"].str.split().str[0].to_dict() == {"some": "+0.200"}


def test_the_interval_covers_the_luck_of_a_seed():
    labels = np.repeat([0, 1], 200)
    rows, groups = np.arange(400), np.arange(400) // 4
    right, half = np.eye(2)[labels], np.eye(2)[(labels + rows % 2) % 2]
    results = {"tutorial": {seed: [(rows, half, 1.0)] for seed in range(4)}}
    results["lucky once"] = {seed: [(rows, half if seed else right, 1.0)] for seed in range(4)}
    found = recipe.summarise(results, labels, groups).loc["lucky once"]
    assert found["relative"] == pytest.approx(-0.25)  # 0.32 of the draws lack that seed
    assert found["relative low"] <= -0.5 and found["relative high"] == 0


def test_half_the_patches_train_and_all_of_them_test(tiny_vit):
    model = ViTForImageClassification.from_pretrained(tiny_vit)
    pixels, seen = torch.rand(3, 3, model.config.image_size, model.config.image_size), []
    recipe.patch_dropout(model, 0.5)
    model.vit.embeddings.register_forward_hook(lambda module, inputs, tokens: seen.append(tokens))
    for training in (False, True):
        model.train(training)(pixel_values=pixels)
    every, some = seen
    assert some.shape[1] - 1 == (every.shape[1] - 1) // 2
    assert torch.equal(some[:, 0], every[:, 0])  # the class token
    for all_of_one, some_of_one in zip(every, some, strict=True):
        rows = (some_of_one[:, None] == all_of_one).all(2).int().argmax(1)
        assert torch.equal(all_of_one[rows], some_of_one) and len(set(rows.tolist())) == len(rows)
    assert not torch.equal(some[0], some[1])


def test_runs_are_kept_and_not_done_again(tmp_path, make_images, tiny_vit):
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "recipe.py", "--protocol", "groups"]
    command += ["--results", tmp_path / "results", "--runs", "former default, mixup 0.2"]
    command += ["--", "--data_dir", make_images(count=9), "--model_name_or_path", tiny_vit]
    command += ["--data_root", tmp_path / "data", "--num_train_epochs", "1"]
    first, again = (
        subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert len(re.findall("groups_.*: accuracy", first.stdout)) == 3
    assert len(list((tmp_path / "results").glob("groups_*.npz"))) == 3
    assert "groups_" not in again.stdout and re.search("\nformer default, mixup 0.2 +1.0", again.stdout)
