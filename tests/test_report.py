"""Step 9: a card that the Hub understands and the run supports, drawn once, and the model's web page."""

import html
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
import transformers
from conftest import ROOT, draw_pixels, make_work, predict_by_chance, read_settings
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_figures import HISTORY, trainer_of

from steps.duplicates import Scenes
from steps.figures import charts
from steps.galleries import galleries
from steps.options import METRICS
from steps.report import code, command_of, make_space, plain_text, public, write_report

NAMES = ["dyed-lifted-polyps", "esophagitis", "polyps"]


@pytest.fixture
def results(tmp_path):
    score = {"value": 0.8765, "low": 0.8123, "high": 0.9321}
    row = {"precision": 0.9, "recall": 0.8, "recall_low": 0.7, "recall_high": 0.85, "specificity": 0.95,
           "f1": 0.85, "n": 10, "groups": 6, "auroc": 0.97, "auroc_low": 0.91, "auroc_high": 0.99,
           "average_precision": 0.94, "average_precision_low": 0.8,
           "average_precision_high": 0.98}  # fmt: skip
    part = dict.fromkeys([*METRICS, "ece", "log_loss", "macro_auroc", "macro_average_precision"], score) | {
        "accuracy": {"value": 0.9123, "low": 0.88, "high": 0.94}
    }
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    settings, training = read_settings(["--output_dir", tmp_path, "--learning_rate", "3e-5"])
    split = {"by": "near-duplicates", "train": 140, "validation": 30, "test": 30, "groups": 150}
    split |= {
        "near_duplicate_pairs": 60,
        "pairs_across_splits": 0,
        "pairs_across_test": 0,
        "conflicting_label_pairs": 7,
    }
    split["classes"] = dict.fromkeys(("train", "validation", "test"), dict.fromkeys(NAMES, 21))
    calibration = {"temperature": 1.234, "ece_before": 0.0987, "ece_after": 0.0456}
    data = {"name": "my-images", "kvasir": False, "endoscopy": False, "images": 200, "files_sha256": "0" * 64}
    return {
        "made": "fine-tuned", "chosen_epoch": 3.0, "test": part, "warnings": [],
        "most_frequent": {"class": NAMES[0], "accuracy": 0.125},
        "label_issues": {"images": 60, "listed": 9, "confident": 2, "from": "validation and test"},
        "validation": dict(part), "per_class": dict.fromkeys(NAMES, row), "split": split,
        "calibration": calibration | {"accuracy_at_90_percent_coverage": 0.9777},
        "shortcuts": {"nothing": {"accuracy": 0.9123, "macro_f1": 0.87}},
        "speed": {"train_images_per_second": 12.34, "train_seconds": 567.0, "evaluate_images_per_second": 89},
        "data": data,
        "settings": {name: public(value) for name, value in (vars(settings) | training.to_dict()).items()}
        | {"images_per_step": 64},
        "versions": {"torch": "2.13.0", "device": "a test machine"},
    }  # fmt: skip


@pytest.fixture
def report(tmp_path, tiny_vit, results):
    """Return a function that writes the report into tmp_path and returns the card."""
    trainer = trainer_of(tiny_vit, tmp_path)
    conflict = {
        "file_a": ["x/1.jpg"],
        "file_b": ["x/2.jpg"],
        "distance": [0.01],
        "label_a": NAMES[:1],
        "label_b": NAMES[1:2],
    }

    def write(results=results, predictions=None, history=HISTORY, pairs=conflict, names=NAMES):
        predictions = predict_by_chance(NAMES) if predictions is None else predictions
        scenes = Scenes(pd.DataFrame(pairs), pd.Series(range(60), predictions["file"]))
        figures = charts(results, predictions, history)
        figures |= galleries(predictions, scenes, draw_pixels(names)[0], trainer)
        write_report(results, figures, make_work(["--output_dir", tmp_path]))
        return ModelCard.load(tmp_path / "README.md")

    return write


@pytest.fixture
def card_of(tmp_path, results):
    """Return a function that writes the card into tmp_path, draws nothing, and returns the card."""

    def write(results=results):
        write_report(results, {}, make_work(["--output_dir", tmp_path]))
        return ModelCard.load(tmp_path / "README.md")

    return write


