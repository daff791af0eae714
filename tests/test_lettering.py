"""Step 9: whatever a class is called, a picture says which one it is, with the fonts that there are."""

import string

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from steps import lettering
from steps.lettering import draws, explain, fonts_for, letter, shorten, width_of

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=255)


@pytest.fixture(autouse=True)
def own_fonts(monkeypatch):
    """Only the fonts that come with Matplotlib, which are the same on every machine."""
    kept = [font for font in lettering.font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(lettering.font_manager.fontManager, "ttflist", kept)
    draws.cache_clear()


@pytest.mark.parametrize(
    "names, shown",
    [
        (["normal-cecum", "ülser", "a|b $x$ {{y}} <b>", "x" * 48],) * 2,
        (["normal\r", "a\tb\n"], ["normal\\r", "a\\tb\\n"]),
        (["normal\r", "normal\\r", "polyp"], ["#0", "#1", "polyp"]),
        (["a", "胃", "x" * 49, "#0", " ", "क"], ["a", "#1", "#2", "#3", "#4", "#5"]),
    ],
)
def test_a_class_is_shown_by_its_name_or_by_its_number(names, shown):
    assert [*letter(names).values()] == shown


def test_words_from_right_to_left_are_drawn_where_matplotlib_can(monkeypatch):
    monkeypatch.setattr(lettering, "SHAPES", True)
    assert letter(["مرحبا"]) == {"مرحبا": "\u200eمرحبا\u200e"}  # or "90%" beside it would become "%90"
    monkeypatch.setattr(lettering, "SHAPES", False)
    assert letter(["مرحبا"]) == {"مرحبا": "#0"}


def test_a_font_is_added_where_the_usual_one_lacks_a_letter(monkeypatch):
    assert fonts_for(string.printable) == fonts_for([]) == ["sans-serif"]
    only_here = "\ue000"  # of the area for private use; Matplotlib's own fonts disagree on it
    monkeypatch.setattr(lettering, "NO_LETTERS", ("Last", "DejaVu", "cm"))
    family = next(
        font.name for font in lettering.font_manager.fontManager.ttflist if draws(font.name, only_here)
    )
    assert not draws("sans-serif", only_here) and draws(family, only_here)
    assert len(fonts_for(["a", only_here])) == 2 and "#" not in letter([only_here])[only_here]


def test_a_legend_says_which_class_a_number_means():
    names = ["polyp", "胃\r", "long " * 30, "胃"]
    figure = Figure(figsize=(5, 3), layout="constrained")
    figure.subplots().set_title("title")
    explain(figure, [names[2], names[0], names[1], names[2]], letter(names))
    words = "".join(figure.get_supxlabel().replace("\n", "").split("#"))
    assert words == f"2 = {names[2]}1 = \\u80c3\\r" and figure.get_figheight() > 3.5
    figure.draw_without_rendering()
    box = next(text for text in figure.texts).get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 < figure.axes[0].bbox.y0
    plain = Figure(figsize=(5, 3))
    explain(plain, ["polyp"], letter(names))
    assert not plain.get_supxlabel() and plain.get_figheight() == 3


@pytest.mark.parametrize(
    "text, longest, shown",
    [
        ("0d2dab27-7dde.jpg", 17, "0d2dab27-7dde.jpg"),
        ("0d2dab27-7dde.jpg", 11, "0d2da…e.jpg"),
        ("胃" * 10, 11, "胃胃…胃胃胃"),
        ("ağız boşluğu.jpeg", 10, "ağız….jpeg"),
        ("abcde\u0301fgh", 6, "ab…fgh"),
    ],
)
def test_a_long_name_loses_its_middle(text, longest, shown):
    assert shorten(text, longest) == shown and width_of(shown) <= longest


@settings(max_examples=30, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=6, unique=True))
def test_any_names_are_told_apart_and_drawn_without_a_warning(names):
    shown = letter(names)
    assert list(shown) == names and len(set(shown.values())) == len(names)
    with matplotlib.rc_context({"text.parse_math": False, "font.family": fonts_for(names)}):
        figure = Figure(layout="constrained")
        figure.subplots().set_yticks(range(len(names)), shown.values())
        explain(figure, names, shown)
        figure.draw_without_rendering()  # a warning is an error in the tests of this file
    legend = figure.get_supxlabel()
    assert all(text in legend for text in shown.values() if text.startswith("#"))


pytestmark = pytest.mark.filterwarnings("error")
