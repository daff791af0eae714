"""Step 11: finished runs compared, on made-up runs: what is shared, what is refused, what is written."""

import json
import re
import shutil
import unicodedata

import numpy as np
import pandas as pd
import pytest
from conftest import read_settings
from sklearn.metrics import f1_score

from steps import use
from steps.files import probability_columns, read_table
from steps.compare import choose_folder, draw_comparisons, locate, notes
from steps.runs import answers_of, find_runs, shared_images

CLASSES = ["cecum", "polyp", "ulcer"]
FILES = [f"{CLASSES[row % 3]}/{row:02}.jpg" for row in range(60)]
SPLIT = ["train", "validation", "test"]  # of ten images, by turns: 6, 2 and 2


def make_run(folder, wrong=(), seed=0, change=None):
    """A finished run on FILES: images 0 to 29 test, the next 15 validate; every second shares its group.

    `wrong` are the numbers of test images that it gets wrong; `change(split)` changes its split.csv.
    """
    random, report = np.random.default_rng(seed), folder / "report"
    report.mkdir(parents=True)
    labels = [file.split("/")[0] for file in FILES]
    split = pd.DataFrame({"file": FILES, "label": labels, "split": np.repeat(SPLIT[::-1], [30, 15, 15])})
    split["group"] = np.arange(60) // 2
    split = split if change is None else change(split)
    table = split.loc[split["split"] != "train", ["file", "split", "label"]].reset_index(drop=True)
    number = table["label"].map(CLASSES.index).to_numpy(copy=True)
    number[list(wrong)] = (number[list(wrong)] + 1) % 3
    chances = random.dirichlet(np.ones(3), len(table)) / 4 + 0.75 * np.eye(3)[number]
    table["prediction"] = np.array(CLASSES)[number]
    table[probability_columns(CLASSES)] = chances
    split.to_csv(report / "split.csv", index=False)
    table.to_csv(report / "predictions.csv", index=False)
    settings = {"recipe": folder.name, "model_name_or_path": f"{folder}/vit", "data_dir": str(folder)}
    record = {"settings": settings, "training": {"seed": seed, "output_dir": str(folder)}}
    record |= {"derived": {"images_per_step": 8}, "data": {"files_sha256": "same"}}
    (folder / "settings.json").write_text(json.dumps(record))
    results = {"test": {}, "made": "fine-tuned", "per_class": dict.fromkeys(CLASSES, {})}
    results["speed"] = {"train_seconds": 12.5}
    (report / "metrics.json").write_text(json.dumps(results))
    return folder


def compare(*flags):
    use.use_model(*read_settings(["--compare", *flags]))


def found_in(folder):
    return json.loads((folder / "comparison.json").read_text())


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / "fast", range(13), 1), make_run(tmp_path / "slow", [12, 13], 2)]


