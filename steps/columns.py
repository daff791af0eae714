"""Which column of a table holds the images, the labels, the splits, the patients."""

import re
from collections.abc import Iterable

from .console import stop
from .options import Settings

# The words that people use, the one to prefer first; case, blanks and underscores do not matter.
COLUMN_WORDS = {
    "image": """file filename filepath path image imagefilename imagefile imagepath imagename imageid
    imageindex img imgpath imgname imgid idcode isicid""",
    "label": """label labels class classname diagnosis diagnostic dx target finding findings findinglabels
    category grade level""",
    "split": "split set subset partition",
    "group": """patient patientid patientname subject subjectid person personid case caseid examination
    exam examid study studyid video videoid sequence sequenceid lesion lesionid
    group""",
}
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")  # imagefolder's metadata.* has these, too
# The words of `datasets` for a split: what we call it.
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLIT_WORDS |= {"evaluation": "test"} | dict.fromkeys(["val", "valid", "validation", "dev"], "validation")


def plain(name: str) -> str:
    """Return a column's name without case, blanks, underscores and other signs."""
    return re.sub(r"[\W_]", "", name.casefold())


def find_columns(role: str, columns: Iterable[str]) -> list[str]:
    """Return those of `columns` that may hold the `role`, a key of COLUMN_WORDS, the best first."""
    words = COLUMN_WORDS[role].split()
    return sorted(
        (name for name in columns if plain(name) in words), key=lambda name: words.index(plain(name))
    )


def choose_columns(role: str, columns: list[str], settings: Settings) -> list[str]:
    """Return the columns that were asked for, or the one that the names suggest, or [].

    Several columns of one-hot labels may be asked for. Raises SystemExit if what was asked for is not there,
    and where several columns could hold the labels.
    """
    flag = f"--{role}_column_name"
    asked = getattr(settings, f"{role}_column_name")
    asked = [asked] if isinstance(asked, str) else asked or []
    if lacking := [name for name in asked if name not in columns]:
        stop(f"there is no column {lacking[0]}", f"give {flag} one of {', '.join(map(str, columns))}")
    found = asked or find_columns(role, columns)
    if role == "label" and not asked and len(found) > 1 and plain(found[0]) != "label":
        stop(f"the labels could be in any of {', '.join(found)}", f"say which: {flag} {found[0]}")
    return found if asked else found[:1]
