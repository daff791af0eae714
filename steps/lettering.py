"""Step 9: class names as a picture can show them, with the fonts that are installed."""

import functools
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

LONGEST = 48  # characters of a name beside an axis or above a picture, those of East Asia counted twice
# Before 3.11, Matplotlib neither joins the letters of a word nor sets them from right to left.
SHAPES = matplotlib.__version_info__ >= (3, 11)
NO_LETTERS = ("Last Resort", "cm", "STIX")  # fonts that draw boxes or symbols where letters should be
LEFTWARDS = ("R", "AL")  # written from right to left
INVISIBLE = ("Cf", "Mn", "Zs")  # joiners, accents, blanks: their outline may be empty
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # carriage returns and the like


@functools.cache
def draws(family: str, character: str) -> bool:
    """Say whether a family of fonts has an outline for a character. A font of bitmaps has none."""
    with suppress(ValueError, OSError, RuntimeError):  # not found, or damaged
        properties = font_manager.FontProperties(family=[family])
        font = font_manager.get_font(font_manager.findfont(properties, fallback_to_default=False))
        if font.scalable and font.get_char_index(ord(character)):
            seen = unicodedata.category(character) not in INVISIBLE
            return not seen or font.load_char(ord(character)).width > 0
    return False


def fonts_for(names: Iterable[str]) -> list[str]:
    """Return the families of fonts to draw `names` with: the usual one, then those that have what it lacks.

    As few as possible, and none for what no installed font can draw.
    """
    families = [*matplotlib.rcParamsDefault["font.family"]]
    lacking = {character for character in set("".join(names)) if not draws(families[0], character)}
    lacking = {character for character in lacking if unicodedata.category(character) not in UNPRINTABLE}
    installed = font_manager.fontManager.ttflist if lacking else ()
    usual = {font.name for font in installed if font.weight in (400, "normal") and font.style == "normal"}
    others = sorted(name for name in usual if not name.startswith(NO_LETTERS))
    while lacking and others:
        has = {family: {c for c in lacking if draws(family, c)} for family in others}
        best = max(others, key=lambda family: len(has[family]))
        if not has[best]:
            break
        families.append(best)
        lacking -= has[best]
    return families


def escape(name: str, families: Sequence[str]) -> str:
    """Return a name in characters that these fonts draw; others become \\r, \\u4e00 and so on."""
    shown = ""
    for character in name:
        plain = SHAPES or unicodedata.bidirectional(character) not in LEFTWARDS
        plain = plain and any(draws(family, character) for family in families)
        if not plain or unicodedata.category(character) in UNPRINTABLE:
            character = character.encode("unicode_escape").decode()
        shown += character
    leftwards = any(unicodedata.bidirectional(character) in LEFTWARDS for character in shown)
    mark = "\N{LEFT-TO-RIGHT MARK}" if leftwards else ""  # what follows the name stays where it is
    return mark + shown + mark


def width_of(text: str) -> int:
    """Return how wide a text is, in letters: those of East Asia count twice."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def shorten(text: str, longest: int) -> str:
    """Return a text with … in its middle if it is wider than `longest`, see `width_of`."""
    middle = len(text) // 2
    start, end = text[:middle], text[middle:]
    while width_of(start + end) > longest - (start + end != text):
        start, end = (start[:-1], end) if width_of(start) >= width_of(end) else (start, end[1:])
        while end and unicodedata.category(end[0]) in INVISIBLE[:2]:  # an accent without its letter
            end = end[1:]
    return text if start + end == text else f"{start}…{end}"


def letter(names: Sequence[str]) -> dict[str, str]:
    """Return {class: its text in a picture}: its name, or #n, where n is its place in `names`.

    It is #n where no font has the letters, the name is too long, or two look the same. A carriage return is
    shown as \\r.
    """
    families = fonts_for(names)
    shown = {name: escape(name, families) for name in names}
    times = Counter(shown.values())
    for number, (name, text) in enumerate(shown.items()):
        unclear = times[text] > 1 or text.startswith("#") or not text.strip()
        if unclear or width_of(text) > LONGEST or "\\u" in text.lower():
            shown[name] = f"#{number}"
    return shown


def explain(figure: Figure, names: Iterable[str], shown: dict[str, str]) -> None:
    """Write below a figure what the numbers in `shown` (see `letter`) mean, for those of `names`."""
    families, lines = fonts_for(shown), []
    for name in dict.fromkeys(names):
        if shown[name].startswith("#"):
            text = f"{shown[name]} = {escape(name, families)}"
            lines += textwrap.wrap(text, int(8 * figure.get_figwidth()), drop_whitespace=False)
    if lines:
        figure.set_figheight(figure.get_figheight() + 0.2 + 0.16 * len(lines))
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8)