@pytest.mark.parametrize("kvasir", [True, False])
def test_card_is_complete_and_carries_the_terms(tmp_path, report, results, kvasir):
    results["data"] |= {"kvasir": kvasir, "endoscopy": kvasir}
    card = report()
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert card.data.base_model == "google/vit-base-patch16-224-in21k"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"accuracy": 0.9123, "f1": 0.8765, "matthews_correlation": 0.8765}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert (card.data.license == "other") is kvasir
    assert ("no commercial use" in card.text) is kvasir and ("Pogorelov" in card.text) is kvasir
    for part in (
        "Not a medical device", "0.912 (0.880 to 0.940)", "150 groups of 200 images", "10 %, its accuracy on",
        "divided by the temperature 1.234", "| expected calibration error (15 bins) | 0.099 | 0.046 |",
        "| nothing | 0.912 | 0.870 |", "12.3 training images/s", "567 s of training", "a test machine",
        "Of 60 near-duplicate pairs, 0 are on two sides", "7 carry two different labels",
        "| esophagitis | 0.900 | 0.800 (0.700 to 0.850) | 0.950 | 0.850 | 10 (6) |", "others is 0.978",
        "| polyps | 21 | 21 | 21 |", "| total | 140 | 30 | 30 |",
        "not tested on images from elsewhere", "epoch 3 of 4",
        f"python finetune_vit.py --output_dir {tmp_path.name} --learning_rate 3e-5",
    ):  # fmt: skip
        assert part in card.text, part
    assert "{" not in card.text.split("```bash")[0] and "None" not in card.text
    shown = re.findall(r"]\(report/(.+?)\)", card.text)
    drawn = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert drawn - set(shown) == {"mistakes.png", "attribution.png", "label_conflicts.png"}  # of the images
    assert set(shown) < drawn and len(shown) == 6


def test_model_that_came_from_a_folder_is_no_name_on_the_hub(card_of, results):
    results["settings"]["model_name_or_path"] = "vit-of-mine"  # what is left of /home/me/vit-of-mine
    card = card_of()
    assert card.data.base_model is None and "Fine-tuned from `vit-of-mine`" in card.text
    assert "see Calibration\n```\n\n## Intended use" in card.text


def test_card_names_the_type_of_the_model(tmp_path, card_of, report):
    assert report().data.tags == ["vision", "vit"]
    card = (tmp_path / "README.md").read_text()
    assert "\nA Vision Transformer that assigns" in card and "integrated gradients" in card
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    card = card_of()
    assert card.data.tags == ["vision", "swin"] and "\nA model of type swin that assigns" in card.text


def test_command_of_a_run_gives_its_settings_again(tmp_path):
    flags = [
        "--data_dir", str(tmp_path), "--split_by", "random", "--report_to", "none", "--learning_rate", "1e-4",
        "--bf16", "false", "--lr_scheduler_type", "cosine_with_min_lr", "--output_dir", "a folder",
        "--lr_scheduler_kwargs", '{"min_lr": 1e-6}', "--hub_token", "hf_secret", "--hub-token=hf_secret",
        "--run_name=it's $HOME `or` not",
    ]  # fmt: skip
    settings, training = read_settings(flags)
    recorded = json.loads(json.dumps(vars(settings) | training.to_dict()))
    command = command_of({"settings": recorded})
    assert "hf_secret" not in command and "hub" not in command
    program, script, *words = shlex.split(command)
    assert (program, script) == ("python", "finetune_vit.py")
    assert words == [word for word in flags if "hub" not in word and word != "hf_secret"]
    again, training_again = read_settings(words)
    assert again == settings
    assert training_again.to_dict() == training.to_dict()


