"""README.md and README.tr.md say the same: commands, pictures, figures; what they point to is there."""

import re
from collections import Counter

import pytest
from conftest import ROOT

ENGLISH, TURKISH = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.tr.md"))


def blocks(text):
    """The code blocks, without their comments."""
    return [re.sub(r" +#.*", "", block) for block in re.findall(r"^```.*?^```", text, re.M | re.S)]


def figures(text):
    """How often each number occurs outside of code, 1,126 and 0.9 as English writes them."""
    prose = re.sub(r"^```.*?^```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.M | re.S)
    return Counter(re.findall(r"\d[\d.,]*\d|\d", prose))


def test_commands_and_pictures_are_the_same_in_both_languages():
    assert blocks(ENGLISH) == blocks(TURKISH) and len(blocks(ENGLISH)) > 4
    pictures = re.findall(r"!\[.+\]\((\.readme/.+)\)", ENGLISH)
    assert pictures == re.findall(r"!\[.+\]\((\.readme/.+)\)", TURKISH)
    assert {ROOT / name for name in pictures} == set((ROOT / ".readme").iterdir())
    levels = [re.findall(r"^#+ ", text, re.M) for text in (ENGLISH, TURKISH)]
    assert levels[0] == levels[1]


def test_tables_hold_the_same_figures_in_both_languages():
    rows = [[row for row in text.splitlines() if row.startswith("|")] for text in (ENGLISH, TURKISH)]
    assert len(rows[0]) == len(rows[1]) > 40
    swap = str.maketrans(".,", ",.")
    for english, turkish in zip(*rows, strict=True):
        assert figures(english) == Counter(number.translate(swap) for number in figures(turkish).elements())


@pytest.mark.parametrize("text", [ENGLISH, TURKISH], ids=["English", "Turkish"])
def test_links_into_the_page_and_the_checkout_lead_somewhere(text):
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            assert not path or (ROOT / path).exists(), link
            page = (ROOT / path).read_text(encoding="utf-8") if anchor and path else text
            titles = [title.lower() for title in re.findall(r"^#+ (.+)", page, re.M)]
            titles = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]
            assert not anchor or anchor in titles, link
