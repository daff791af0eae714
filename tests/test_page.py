"""Step 9: the page that is looked at first, in Chromium: what it says, opens, sorts, filters and copies."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, draw_pixels, make_work, predict_by_chance, read_settings
from draw_sample import save_processor
from PIL import Image

from steps import page
from steps.discrimination import discriminate
from steps.files import write_table
from steps.page import thumbnails, write_page
from steps.publish import PUBLISHED
from steps.report import TEMPLATES, public
from steps.scores import calibration, score, score_classes, truth_of

NAMES = [
    "polyps",
    "</script><script>document.title = 1</script>",
    'a&b "it\'s" `$x` \\ {{ 7 * 7 }}',
    "طبيعي",
    "z" * 150,
]
FILES = [
    "x/<img src=x onerror=alert(1)>.jpg",
    "x/\"quoted'\r\n.jpg",
    "x/قولون.jpg",
    "x/" + "long" * 50 + ".jpg",
]


def results_of(predictions, names):
    """The content of metrics.json for these test images, each a group of its own."""
    truth, groups = truth_of(predictions, names), pd.Series(range(len(predictions)), predictions["file"])
    ranks = discriminate(*truth, groups.to_numpy())
    values = score(*truth, groups.to_numpy()) | ranks["macro"]
    per_class = score_classes(predictions, groups, names, ranks)
    for row in per_class.values():
        for name in ("auroc", "average_precision") if row["n"] else ():
            row |= {name: 0.8125, f"{name}_low": 0.7125, f"{name}_high": 0.9125}
    split = {"by": "near-duplicates", "train": 140, "validation": 30, "test": len(predictions), "groups": 150}
    split["test_groups"] = len(predictions)
    split |= {"near_duplicate_pairs": 60, "pairs_across_splits": 0, "pairs_across_test": 0}
    split |= {"conflicting_label_pairs": 3, "classes": {}}
    settings, training = read_settings(["--output_dir", "model"])
    recorded = vars(settings) | training.to_dict() | {"data_dir": "/home/me/secret", "images_per_step": 64}
    recorded["arguments"] = ["--data_dir", "/home/me/secret"]
    return {
        "made": "fine-tuned", "chosen_epoch": 3.0, "test": values, "validation": values,
        "per_class": per_class, "most_frequent": {"class": names[0], "accuracy": 0.3125},
        "warnings": [f"{names[1]}: 2 images of 1 patient"],
        "split": split, "calibration": calibration(*truth, groups.to_numpy(), 1.25),
        "shortcuts": {"nothing": {"accuracy": 0.5, "macro_f1": 0.4}},
        "speed": {"train_images_per_second": 12.34, "train_seconds": 567.0, "evaluate_images_per_second": 89},
        "data": {"name": "my-images", "kvasir": False},
        "label_issues": {"images": 90, "listed": 2, "from": "validation and test"},
        "settings": {name: public(value) for name, value in recorded.items()},
        "versions": {"torch": "2.13.0", "device": "a test machine"},
    }  # fmt: skip


class Run:
    """A finished run of drawn images in a folder, as far as the page needs it."""

    def __init__(self, folder, names, files=()):
        self.names, self.report = names, folder / "report"
        self.report.mkdir(parents=True)
        save_processor(folder, 32)
        self.predictions = predict_by_chance(names)
        known = dict(zip(self.predictions["file"], files, strict=False))
        self.predictions["file"] = self.predictions["file"].replace(known)
        images = draw_pixels(names)[0].to_dict() | {"file": self.predictions["file"].tolist()}
        self.images = draw_pixels(names)[0].from_dict(images, features=draw_pixels(names)[0].features)
        self.results, shown = results_of(self.predictions, names), self.predictions
        split = shown[["file", "label"]].assign(split="test", group=range(60))
        pairs = {"file_a": shown["file"][:3], "file_b": shown["file"][3:6].tolist(), "distance": 0.01}
        pairs |= {"label_a": names[0], "label_b": [names[1], names[1], names[0]]}
        issues = shown[["file", "label"]][:2].assign(proposed=names[1], split="test", why="prediction")
        issues = issues.assign(p_label=0.0625, p_proposed=0.9375)
        for name, table in ("split", split), ("near_duplicates", pairs), ("label_issues", issues):
            write_table(self.report / f"{name}.csv", pd.DataFrame(table))
        for number, name in enumerate(("per_class", "attribution", "mistakes")):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(self.report / f"{name}.png")
        self.work = make_work(["--output_dir", folder])
        self.write()

    def write(self):
        """Write the pages; return when each was written last."""
        write_page(self.results, self.predictions, self.images, self.work)
        return [(self.report / name).stat().st_mtime_ns for name in ("index.html", "public.html")]

    @property
    def tested(self):
        """The test images in the order of the page."""
        rows = page.tests_of(self.predictions, self.names)
        doubt = rows["probability"].where(rows["right"], -rows["probability"])
        return rows.loc[doubt.sort_values(kind="stable").index]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("page"), NAMES, FILES)


@pytest.fixture(scope="module")
def browser():
    browsers = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no Chromium here")
    with browsers.sync_playwright() as play:
        yield play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser):
    """Return a function that opens a file; it must ask for nothing else and raise nothing."""
    contexts, wrong, asked = [], [], []

    def open_page(path, **options):
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(5000)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("request", lambda request: asked.append(request.url.partition(":")[0]))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == [] and asked.count("file") == len(contexts) and {*asked} <= {"file", "data"}


def files_in(tab):
    return tab.eval_on_selector_all(
        "#table tbody .file bdi", "cells => cells.map((cell) => cell.textContent)"
    )


def texts(tab, selector):
    return [text.strip() for text in tab.locator(selector).all_text_contents()]


def test_numbers_of_the_page_are_those_of_the_run(open_page, run):
    tab, accuracy = open_page(run.report / "index.html"), run.results["test"]["accuracy"]
    headline = " ".join(tab.locator("header").inner_text().replace("\u202f", " ").split())
    interval = "95 % interval {low:.3f} to {high:.3f}".format(**accuracy)
    for part in (f"{accuracy['value']:.3f}", interval, "test images 60", "groups 60", "classes 5",
                 "would score 0.312", f"{NAMES[1]}: 2 images of 1 patient", "Not a medical device",
                 "No patients were given"):  # fmt: skip
        assert part in headline, part
    assert tab.title() == "vit-base-patch16-224-in21k fine-tuned on my-images"
    for name, row in zip(NAMES, tab.locator("#results .sortable tbody tr").all(), strict=True):
        found = run.results["per_class"][name]
        shown = row.inner_text().replace("\u202f", " ").split("\t")
        ends = "{recall_low:.3f} to {recall_high:.3f}".format(**found)
        assert row.locator("bdi").text_content() == name
        assert [*map(str.strip, shown[1:])] == [f"{found['precision']:.3f}", f"{found['recall']:.3f}\n{ends}",
            f"{found['specificity']:.3f}", f"{found['f1']:.3f}", *["0.812\n0.713 to 0.912"] * 2,
            str(found["n"]), str(found["groups"])]  # fmt: skip
    counts = pd.crosstab(run.predictions["label"], run.predictions["prediction"])
    counts = counts.reindex(index=NAMES, columns=NAMES, fill_value=0).to_numpy()
    assert texts(tab, ".matrix tbody td") == [*map(str, counts.ravel())]


def test_a_cell_opens_its_images_and_the_filters_go_on_from_there(open_page, run):
    tab, tested = open_page(run.report / "index.html"), run.tested
    assert files_in(tab) == tested["file"].tolist()[:50]
    mistake = tested.iloc[0]
    alike = tested[["label", "prediction"]] == mistake[["label", "prediction"]]
    chosen, label = tested[alike.all(axis=1)], tested[tested["label"] == mistake["label"]]
    place = NAMES.index(mistake["label"]), NAMES.index(mistake["prediction"])
    cell = tab.locator('.matrix a[data-label="{}"][data-prediction="{}"]'.format(*place))
    meaning = (
        f"{len(chosen)} of {len(label)} images of {mistake['label']} predicted as {mistake['prediction']}"
    )
    assert cell.get_attribute("aria-label") == f"{meaning}: show them"
    cell.focus()
    tab.keyboard.press("Enter")
    tab.locator(".matrix a[aria-current=true]").wait_for()
    assert files_in(tab) == chosen["file"].tolist() and len(chosen) > 0
    assert tab.evaluate("document.activeElement.id") == "found"
    found = f"{len(chosen)} of 60 images: label {mistake['label']}, predicted {mistake['prediction']}"
    assert tab.locator("#found").inner_text() == found
    tab.get_by_text("Show all").click()
    tab.get_by_text("60 of 60 images").wait_for()
    tab.get_by_label("only wrong").check()
    wrong = tested[~tested["right"]]["file"].tolist()
    assert files_in(tab) == wrong and set(texts(tab, "#table tbody .wrong")) == {"wrong"}
    tab.get_by_label("file name contains").fill("X/1")
    assert files_in(tab) == [file for file in wrong if file.startswith("x/1")]


def test_tables_are_sorted_and_turned(open_page, run):
    tab, tested = open_page(run.report / "index.html"), run.tested
    probability = tab.locator("#table th[data-sort=probabilities]")
    for way, rises in ("descending", False), ("ascending", True):
        probability.get_by_role("button").click()
        assert probability.get_attribute("aria-sort") == way
        wanted = tested["probability"].sort_values(ascending=rises)
        assert texts(tab, "#table [data-head=probability]") == [f"{p:.3f}" for p in wanted.round(4)[:50]]
    tab.get_by_role("button", name="Next").click()
    assert tab.locator("#page").inner_text() == "51 to 60 of 60" and len(files_in(tab)) == 10
    assert tab.get_by_role("button", name="Next").is_disabled()
    tab.locator("#results th", has_text="recall").get_by_role("button").click()
    recalls = [float(text[:5]) for text in texts(tab, "#results .sortable tbody td:nth-child(3)")]
    assert recalls == sorted(recalls, reverse=True)


def test_slider_says_what_abstaining_is_worth(open_page, run):
    tab, tested = open_page(run.report / "index.html"), page.tests_of(run.predictions, NAMES)
    certain = tested.iloc[np.argsort(-tested["probability"], kind="stable")]
    slider, found = tab.locator("#abstain"), run.results["calibration"]["accuracy_at_90_percent_coverage"]
    assert tab.locator("#rest").inner_text() == f"{found:.3f}"
    for share in (0, 25, 95):
        slider.fill(str(share))
        kept = certain[: round(60 * (1 - share / 100))]
        assert tab.locator("#share").inner_text() == f"{share} %"
        assert tab.locator("#rest").inner_text() == f"{kept['right'].mean():.3f}"
        assert tab.locator("#answered").inner_text() == f"{len(kept)} of 60"
        assert tab.locator("#mistakes").inner_text() == str((~kept["right"]).sum())
        assert tab.locator("#threshold").inner_text() == f"{kept['probability'].iloc[-1].round(6):.3f}"
    slider.press("ArrowLeft")
    assert tab.locator("#share").inner_text() == "94 %"


@pytest.mark.parametrize("allowed", [True, False])
def test_names_are_copied_as_they_are(open_page, run, allowed):
    tab = open_page(run.report / "index.html")
    if not allowed:  # as in a frame that may not use the clipboard
        tab.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    tab.evaluate("document.body.append(Object.assign(document.createElement('textarea'), {id: 'paste'}))")

    def pasted():
        tab.locator("#paste").fill("")
        tab.locator("#paste").press("ControlOrMeta+v")
        return tab.locator("#paste").input_value().split("\n")

    for file in (FILES[0], FILES[2], FILES[3]):
        tab.get_by_label("file name contains").fill(file)
        tab.locator("#table .copy").click()
        tab.locator("#table .copy", has_text="copied").wait_for()
        assert pasted() == [file]
    tab.get_by_label("file name contains").fill("x/1")
    tab.locator("#copy-all").click()
    tab.locator("#copy-all", has_text="copied").wait_for()
    assert pasted() == [file for file in run.tested["file"] if file.startswith("x/1")]
    tab.locator("#issues .copy-list").click()
    tab.locator("#issues .copy-list", has_text="copied").wait_for()
    assert pasted() == "\n".join(run.predictions["file"][:2]).replace("\r\n", "\n").split("\n")


def test_names_are_shown_as_they_are(open_page, run):
    """Those of classes and files, whatever they hold: in cells, options, labels of buttons, the viewer."""
    tab = open_page(run.report / "index.html")
    assert texts(tab, "#filters [name=label] option") == ["all", *NAMES]
    assert tab.title().startswith("vit-base") and tab.locator("script").count() == 4
    for name in NAMES:
        tab.get_by_label("label", exact=True).select_option(label=name)
        assert set(texts(tab, "#table [data-head=label]")) == {name}
    tab.get_by_text("Show all").click()
    tab.get_by_label("file name contains").fill(FILES[0])
    tab.locator("#table .thumbnail").click()
    assert tab.locator("dialog bdi").inner_text() == FILES[0]
    assert tab.locator("dialog img").evaluate("image => image.naturalWidth") == 32
    assert (
        tab.locator("dialog .note")
        .inner_text()
        .startswith(f"label {run.predictions['label'][0]}, prediction")
    )
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog").is_visible()


def test_a_phone_and_a_reader_without_javascript_see_all_that_matters(open_page, run):
    tab = open_page(run.report / "index.html", viewport={"width": 375, "height": 812})
    assert tab.evaluate("document.documentElement.scrollWidth") == 375
    assert tab.locator("#table th button").first.is_visible()
    tab = open_page(run.report / "index.html", java_script_enabled=False)
    assert tab.get_by_text("its accuracy on the others is").is_visible()
    assert tab.locator("#table tbody tr").count() == page.STATIC
    assert (
        tab.locator("#table tbody img").first.is_visible() and tab.locator("#pictures img").first.is_visible()
    )
    assert not tab.locator("#abstain").is_visible() and not tab.locator("#filters").is_visible()


def test_public_page_holds_no_image_of_the_data_set_and_no_name_of_a_file(open_page, run):
    assert "report/public.html" in PUBLISHED and "report/index.html" not in PUBLISHED
    content = (run.report / "public.html").read_text()
    assert "image/jpeg" not in content and content.count("data:image/png") == 1  # per_class.png, a chart
    assert not [file for file in run.predictions["file"] if file in content or json.dumps(file) in content]
    assert "x/" not in re.sub('<style>.*?</style>|base64,[^"]*', "", content, flags=re.S).replace("text/", "")
    for name in ("index.html", "public.html"):
        content = (run.report / name).read_text()
        assert "../" not in content or name == "index.html"
        assert "/home/me" not in content and str(run.report) not in content and str(ROOT) not in content
    tab = open_page(run.report / "public.html")
    assert (
        tab.locator(".matrix tbody td").count() == 25
        and tab.locator(".matrix a, #images, #issues").count() == 0
    )
    tab.locator("#abstain").fill("50")
    assert tab.locator("#answered").inner_text() == "30 of 60"


def test_pages_are_made_again_only_if_something_changed(tmp_path):
    run = Run(tmp_path, ["a", "b"])
    before = run.write()
    run.results["published"] = {"repo": "me/model"}  # written after the page was published
    assert run.write() == before
    for change in (
        lambda: run.results.update(chosen_epoch=4.0),
        lambda: run.predictions.update(run.predictions["p_a"] / 2),
        lambda: (run.report / "cross_validation.csv").write_text("file\n"),
        lambda: Image.new("RGB", (9, 9)).save(run.report / "per_class.png"),
        lambda: [(run.report / f"{name}.html").write_bytes(b"\xff\0") for name in ("index", "public")],
    ):
        change()
        assert min(after := run.write()) > max(before)
        before = after


def test_text_stands_out_from_what_lies_behind_it():
    """By 4.5 to 1, as WCAG 2.2 asks of small text, in light and dark; cells have the colour between two."""

    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return parts @ [0.2126, 0.7152, 0.0722]

    css = (TEMPLATES / "page.css").read_text()
    schemes = [
        dict(re.findall(r"--(\S+): (#\w{6})", part)) for part in re.findall(r":root \{(.+?)\}", css, re.S)
    ]
    pairs = [(text, behind) for text in ("ink", "soft", "blue", "orange") for behind in ("paper", "panel")]
    pairs += [("ink", behind) for behind in ("blue-fill", "orange-fill", "warn")]
    for scheme in schemes:
        for text, behind in pairs:
            dark, light = sorted(luminance(scheme[name]) for name in (text, behind))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, behind, scheme[text])
    assert len(schemes) == 2


@pytest.mark.parametrize("classes", [2, 23, 200])
def test_page_of_any_number_of_classes(tmp_path, classes):
    names = [f"class {number:03}" for number in range(classes)]
    run = Run(tmp_path, names)
    points = [{"wanted": "specificity", "at": 0.9, "threshold": 0.4375}]
    points[0] |= dict.fromkeys(("sensitivity", "specificity"), {"value": 0.75, "low": 0.5, "high": 0.875})
    if classes == 2:
        run.results["operating_points"] = {"positive": names[1], "points": points}
        run.write()
    content = (run.report / "index.html").read_text()
    assert ('class="matrix' in content) is (classes <= 23)
    assert ("most frequent confusions" in content) is (classes == 200)
    assert ("specificity of at least 90 %" in content and "0.438" in content) is (classes == 2)
    cells = re.findall(r'data-label="(\d+)" data-prediction="(\d+)"', content)
    pairs = run.predictions.groupby(["label", "prediction"]).size().index
    pairs = {(names.index(a), names.index(b)) for a, b in pairs if classes <= 23 or a != b}
    assert {(int(a), int(b)) for a, b in cells} == pairs


def test_pictures_are_small_and_those_of_many_images_stay_within_their_space(tmp_path, monkeypatch):
    images, _ = draw_pixels(["a", "b"])
    files = images["file"][:]
    large = [*thumbnails(files, images, (3, 32, 32))]
    monkeypatch.setattr(page, "FEW", 59)
    monkeypatch.setattr(page, "SMALL", 16)
    small = [*thumbnails(files, images, (3, 32, 32))]
    assert len(large) == len(small) == 60 and len("".join(small)) < 0.75 * len("".join(large))
    assert max(map(len, small)) < 6_000
    monkeypatch.setattr(page, "MOST_BYTES", 20_000)
    few = [*thumbnails(files, images, (3, 32, 32))]
    assert few == small[: len(few)] and 20_000 / 6_000 < len(few) < 60
    run = Run(tmp_path, ["a", "b"])
    assert f"Only the first {len(few)} of 60 images have a picture" in (run.report / "index.html").read_text()