@pytest.mark.parametrize(
    ("given", "folds", "folder", "added"),
    [
        ([], 5, "clinic", ["--cross_validate=5", "--external_dir=clinic"]),
        (["--cross_validate", "5"], 5, None, []),
        (["--external_dir=clinic", "--seed", "1"], 3, "clinic", ["--cross_validate=3"]),
        (["--cross_validate=3", "--external_dir", "b c"], 3, "b c", []),
        (["--seed", "1"], None, "b c", ["--external_dir=b c"]),
        (["--seed", "1"], None, None, []),
        (["--cross-validate", "3", "--external-dir=clinic"], 3, "clinic", []),  # the parser takes these, too
        (["--config", "run.yaml"], 3, "clinic", []),
        (["--cross_validate", "3", "--external_dir", "clinic"], 5, "b c",  # the other ones were measured last
         ["--cross_validate=5", "--external_dir=b c"]),
    ],
)  # fmt: skip
def test_command_has_what_was_measured_later_once(tmp_path, monkeypatch, given, folds, folder, added):
    for name in ("sub/clinic", "clinic", "b c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("cross_validate: 3\nexternal_dir: sub/clinic\n")
    monkeypatch.chdir(tmp_path)
    results = {"settings": json.loads(json.dumps(vars(read_settings(given)[0])))}
    results |= {"cross_validation": {"folds": folds}} if folds else {}
    results |= {"external": {"folder": folder}} if folder else {}
    words = shlex.split(command_of(results))
    assert words == ["python", "finetune_vit.py", *given, *added]
    again, _ = read_settings(words[2:])
    assert again.cross_validate == (folds or 0) and Path(again.external_dir or "").name == (folder or "")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/private/split.csv", "split.csv"),
        ("~/private/split.csv", "split.csv"),
        ("~me/private/split.csv", "split.csv"),
        ("../private/split.csv", "split.csv"),
        ("data/../../private/split.csv", "split.csv"),
        ("--metadata=/home/me/private/split.csv", "--metadata=split.csv"),
        ("--metadata=~/private/split.csv", "--metadata=split.csv"),
        ("--metadata=../private/split.csv", "--metadata=split.csv"),
        (["--config", "../private/my run.yaml", "--seed", "1"], ["--config", "my run.yaml", "--seed", "1"]),
        ("near-duplicates", "near-duplicates"),
        ("data/split.csv", "data/split.csv"),  # below the folder of the script
        ("google/vit-base-patch16-224-in21k", "google/vit-base-patch16-224-in21k"),
        ("https://datasets.simula.no/kvasir.zip", "https://datasets.simula.no/kvasir.zip"),
        ("--learning_rate=1e-4", "--learning_rate=1e-4"),
        (0.15, 0.15),
        (None, None),
        (True, True),
        ({"min_lr": 1e-6}, {"min_lr": 1e-6}),
    ],
)
def test_of_a_path_elsewhere_only_the_last_name_is_published(value, shown):
    assert public(value) == shown


@pytest.mark.parametrize("folder", ["/abs-secret", "~/home-secret", "../up-secret", "here/../../dots-secret"])
def test_card_holds_no_path_of_this_machine(tmp_path, card_of, results, folder):
    """Of all settings that can be a path, in the settings and in the arguments."""
    names = "data_dir data_root external_dir model_name_or_path output_dir run_name metadata".split()
    values = {name: f"{folder}/hidden/last-{name}" for name in names}
    flags = [word for name, value in values.items() for word in (f"--{name}", value)]
    flags += [f"--{name}={value}" for name, value in values.items()]
    flags += ["--config", f"{folder}/hidden/last.yaml", f"--config={folder}/hidden/last.yaml"]
    given = results["settings"] | values | {"arguments": flags}
    given = {name: public(value) for name, value in given.items()}  # as `summarise` does
    card = str(card_of(results | {"settings": given}))
    written = card + (tmp_path / "report" / "metrics.json").read_text()
    assert not re.search(r"secret|hidden|~/|\.\./", written) and str(tmp_path) not in written
    for name in names:
        assert f"--{name} last-{name} " in card and f"--{name}=last-{name} " in card
    assert "--config last.yaml --config=last.yaml\n" in card
    assert "Fine-tuned from `last-model_name_or_path`" in card and "| split_by | near-duplicates |" in card