def edit(path, change):
    """Change a JSON file or a CSV file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        change(pd.read_csv(path)).to_csv(path, index=False)


def test_numbers_words_and_files(runs, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    compare(*runs)
    folder = tmp_path / "comparison-fast-slow"
    assert sorted(path.name for path in folder.iterdir()) == [
        "comparison.json", "comparison.png", "differences.csv",
    ]  # fmt: skip
    found = found_in(folder)
    assert (found["images"], found["groups"], found["other_label"], found["not_in_all"]) == (30, 15, 0, 0)
    fast, slow = found["runs"]
    assert (slow["name"], slow["recipe"], slow["train_seconds"]) == ("slow", "slow", 12.5)
    assert slow["scores"]["accuracy"] == pytest.approx(28 / 30)
    assert found["settings"] == {
        "recipe": ["fast", "slow"],
        "model_name_or_path": ["vit", "vit"],
        "seed": [1, 2],
    }
    (one,) = found["comparisons"]
    tested = [pd.read_csv(run / "report" / "predictions.csv")[:30] for run in runs]
    scores = [f1_score(table["label"], table["prediction"], average="macro") for table in tested]
    difference = one["differences"]["macro_f1"]
    assert difference["value"] == pytest.approx(scores[1] - scores[0])
    assert 0 < difference["low"] < difference["value"] < difference["high"]
    assert one["verdict"].startswith(f"slow is better by {difference['value']:.3f} in macro F1")
    assert one["mcnemar"] | {"p": 0} == {"only_first_right": 1, "only_other_right": 12, "p": 0}
    assert one["mcnemar"]["p"] == pytest.approx(2 * (1 + 13) / 2**13)
    assert one["groups"]["p"] == pytest.approx(4 / 2**7)  # six groups gain 2 images, one loses 1
    assert one["verdict"] in caplog.text and "believe the interval and the test over groups" in caplog.text
    assert "another seed makes another model" in found["notes"][0]
    text = capsys.readouterr().out
    assert "slow minus fast" in text and "macro_f1" in text and "train_seconds" in text
    listed = read_table(folder / "differences.csv", ["group"])
    assert listed["file"].tolist() == [*FILES[:12], FILES[13]]
    assert listed["prediction_slow"][0] == tested[1]["prediction"][0] == listed["label"][0]
    assert listed["probability_slow"][0] == pytest.approx(tested[1].iloc[0, 4:].max())
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    assert str(tmp_path).encode() not in everything


def test_colab_looks_for_runs_and_keeps_the_comparison_on_drive(runs, tmp_path, monkeypatch):
    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "drive")
    monkeypatch.setattr("steps.compare.DRIVE", tmp_path / "drive")
    home = tmp_path / "drive" / "MyDrive" / "finetune_vit"
    shutil.copytree(runs[0], home / "model")
    settings, training = read_settings(["--compare", "model", runs[1]])
    found = find_runs([locate(folder, settings, training) for folder in settings.compare])
    assert [run.folder for run in found] == [home / "model", runs[1]]
    assert choose_folder(found, settings, training) == home / "comparison-model-slow"


def test_again_the_same_and_never_half_done(runs, tmp_path, monkeypatch):
    compare(*runs, "--output_dir", str(tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*arguments, **options):
        raise OSError("full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr("matplotlib.figure.Figure.savefig", fail)
        compare(*runs, "--output_dir", str(tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    compare(*runs, "--output_dir", str(tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_first_run_is_compared_with_each_other(runs, tmp_path, caplog):
    caplog.set_level("INFO")
    same = shutil.copytree(runs[0], tmp_path / "deep" / "fast")
    compare(*runs, same, "--output_dir", str(tmp_path / "out"))
    found = found_in(tmp_path / "out")
    names = f"{tmp_path.name}/fast", f"{tmp_path.name}/slow", "deep/fast"  # as long as it takes to differ
    assert [run["name"] for run in found["runs"]] == [*names]
    pairs = [(one["first"], one["other"]) for one in found["comparisons"]]
    assert pairs == [(names[0], names[1]), (names[0], names[2])]
    again = found["comparisons"][1]
    assert again["differences"]["accuracy"]["value"] == 0 < again["differences"]["accuracy"]["high"]
    assert "no difference in macro F1 can be told from 30 images in 15 groups" in again["verdict"]
    assert "each of 2 comparisons errs once in 20 times" in caplog.text


def move(rows, name):
    """Return a change of split.csv: these rows go to another split."""

    def change(split):
        split.loc[list(rows), "split"] = name
        return split

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (move([3, 4], "train"), "other trained or validated on 2 .* such as cecum/03"),
        (move([3], "validation"), "other trained or validated on 1 of the test images of fast"),
        (move([50], "test"), "fast trained or validated on 1 of the test images of other, such as ulcer/50"),
        (lambda split: split.assign(file="new/" + split["file"]), "fast and other share no test image of"),
    ],
)  # fmt: skip
def test_runs_of_other_splits_are_refused(change, message, runs, tmp_path):
    other = make_run(tmp_path / "other", change=change)
    with pytest.raises(
        SystemExit, match=f"^error: {message}.*give the report/split.csv of one as --metadata"
    ):
        compare(runs[0], other, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def rename_class(results):
    results["per_class"] = dict.fromkeys(["cecum", "polyps", "ulcer"], {})


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("settings.json", None, "holds no finished run: there is no settings.json; run its command"),
        ("report/metrics.json", None, "holds no finished run: there is no report/metrics.json"),
        ("report/predictions.csv", None, "holds no finished run: there is no report/predictions.csv"),
        ("report/split.csv", lambda table: table.drop(columns="group"), "has no column group; run its"),
        ("report/predictions.csv", lambda table: table.rename(columns=lambda name: name.removeprefix("p_")),
         "predictions.csv has no column p_cecum; .*if an earlier version made it, train it anew"),
        ("report/predictions.csv", lambda table: table.assign(prediction="?"), "does not fit the files"),
        ("report/predictions.csv", lambda table: table.assign(p_ulcer="?"), "does not fit the files"),
        ("report/predictions.csv", lambda table: table.assign(p_ulcer=1.5), "does not fit the files"),
        ("report/predictions.csv", lambda table: table.assign(p_ulcer="inf"), "does not fit the files"),
        ("report/predictions.csv", lambda table: pd.concat([table, table]), "does not fit the files"),
        ("report/predictions.csv", lambda table: table[30:], "does not fit the files beside it"),
        ("report/split.csv", lambda table: table[9:], "does not fit the files beside it"),
        ("report/metrics.json", rename_class, "slow knows classes that .* does not|has no column p_polyps"),
        ("settings.json", lambda record: record.update(earlier={"learned": 7}),
         "slow goes on from a model that learned from 7 of its test images; compare runs whose"),
        ("report/predictions.csv", lambda table: pd.concat([table, table[:30].assign(split="validation")]),
         "slow chose its epoch or temperature on its own test images; train it with a --validation_size"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_compared_is_refused(file, change, message, runs, tmp_path):
    (runs[1] / file).unlink() if change is None else edit(runs[1] / file, change)
    with pytest.raises(SystemExit) as stopped:
        compare(*runs, "--output_dir", str(tmp_path / "out"))
    assert re.search(f"^error: .*({message})", stopped.value.code) and "\n" not in stopped.value.code
    assert not (tmp_path / "out").exists()


def test_probabilities_of_0_and_1_and_long_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / (letter * 100)) for letter in "üé"]
    sure = {"p_cecum": 1, "p_polyp": 0, "p_ulcer": 0, "prediction": "cecum"}
    edit(runs[1] / "report" / "predictions.csv", lambda table: table.assign(**sure))
    compare(*runs)
    (folder,) = tmp_path.glob("comparison-*")
    assert len(str(folder.name).encode()) <= 200
    assert found_in(folder)["runs"][1]["scores"]["accuracy"] == pytest.approx(1 / 3)


def test_other_classes_are_refused_and_another_order_is_not(runs, tmp_path):
    def turn(results):
        results["per_class"] = dict.fromkeys(CLASSES[::-1], {})

    edit(runs[1] / "report" / "metrics.json", turn)
    one, other = found = find_runs([*map(str, runs)])
    answers = answers_of(other, shared_images(found)[0].index, one.classes)
    assert answers.guesses[:14].tolist() == [0, 1, 2] * 4 + [1, 2]  # in the order of the first run's classes

    for name in ("predictions.csv", "split.csv"):
        edit(runs[1] / "report" / name, lambda table: table.replace("ulcer", "ulcers"))
    edit(runs[1] / "report" / "predictions.csv", lambda table: table.rename(columns={"p_ulcer": "p_ulcers"}))
    edit(runs[1] / "report" / "metrics.json", lambda results: results["per_class"].update(ulcers={}))
    edit(runs[1] / "report" / "metrics.json", lambda results: results["per_class"].pop("ulcer"))
    with pytest.raises(
        SystemExit, match="fast knows classes that slow does not: ulcer; compare runs with the"
    ):
        compare(*runs)


def test_flags_that_ask_for_no_comparison(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs[0])
    for flags, message in (
        ([runs[0]], "--compare needs two runs or more; give their output folders"),
        ([runs[0], tmp_path / "none"], "--compare .*none is not a folder; give the --output_dir of a"),
        ([*runs, tmp_path / "link"], "--compare names one run twice: .*fast, .*link; give another run"),
        ([runs[0], "x" * 300], "--compare x* is not a folder"),
        ([*runs, "--output_dir", runs[1]], "--output_dir .*slow holds a run; choose another"),
        ([*runs, "--output_dir", runs[1] / "report"], "--output_dir .*report holds a run; choose another"),
        ([*runs, "--output_dir", tmp_path / ("ü" * 200)], "cannot write into .*; choose another --output"),
        (
            [*runs, "--output_dir", runs[1] / "settings.json"],
            "cannot write into .*; choose another --output_dir",
        ),
        ([*runs, "--demo"], "--compare reads finished runs, --predict and --demo use one; give one of these"),
        ([*runs, "--predict", runs[0]], "--compare reads finished runs"),
    ):
        with pytest.raises(SystemExit, match=message):
            compare(*flags)


def test_images_are_the_same_by_name_and_label_however_unicode_writes_them(tmp_path):
    accented = ["é/" + unicodedata.normalize("NFC", "über.jpg"), "b.jpg", "c.jpg"]

    def rename(form):
        def change(split):
            split.loc[[0, 1, 2], "file"] = [unicodedata.normalize(form, name) for name in accented]
            split.loc[4, "label"] = "cecum" if form == "NFD" else "polyp"
            return split.drop(5) if form == "NFD" else split

        return change

    one, other = (make_run(tmp_path / form, change=rename(form)) for form in ("NFC", "NFD"))
    edit(other / "settings.json", lambda record: record["data"].update(files_sha256="another"))
    shared, counts = shared_images(find_runs([str(one), str(other)]))
    assert shared["file"].tolist()[:4] == [*accented, FILES[3]]
    assert (counts["images"], counts["other_label"], counts["not_in_all"]) == (28, 1, 1)
    told = " ".join(notes(counts | {"comparisons": [1]}))
    assert "1 test images have another label in another run and are left out" in told
    assert "1 test images were not tested by all runs" in told
    assert "images are matched by name and label" in told


def test_groups_of_all_runs_are_joined(tmp_path):
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", change=lambda split: split.assign(group=(np.arange(60) + 1) // 4))
    shared, counts = shared_images(find_runs([str(one), str(other)]))
    assert counts["groups"] == shared["group"].nunique() == 1  # 0 1, 1 2 3, 3 4, ... : a chain
    assert counts["near_learned"] == {"one": 30, "other": 30}
    told = " ".join(notes(counts | {"comparisons": [1]}))
    assert "all images are of one group" in told
    assert "30 images are in groups of which one has learned other images" in told


@pytest.mark.parametrize("classes", [1, 70])
def test_a_picture_of_few_or_many_classes(classes):
    score = {"value": 0.01, "low": -0.02, "high": 0.04}
    recalls = {f"class {row}": {"value": row / 100, "low": -1, "high": 1} for row in range(classes)}
    recalls = {name: recall | {"n": 3, "groups": 2} for name, recall in recalls.items()}
    one = {"first": "a", "other": "b" * 200, "recalls": recalls}
    one["differences"] = dict.fromkeys(["accuracy", "macro_f1", "log_loss"], score)
    figure = draw_comparisons([one])
    axes = figure.subfigs[0].axes
    names = [label.get_text() for label in axes[1].get_yticklabels()]
    assert len(names) == min(classes, 40) and names[0] == f"class {classes - 1} (3, 2)"
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["macro F1", "accuracy"]
    (line,) = axes[2].containers[0].lines[:1]
    assert line.get_xdata()[0] == -0.01  # less log loss is better, and better is to the right
