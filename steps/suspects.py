"""Step 3: names that tell of a part of a data set, or of masks, and not of a class."""

import re
from collections.abc import Collection, Iterable

from .columns import SPLIT_WORDS

# Words in the names of folders that hold images of all classes, masks of them, or a part of them.
IMAGE_WORDS = set(
    """image images img imgs input inputs data photo photos picture pictures frame frames original originals
    jpegimages scan scans""".split()
)
MASK_WORDS = set(
    """mask masks annotation annotations groundtruth ground truth gt segmentation segmentations trimap trimaps
    label labels contour contours""".split()
)
PART_WORDS = IMAGE_WORDS | SPLIT_WORDS.keys() | {"part", "parts", "batch", "chunk", "fold", "shard"}
MASK = re.compile(r"(.+?)[ _-](mask|seg|segmentation|gt|groundtruth|annotation|label)s?([ _-]?\d+)?", re.I)


def looks_like(names: Collection[str]) -> str:
    """Return "splits", "masks" or "parts" if all these folders are called so, else "".

    Such as train_images and test_images, images and masks, images_part_1 and images_part_2. Folders that are
    called train and test and no more may be classes.
    """
    if len(names) < 2:
        return ""
    humps = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) for name in names}  # trainImages
    words = {name: re.findall(r"[^\W\d_]+", hump.casefold()) for name, hump in humps.items()}
    common = set.intersection(*map(set, words.values()))
    own = {name: {*words[name]} - common - IMAGE_WORDS for name in names}
    told = set().union(*own.values())
    plain_splits = all(name.casefold() in SPLIT_WORDS for name in names)
    if all(own.values()) and told <= SPLIT_WORDS.keys() and not plain_splits:
        return "splits"
    masks = {name for name in names if own[name] & MASK_WORDS}
    images = {name for name in names if {*words[name]} & (IMAGE_WORDS | SPLIT_WORDS.keys())} - masks
    known = told <= MASK_WORDS | SPLIT_WORDS.keys()
    if known and masks and images and masks | images == set(names):
        return "masks"
    shapes = {re.sub(r"\d+", "0", name) for name in names}
    parts = len(shapes) == 1 and all(word and word[-1] in PART_WORDS for word in words.values())
    return "parts" if parts else ""


def masks_beside(files: Iterable[str]) -> dict[str, str]:
    """Return {file that looks like the mask of another one: that one}, such as x_mask.png beside x.png."""
    stems = {file.rpartition(".")[0]: file for file in files}
    of = {file: stems.get(found[1]) for stem, file in stems.items() if (found := MASK.fullmatch(stem))}
    return {mask: image for mask, image in of.items() if image}
