"""Size and speed of report/index.html with drawn images. Needs Playwright and Chromium.

python tests/benchmarks/page.py [IMAGES [CLASSES [noise]]]
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import make_work, predict_by_chance
from datasets import ClassLabel, Dataset, Features, Value
from draw_sample import save_processor
from playwright.sync_api import sync_playwright
from test_page import results_of

from steps.files import write_table
from steps.page import write_page

SIDE = 224


def draw(files: list[str], classes: int, noise: bool):
    """Yield rows of prepared images: waves with a little noise, or noise alone, which JPEG hardly packs."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    for number, file in enumerate(files):
        waves = rng.uniform(1, 12, (2, 3, 1, 1))
        picture = 128 + 90 * np.sin(waves[0] * x + 3 * waves[1] * y) + rng.normal(0, 8, (3, SIDE, SIDE))
        picture = rng.uniform(0, 256, picture.shape) if noise else picture.clip(0, 255)
        yield {
            "file": file,
            "label": number % classes,
            "pixel_values": picture.astype(np.uint8).tobytes(),
        }


def make_page(folder: Path, count: int, classes: int, noise: bool) -> Path:
    """Write the page of a made-up run, say what that took, return its path."""
    names, report = [f"class {number}" for number in range(classes)], folder / "report"
    report.mkdir()
    save_processor(folder, SIDE)
    predictions = predict_by_chance(names, count)
    predictions["file"] = [
        f"class/{number:06}-0d2dab27-7dde-4f7a-b0f7-0f4e3bfca975.jpg" for number in range(count)
    ]
    kinds = {"file": Value("string"), "label": ClassLabel(names=names), "pixel_values": Value("binary")}
    options = {"files": predictions["file"].tolist(), "classes": classes, "noise": noise}
    images = Dataset.from_generator(draw, Features(kinds), str(folder / "cache"), gen_kwargs=options)
    split = predictions[["file", "label"]].assign(split="test", group=range(count))
    write_table(report / "split.csv", split)
    pairs = pd.DataFrame(columns=["file_a", "file_b", "distance", "label_a", "label_b"])
    write_table(report / "near_duplicates.csv", pairs)
    results, work = results_of(predictions, names), make_work(["--output_dir", folder])
    for state in ("made", "found"):
        start = time.perf_counter()
        write_page(results, predictions, images, work)
        print(f"{state} in {time.perf_counter() - start:.2f} s")
    return report / "index.html"


def open_page(path: Path) -> None:
    """Say how long Chromium takes to open the page, to filter and to sort it."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(3):
            tab = browser.new_page()
            tab.goto(path.as_uri())
            tab.locator("#found").get_by_text("images").wait_for()
            opened = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
            shown = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            start = time.perf_counter()
            tab.locator("[name=wrong]").check()
            filtered = time.perf_counter()
            tab.locator("th[data-sort=files] button").click()
            times = shown / 1000, opened / 1000, filtered - start, time.perf_counter() - filtered
            print("first paint {:.2f} s, open {:.2f} s, filtered {:.2f} s, sorted {:.2f} s".format(*times))
            tab.close()


if __name__ == "__main__":
    count, classes, kind = (*sys.argv[1:4], *("10000", "8", "")[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as folder:
        page = make_page(Path(folder), int(count), int(classes), kind == "noise")
        for path in sorted(page.parent.glob("*.html")):
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
        open_page(page)