def test_card_speaks_of_overlays_only_where_there_are_some(card_of, results):
    """Only of endoscopes does it know what they add. The table of shortcuts is there in any case."""
    results["shortcuts"] |= {"lower left corner": {"accuracy": 0.7531, "macro_f1": 0.71}}
    for endoscopy in (False, True):
        results["data"]["endoscopy"] = endoscopy
        text = card_of().text.lower()
        for word in ("endoscop", "burn", "inset"):
            assert (word in text) is endoscopy, word
        assert "## shortcuts" in text and "| nothing | 0.912 | 0.870 |" in text
        assert "| lower left corner | 0.753 | 0.710 |" in text
        assert "a small drop does not rule a shortcut out" in text


def test_card_says_when_a_random_split_flatters(card_of, results):
    results["split"] |= {"by": "random", "pairs_across_splits": 29, "pairs_across_test": 18}
    text = " ".join(card_of().text.split())
    assert (
        "The results are optimistic" in text and "29 are on two sides of the split, 18 of them with" in text
    )
    assert "a group is not divided" not in text


def test_card_of_a_given_split_that_divides_pairs(card_of, results):
    given = {"train": ["train"], "validation": ["train"], "test": ["validation"]}
    results["split"] |= {"by": "given", "given": given, "pairs_across_splits": 29, "pairs_across_test": 18}
    text = " ".join(card_of().text.split())
    assert "18 of them with one image in the test, which flatters the results" in text
    assert "**The results are optimistic**: the model has seen near-copies" in text
    assert "It had no test images: its validation images are the test." in text
    assert "Its training images gave a part, in whole groups, for validation." in text
    results["split"]["given"] = {name: [name] for name in given}
    text = " ".join(card_of().text.split())
    assert "It had no test images" not in text and "gave a part" not in text


def test_card_speaks_of_patients_and_of_an_earlier_model(card_of, results):
    assert "no patient IDs were used" in card_of().text
    results["split"] |= {
        "patients": 12,
        "scenes": 150,
        "images_without_patient": 3,
        "patients_across_test": 2,
    }
    results["split"]["earlier"] = {"kept": 190, "new": 10, "absent": 5, "learned": 1}
    text = " ".join(card_of().text.split())
    for part in (
        "12 of those and 150 scenes form 150 groups of 200 images",
        "nor on a patient that it knows; of 3 images the patient is not known",
        "2 of 12 patients are both in the test set and outside it",
        "keeps its split for 190 images; 10 are new",
        "5 images that it has learned were not there",
        "that model has learned 1 of the test images",
    ):
        assert part in text, part
    assert "no patient IDs were used" not in text


def test_card_of_a_class_without_test_images(card_of, results):
    zero = {"precision": 0, "recall": 0, "specificity": 0.95, "f1": 0, "n": 0}
    results["per_class"] = results["per_class"] | {"polyps": zero}
    assert "| polyps | – | – | 0.950 | – | 0 |" in card_of().text


@pytest.mark.parametrize("classes, rows", [(2, 2), (23, 23), (200, 40), (1000, 40)])
def test_card_of_many_classes_shows_the_worst_and_the_rarest(card_of, results, classes, rows):
    """Class n has n % 90 + 3 images, and a recall that falls with n; the last one is not tested."""
    names, row = [f"dyed-resection-margins-{n:04}" for n in range(classes)], results["per_class"][NAMES[0]]
    shares = [1 - n / classes for n in range(classes)]
    per_class = {name: row | {"recall": share} for name, share in zip(names, shares, strict=True)}
    per_class[names[-1]]["n"] = 0
    counts = {name: n % 90 + 3 for n, name in enumerate(names)}
    results |= {"per_class": per_class, "most_frequent": {"class": names[0], "accuracy": 0.125}}
    results["split"] |= {"classes": {part: counts for part in ("train", "validation", "test")}}
    text = card_of().text
    parts = [re.findall(r"^\| (dyed\S+) \|", part, re.M) for part in text.split("|---|")]
    counted, scored, ranked = filter(None, parts)
    many = classes > rows
    assert counted == (sorted(names, key=counts.get)[:rows] if many else names)
    assert scored == (names[-2 : -rows - 2 : -1] if many else names)
    assert ranked == (scored if many else names[:-1])
    assert len(text) < 30_000
    for note in ("the worst first", "`config.json` names all", f"the 40 rarest of {classes:,} classes"):
        assert (note in text) == many


