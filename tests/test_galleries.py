"""Step 9: pictures of the images say which files they show and what speaks for an answer."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import draw_pixels, predict_by_chance
from test_figures import CALIBRATION, HISTORY, assert_legible, long_names, results_of, trainer_of

from steps.duplicates import Scenes
from steps.figures import charts
from steps.files import probability_columns
from steps.galleries import draw_conflicts, draw_examples, galleries, name_files, overlay
from steps.lettering import fonts_for
from steps.publish import PUBLISHED


@pytest.mark.parametrize("classes", [2, 8, 23])
def test_examples_show_the_pictures_and_say_what_they_are(tiny_vit, classes):
    names = long_names(classes)
    table, (images, pixels) = predict_by_chance(names)[:12], draw_pixels(names)
    figure = draw_examples(table, names, images, trainer_of(tiny_vit))
    for row, axes in enumerate(figure.axes[: len(table)]):
        shown = axes.images[0].get_array()
        assert (shown[:, :32] == pixels[row].transpose(1, 2, 0)).all() and shown.shape == (32, 68, 3)
        assert (shown[:, 36:] != shown[:, :32]).any()
        certain = f"{table[probability_columns(names)].iloc[row].max():.0%}"
        caption = f"label: {table['label'].iloc[row]}\npredicted: {table['prediction'].iloc[row]}, {certain}"
        assert axes.get_title() == f"x/{row}.jpg\n{caption}"
    assert figure.axes[-1].get_xlabel() == "speaks for the predicted class"
    assert_legible(figure)


def test_conflicts_stand_side_by_side(tiny_vit):
    images, pixels = draw_pixels(["polyps", "esophagitis"])
    pairs = {"file_a": ["x/3.jpg", "x/9.jpg"], "file_b": ["x/7.jpg", "x/1.jpg"], "distance": [0.0012, 0.03],
             "label_a": ["polyps", "esophagitis"], "label_b": ["esophagitis", "polyps"]}  # fmt: skip
    figure = draw_conflicts(pd.DataFrame(pairs), images, trainer_of(tiny_vit))
    first = figure.axes[0].images[0].get_array()
    assert (first[:, :32] == pixels[3].transpose(1, 2, 0)).all()
    assert (first[:, 36:] == pixels[7].transpose(1, 2, 0)).all()
    assert figure.axes[0].get_title() == "x/3.jpg\nx/7.jpg\npolyps | esophagitis\ndistance 0.001"
    assert_legible(figure)


UUID = "0d2dab27-7dde-4f7a-b0f7-0f4e3bfca975.jpg"


@pytest.mark.parametrize(
    "file, label, shown",
    [
        (f"polyps/{UUID}", "polyps", UUID),
        ("ülser ağrısı/ağız.png", "ülser ağrısı", "ağız.png"),
        ("train/polyps/1.jpg", "polyps", "train/polyps/1.jpg"),
        ("1.jpg", "polyps", "1.jpg"),
        ("polyps/1.jpg", "polyp", "polyps/1.jpg"),
        (f"clinic-7/polyps/{UUID}", "polyps", "clinic-7/polyps/0d2dab…a-b0f7-0f4e3bfca975.jpg"),
    ],
)
def test_files_are_named_in_few_letters(file, label, shown):
    assert name_files(pd.Series([file]), pd.Series([label])) == [shown]


def test_long_and_foreign_names_of_files_and_classes_fit(tiny_vit):
    """A warning of Matplotlib about a letter without a font is an error here."""
    names = ["a very long name of a class, almost too long " + end for end in "ab"] + ["ülser"]
    files = [f"ülser/{'ğ' * 90}.jpg", f"胃{'胃' * 40}/1.jpg", f"صورة/{'صورة' * 20}.jpg", "a\rb/$x$_{1}.jpg"]
    images, _ = draw_pixels(names)
    images = images.select(range(4)).remove_columns("file").add_column("file", files)
    table = predict_by_chance(names)[:4].assign(file=files, prediction=names[0], label=names[1])
    style = {"text.parse_math": False, "font.family": fonts_for(names)}
    with matplotlib.rc_context(style):
        figure = draw_examples(table, names, images, trainer_of(tiny_vit))
        assert_legible(figure)


def test_orange_lies_where_a_map_is_high():
    pixels = np.full((2, 32, 32, 3), 100, np.uint8)
    maps = torch.zeros(2, 16, 16)
    maps[0, 4, 4], maps[0, 12, 12], maps[1] = 3.0, -9.0, -1.0
    shown = overlay(pixels, maps)
    assert (shown[1] == 100).all() and (shown[0, 20:] == 100).all()
    assert np.argwhere((shown[0] != 100).any(2)).min() >= 6 and (shown[0, 8:10, 8:10, 2] < 70).all()


def test_doubtful_labels_are_shown_with_file_label_and_proposed_class(tiny_vit, tmp_path):
    images, table = draw_pixels(["a", "b"])[0], predict_by_chance(["a", "b"])
    scenes = Scenes(pd.DataFrame(columns=["label_a", "label_b"]), pd.Series(range(60), table["file"]))
    trainer = trainer_of(tiny_vit, tmp_path, [f"x/{row}.jpg" for row in range(20)])
    drawn = galleries(table, scenes, images, trainer)
    assert "report/label_issues.png" not in PUBLISHED
    titles = [axes.get_title() for axes in drawn["label_issues.png"]().axes]
    assert titles[0] == "x/0.jpg\nlabel: a\nproposed: b, 95%" and len([*filter(None, titles)]) == 12


def test_charts_are_published_and_galleries_never(tiny_vit, tmp_path):
    """The galleries show images: the most certain mistakes first, and a right answer per class."""
    names = long_names(3)
    table, (images, _) = predict_by_chance(names), draw_pixels(names)
    trainer = trainer_of(tiny_vit, tmp_path)
    pairs = {"file_a": ["x/1.jpg", "x/3.jpg"], "file_b": ["x/2.jpg", "x/4.jpg"], "distance": [0.01, 0.02],
             "label_a": names[:2], "label_b": [names[0], names[2]]}  # fmt: skip
    scenes = Scenes(pd.DataFrame(pairs), pd.Series(range(60), table["file"]))
    drawn = galleries(table, scenes, images, trainer)
    shown = charts(
        results_of(table, names) | {"made": "fine-tuned", "calibration": CALIBRATION}, table, HISTORY
    )
    assert {f"report/{name}" for name in shown} == {name for name in PUBLISHED if name.endswith(".png")}
    assert set(drawn) == {"mistakes.png", "attribution.png", "label_conflicts.png"}
    assert not set(drawn) & set(shown)

    def titles(name):
        return [title for axes in drawn[name]().axes if (title := axes.get_title())]

    wrong = table[table["label"] != table["prediction"]]
    certain = wrong[probability_columns(names)].max(axis=1).nlargest(12)
    first = wrong.loc[certain.index]
    rows = zip(first["file"], first["label"], first["prediction"], certain, strict=True)
    captions = [f"{file}\nlabel: {true}\npredicted: {got}, {p:.0%}" for file, true, got, p in rows]
    assert titles("mistakes.png") == captions
    assert sorted(title.split()[2] for title in titles("attribution.png")) == names
    assert titles("label_conflicts.png") == [f"x/3.jpg\nx/4.jpg\n{names[1]} | {names[2]}\ndistance 0.020"]


pytestmark = pytest.mark.filterwarnings("error:Glyph")