def test_card_shows_ranks_and_what_accuracy_is_compared_with(card_of, results):
    text = card_of().text
    assert "| macro AUROC | 0.876 (0.812 to 0.932) | 0.876 (0.812 to 0.932) |" in text
    assert f"| {plain_text(NAMES[1])} | 0.970 (0.910 to 0.990) | 0.940 (0.800 to 0.980) |" in text
    assert f"Always answering {plain_text(NAMES[0])}, the most frequent class" in text
    assert "would give an accuracy of 0.125" in text and "positive class" not in text
    assert "Read the numbers with care" not in text and "Undefined" not in text


def test_card_shows_warnings_as_plain_text_and_thresholds_of_two_classes(card_of, results):
    results["warnings"] = ["*a*|b: 2 images of 1 patient decide its recall"]
    ends = {"value": 0.8, "low": 0.6, "high": 0.9}
    point = {"wanted": "specificity", "at": 0.95, "threshold": 0.4321, "sensitivity": ends}
    results["operating_points"] = {"positive": "p*", "points": [point | {"specificity": ends}]}
    del results["validation"]["macro_auroc"]  # of which one class has images
    text = card_of().text
    assert "- &#42;a&#42;&#124;b&#58; 2 images of 1 patient decide its recall" in text
    row = "| specificity of at least 0.95 | 0.432 | 0.800 (0.600 to 0.900) | 0.800 (0.600 to 0.900) |"
    assert row in text and "p&#42; is the positive class" in text
    assert "| macro AUROC | 0.876 (0.812 to 0.932) | – |" in text


def test_card_tells_what_was_measured_elsewhere(card_of, results):
    scores = {
        "accuracy": {"value": 0.7, "low": 0.6, "high": 0.8},
        "macro_f1": {"value": 0.5, "low": 0.4, "high": 0.6},
    }
    results["external"] = {"folder": "other-clinic", "images": 90, "near_duplicates_left_out": 10,
                           "per_class": {"polyps": {}}} | scores  # fmt: skip
    results["cross_validation"] = {"folds": 5, "accuracy": {"mean": 0.9, "sd": 0.02},
                                   "macro_f1": {"mean": 0.85, "sd": 0.03}}  # fmt: skip
    text = " ".join(card_of().text.split())
    row = "| `other-clinic` (polyps) | 90 | 10 | 0.700 (0.600 to 0.800) | 0.500 (0.400 to 0.600) |"
    assert row in text and "not tested on images from elsewhere" not in text
    assert "--cross_validate=5 --external_dir=other-clinic" in text
    assert "5 more models" in text and "accuracy 0.900 ± 0.020, macro F1 0.850 ± 0.030" in text


def test_card_says_how_many_labels_are_in_doubt(card_of):
    text = " ".join(card_of().text.split())
    assert "(on images that it has not learned: validation and test) and the near-duplicates" in text
    assert "together put the labels of 9 of 60 images in doubt, 2 of these also by confident" in text


@pytest.mark.parametrize("patients", [True, False])
def test_card_says_what_appearance_cannot_find_where_no_patients_are_known(card_of, results, patients):
    results["split"] |= {"patients": 40, "scenes": 90, "images_without_patient": 0} if patients else {}
    text = " ".join(card_of().text.split())
    assert ("about four in ten neighbouring frames" in text) is not patients


def test_an_edited_card_is_left_alone_and_an_untouched_one_follows_the_results(tmp_path, card_of, results):
    card = tmp_path / "README.md"
    card_of()
    results["split"]["conflicting_label_pairs"] = 8
    assert "8 carry two different labels" in card_of().text
    card.write_text(card.read_text() + "mended by hand")
    results["split"]["conflicting_label_pairs"] = 9
    assert card_of().text.endswith("mended by hand")
    assert "9 carry two" in (tmp_path / "report" / "model_card.md").read_text()


def test_nothing_is_drawn_twice(tmp_path, report):
    report()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "report").iterdir()}
    report()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "report").iterdir()} == before


def test_a_card_of_the_users_own_is_never_replaced(tmp_path, card_of):
    (tmp_path / "README.md").write_text("my own")
    assert card_of().text == "my own"


@pytest.mark.parametrize(
    "made, says, chosen",
    [
        ("fine-tuned", "Fine-tuned from", "images chose the epoch and the temperature"),
        ("probed", "to the unchanged features of", "images chose the temperature"),
        ("evaluated", "as it was, evaluated", "This run learned nothing"),
    ],
)
def test_card_says_what_was_learned(card_of, results, made, says, chosen):
    if made != "fine-tuned":
        del results["chosen_epoch"]
    card = card_of(results | {"made": made})
    assert f"# vit-base-patch16-224-in21k {made} on my-images" in card.text
    assert says in card.text and chosen in card.text
    assert ("divided by the temperature" in card.text) is (made != "evaluated")
    assert ("epoch 3 of 4" in card.text) is (made == "fine-tuned")


def test_no_picture_without_something_to_show(tmp_path, report, results):
    card = report(
        results | {"made": "evaluated"}, predictions=predict_by_chance(NAMES, right=1),
        history=[{"ridge_strength": 10.0}], pairs={"label_a": [], "label_b": []},
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert names == {
        "attribution.png", "confusion_matrix.png", "per_class.png", "precision_recall.png", "reliability.png",
        "roc.png",
    }  # fmt: skip
    assert "training_curves" not in card.text and "--num_train_epochs 0" in card.text


def test_pictures_on_disk_are_large_enough(tmp_path, report):
    report()
    for path in (tmp_path / "report").glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 900 and len(image.convert("RGB").getcolors(1 << 24)) > 50, path.name


def test_page_of_other_classes_has_no_examples_and_names_the_published_model(tmp_path):
    app = make_space(tmp_path / "space", ["cat", "dog"], "me/pets", "v2")
    assert app == tmp_path / "space" / "app.py" and not (tmp_path / "space" / "examples").exists()
    named = json.loads((tmp_path / "space" / "model.json").read_text())
    assert named == {"model": "me/pets", "revision": "v2"}
    assert "- me/pets" in (tmp_path / "space" / "README.md").read_text()


@settings(max_examples=30, deadline=None)
@example(name="a\r|b\t{{c}} $d$ <e> `f` _g_ h_i **j** &k; [l](m) # ~n~  \\o\n1")
@given(name=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=60))
def test_any_name_is_shown_in_markdown_as_it_is(name):
    """In a table and as code, by a reader of CommonMark."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt().enable("table")
    table, line = f"| class | n |\n|---|---|\n| {plain_text(name)} | 1 |\n", f"Of {code(name)}."
    tokens = markdown.parse(table)
    cells = [token.children for token in tokens if token.type == "inline"]
    assert len(cells) == 4 and "".join(child.content for child in cells[2]) == name
    children = markdown.parse(line)[1].children
    assert "".join(child.content for child in children if child.type != "html_inline") == f"Of {name}."


def test_card_and_pictures_of_names_that_mean_something_else(tmp_path, report, results, recwarn):
    """The card's header can be read, and its tables have a row for each class, with its name."""
    names = ["normal\r", "a|b\n{{ c }}", "$x$ <b>", "胃 مرحبا 😀"]
    results["per_class"] = dict.fromkeys(names, [*results["per_class"].values()][0])
    results["split"]["classes"] = dict.fromkeys(("train", "validation", "test"), dict.fromkeys(names, 21))
    results["data"]["name"] = "data `1`\r"
    conflict = {"file_a": ["x/1.jpg"], "file_b": ["x/2.jpg"], "distance": [0.01], "label_a": names[:1],
                "label_b": names[1:2]}  # fmt: skip
    card = report(results, predict_by_chance(names), pairs=conflict, names=names)
    assert card.data.model_name.endswith("on data `1`\r") and "\r" not in card.text
    rows = re.findall(r"^\| (.+?) \|", card.text, re.M)
    assert [html.unescape(row) for row in rows if html.unescape(row) in names] == names * 3
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_page_is_made_again_only_if_it_would_be_another(tmp_path):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "space").iterdir() if path.is_file()}

    app, before = make_space(tmp_path / "space", ["cat", "dog"]), stamps()
    make_space(tmp_path / "space", ["cat", "dog"])
    assert stamps() == before
    make_space(tmp_path / "space", ["cat", "dog"], "me/pets", "v3")
    assert json.loads((tmp_path / "space" / "model.json").read_text())["revision"] == "v3"
    assert "- me/pets" in (tmp_path / "space" / "README.md").read_text()
    whole = app.read_text()
    app.write_text("half")
    assert make_space(tmp_path / "space", ["cat", "dog"], "me/pets", "v3").read_text() == whole


@pytest.mark.parametrize(("model", "revision"), [("", None), ("tiny", "v2")])
def test_page_is_of_the_model_that_the_file_beside_it_names(tmp_path, tiny_vit, monkeypatch, model, revision):
    """Run app.py as a Space does; without a name it is the model of the folder two above."""
    gradio = pytest.importorskip("gradio")
    pages, asked, pipeline = [], [], transformers.pipeline
    shutil.copytree(tiny_vit, tmp_path / "run")
    app = make_space(tmp_path / "run" / "report" / "space", ["polyps", "cat"], model, revision)

    def load(task, name, revision=None):
        asked.append((name, revision))
        return pipeline(task, str(tiny_vit))

    monkeypatch.setattr("transformers.pipeline", load)
    monkeypatch.setattr(gradio.Interface, "launch", lambda page, **options: pages.append(page) or (0, "", ""))
    monkeypatch.setattr(gradio.Interface, "block_thread", lambda page: None)
    runpy.run_path(str(app), run_name="__main__")
    assert asked == [(model or str(tmp_path / "run"), revision)]
    (page,) = pages
    assert page.title == (model or "run") and "Not a medical device" in page.description
    assert "7 classes: LABEL_0" in page.article and "The examples are drawings." in page.article
    assert page.flagging_mode == "never"
    answer = page.fn(str(app.parent / "examples" / "polyps.jpg"))
    assert len(answer) == 7 and sum(answer.values()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(gradio.Error, match="Choose an image first"):
        page.fn(None)
    with pytest.raises(gradio.Error, match="cannot be read as an image"):
        page.fn(str(app))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Return a function that serves a page of Gradio's and says what it wrote, or how it ended."""
    gradio = pytest.importorskip("gradio")
    app = runpy.run_path(str(make_space(tmp_path, ["cat", "dog"])))

    def serve(share, answer):
        def launch(page, **options):
            print("a line of Gradio's")
            if isinstance(answer, Exception):
                raise answer
            return None, "http://127.0.0.1:1/", answer

        monkeypatch.setattr(gradio.Interface, "launch", launch)
        monkeypatch.setattr(gradio.Interface, "block_thread", lambda page: None)
        app["serve"](gradio.Interface(str, "text", "text"), share)

    return serve


def test_page_names_its_addresses(served, capsys):
    served(False, None)
    served(True, "https://x.gradio.live")
    here = "page: http://127.0.0.1:1/"
    lines = [here, f"{here}, public link: https://x.gradio.live"]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("share, answer, said", [
    (True, None, "error: Gradio's server gave no public link; check the network"),
    (False, OSError("Cannot find empty port in range: 7860-7860.\nMore"), "range: 7860-7860.; fix that"),
    (False, ValueError("When localhost is not accessible"), "cannot be opened: When localhost"),
])  # fmt: skip
def test_page_that_cannot_be_opened_is_one_line(served, share, answer, said):
    with pytest.raises(SystemExit) as stopped:
        served(share, answer)
    line = stopped.value.code
    assert line.startswith("error: ") and said in line and "\n" not in line


def test_the_space_needs_what_the_script_needs(tmp_path):
    make_space(tmp_path, ["a", "b"], "me/model")
    ours = (ROOT / "requirements.txt").read_text().splitlines()
    assert {*(tmp_path / "requirements.txt").read_text().splitlines()} <= {*ours}
