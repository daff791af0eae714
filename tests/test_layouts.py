"""Step 3: what is said by folders is understood, and what can be read in two ways is refused."""

import logging
import shutil
import unicodedata

import pytest

from steps.layouts import looks_like_ids, read_splits
from steps.load import find_images
from steps.options import Settings
from steps.suspects import looks_like


def fill(folder, names):
    """Make a file for each name, "polyp/a b c" for three of them; return the folder."""
    for name in names:
        place, _, files = name.rpartition("/")
        for file in files.split():
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / (file if "." in file else f"{file}.jpg")).write_bytes(b"")
    return folder


def rows(table):
    """The table as {file: its label, or label, split and group as far as they are known}."""
    known = [name for name in ("label", "split", "group") if name in table]
    rows = {row["file"]: tuple(row[name] for name in known) for row in table.to_dict("records")}
    return {file: row[0] if len(row) == 1 else row for file, row in rows.items()}


UNDERSTOOD = {  # what is there: what is made of it, as label or (label, split, group), and --group_by
    "class folders": (["cat/a b", "dog/c"], {"cat/a.jpg": "cat", "cat/b.jpg": "cat", "dog/c.jpg": "dog"}),
    "doubled folders": (["cat/cat/a", "dog/dog/b"], {"cat/cat/a.jpg": "cat", "dog/dog/b.jpg": "dog"}),
    "files at two levels": (
        ["cat/a", "cat/more/b", "dog/c"],
        {"cat/a.jpg": "cat", "cat/more/b.jpg": "cat", "dog/c.jpg": "dog"},
    ),
    "class and patient": (
        ["cat/p1/a", "cat/p2/b", "dog/p3/c"],
        {"cat/p1/a.jpg": "cat", "cat/p2/b.jpg": "cat", "dog/p3/c.jpg": "dog"},
    ),
    "class and patient, patients asked for": (
        ["cat/p1/a", "cat/p2/b", "dog/p1/c"],
        {"cat/p1/a.jpg": ("cat", "p1"), "cat/p2/b.jpg": ("cat", "p2"), "dog/p1/c.jpg": ("dog", "p1")},
        "folder",
    ),
    "class and patients that have both": (
        ["cat/p1/a", "cat/p2/b", "dog/p1/c", "dog/p2/d"],
        {"cat/p1/a.jpg": "cat", "cat/p2/b.jpg": "cat", "dog/p1/c.jpg": "dog", "dog/p2/d.jpg": "dog"},
    ),
    "patient and class": (
        ["p1/cat/a", "p1/dog/b", "p2/cat/c", "p2/dog/d"],
        {
            "p1/cat/a.jpg": ("cat", "p1"),
            "p1/dog/b.jpg": ("dog", "p1"),
            "p2/cat/c.jpg": ("cat", "p2"),
            "p2/dog/d.jpg": ("dog", "p2"),
        },
    ),
    "patients that have some of the classes": (
        ["case_01/cat/a", "case_02/dog/b", "case_03/cat/c", "case_03/dog/d", "case_04/dog/e"],
        {
            "case_01/cat/a.jpg": ("cat", "case_01"),
            "case_02/dog/b.jpg": ("dog", "case_02"),
            "case_03/cat/c.jpg": ("cat", "case_03"),
            "case_03/dog/d.jpg": ("dog", "case_03"),
            "case_04/dog/e.jpg": ("dog", "case_04"),
        },
    ),
    "patients that are numbers, classes that are numbers": (
        [f"{8800 + number}/{number % 2}/a" for number in range(24)],
        {
            f"{8800 + number}/{number % 2}/a.jpg": (str(number % 2), str(8800 + number))
            for number in range(24)
        },
    ),
    "patients without numbers, asked for": (
        ["anna/cat/a", "anna/dog/b", "bert/cat/c"],
        {
            "anna/cat/a.jpg": ("cat", "anna"),
            "anna/dog/b.jpg": ("dog", "anna"),
            "bert/cat/c.jpg": ("cat", "bert"),
        },
        "parent",
    ),
    "magnifications, not asked for": (
        ["benign/40X/a", "benign/100X/b", "malignant/40X/c", "malignant/100X/d"],
        {
            "benign/40X/a.jpg": "benign",
            "benign/100X/b.jpg": "benign",
            "malignant/40X/c.jpg": "malignant",
            "malignant/100X/d.jpg": "malignant",
        },
        "none",
    ),
    "deep below the classes": (
        ["cat/x/y/z/a", "dog/u/v/b"],
        {"cat/x/y/z/a.jpg": "cat", "dog/u/v/b.jpg": "dog"},
    ),
    "train and test": (
        ["train/cat/a", "train/dog/a", "test/cat/a", "test/dog/a"],
        {
            "train/cat/a.jpg": ("cat", "train"),
            "train/dog/a.jpg": ("dog", "train"),
            "test/cat/a.jpg": ("cat", "test"),
            "test/dog/a.jpg": ("dog", "test"),
        },
    ),
    "the words of datasets": (
        ["Training/cat/a", "valid/cat/b", "dev/dog/c", "Evaluation/dog/d", "testing/cat/e"],
        {
            "Training/cat/a.jpg": ("cat", "train"),
            "valid/cat/b.jpg": ("cat", "validation"),
            "dev/dog/c.jpg": ("dog", "validation"),
            "Evaluation/dog/d.jpg": ("dog", "test"),
            "testing/cat/e.jpg": ("cat", "test"),
        },
    ),
    "splits with patients": (
        [
            "train/p1/cat/a",
            "train/p2/cat/b",
            "train/p1/dog/c",
            "train/p2/dog/d",
            "val/p3/cat/e",
            "val/p3/dog/f",
        ],
        {
            "train/p1/cat/a.jpg": ("cat", "train", "p1"),
            "train/p2/cat/b.jpg": ("cat", "train", "p2"),
            "train/p1/dog/c.jpg": ("dog", "train", "p1"),
            "train/p2/dog/d.jpg": ("dog", "train", "p2"),
            "val/p3/cat/e.jpg": ("cat", "validation", "p3"),
            "val/p3/dog/f.jpg": ("dog", "validation", "p3"),
        },
    ),
    "one split only": (["train/cat/a", "train/dog/b"], {"train/cat/a.jpg": "cat", "train/dog/b.jpg": "dog"}),
    "classes that are called train and test": (
        ["train/a", "test/b"],
        {"train/a.jpg": "train", "test/b.jpg": "test"},
    ),
    "a class that is called train, and others": (
        ["train/a", "car/b", "bus/c"],
        {"train/a.jpg": "train", "car/b.jpg": "car", "bus/c.jpg": "bus"},
    ),
    "files that are called train": (
        ["cat/train-0 test-1", "dog/valid"],
        {"cat/test-1.jpg": "cat", "cat/train-0.jpg": "cat", "dog/valid.jpg": "dog"},
    ),
    "names that mean other things elsewhere": (
        ["0/a", "10/b", "NA/c", "null/d", "True/e", "c[a]t/f", "d*g/g"],
        {
            "0/a.jpg": "0",
            "10/b.jpg": "10",
            "NA/c.jpg": "NA",
            "null/d.jpg": "null",
            "True/e.jpg": "True",
            "c[a]t/f.jpg": "c[a]t",
            "d*g/g.jpg": "d*g",
        },
    ),
    "what others leave behind": (
        ["cat/a", "dog/b", "__MACOSX/cat/._a", ".ipynb_checkpoints/c", "readme.txt", "cat/Thumbs.db"],
        {"cat/a.jpg": "cat", "dog/b.jpg": "dog"},
    ),
}


@pytest.mark.parametrize("layout", UNDERSTOOD)
def test_layouts_that_are_understood(tmp_path, layout):
    names, expected, *group_by = UNDERSTOOD[layout]
    table, left_out = find_images(fill(tmp_path, names), Settings(group_by=group_by[0] if group_by else None))
    assert rows(table) == expected and not left_out
    assert table["file"].tolist() == sorted(table["file"])


REFUSED = {  # what is there: what the error says
    "no class folders": (
        ["/a b"],
        "have no class folders; sort them into class folders, or name the label",
    ),
    "an image beside the class folders": (
        ["cat/a", "dog/b", "/plot.png"],
        "1 of the images lie beside .*plot.png",
    ),
    "some deep, some not": (
        ["cat/a", "pets/dog/b"],
        "others deeper, as in pets; say how to read them: --group_by",
    ),
    "twice the same names": (
        ["color/scab/a", "color/healthy/b", "gray/scab/c", "gray/healthy/d"],
        "two ways: color or healthy may be a class; say how to read them: --group_by none",
    ),
    "images and masks": (
        ["cat/images/a", "cat/masks/b", "dog/images/c", "dog/masks/d"],
        "some of the folders images, masks look like masks, not classes; move the masks away; without class",
    ),
    "grades that hold the same": (
        ["grade0/left/a", "grade0/right/b", "grade1/left/c", "grade1/right/d"],
        "two ways",
    ),
    "classes that hold splits": (
        ["p1/train/a", "p1/test/b", "p2/train/c", "p2/test/d"],
        "can be read in two ways",
    ),
    "patients and a stray image": (
        ["p1/cat/a", "p1/dog/b", "p2/cat/c", "p2/dog/d", "p2/e"],
        "can be read in two ways",
    ),
    "numbers in numbers": (["0/left/a", "0/right/b", "1/left/c", "1/right/d"], "can be read in two ways"),
    "few patients without a class in common": (
        ["p1/cat/a", "p2/dog/b", "p3/bird/c"],
        "can be read in two ways",
    ),
    "the folder in itself": (
        ["cat/a", "dog/b", "pets/cat/a", "pets/dog/b"],
        r"pets in .* holds folders with the same names as those beside it; .* --data_dir .*/pets",
    ),
    "train with classes, test without": (
        ["train/cat/a", "train/dog/b", "test/c d"],
        r"train look like splits .*, but test/c.jpg does not fit; move .*, or give --data_dir .*/train",
    ),
    "splits and something else": (
        ["train/cat/a", "test/cat/b", "extra/c"],
        "test, train look like splits that hold class folders, but extra/c.jpg does not",
    ),
    "a folder too high": (
        ["pictures/cat/a", "pictures/dog/b", "notes/x.txt"],
        "no images in notes; give --data_dir .*/pictures",
    ),
    "an empty class": (["cat/a", "dog/b", "bird/readme.txt"], "no images in bird; fill or delete"),
    "an empty class in a split": (
        ["train/cat/a", "train/dog/b", "test/cat/c", "test/dog/x.txt"],
        "no images in dog",
    ),
    "splits that hold all classes": (
        ["train_images/1 2", "test_images/3", "/train.csv"],
        r"the folders test_images, train_images look like splits of a data set, not like classes; name the "
        r"label of each image in a table: --metadata train.csv; if they are classes, give --group_by none",
    ),
    "splits that hold class folders": (
        ["trainSet/cat/1", "trainSet/dog/1", "testSet/cat/1", "testSet/dog/1"],
        "the folders testSet, trainSet look like splits .*; rename them to train, validation, test",
    ),
    "parts": (
        ["pics_part_1/1", "pics_part_2/2"],
        "the folders pics_part_1, pics_part_2 look like parts of a data set, .* --metadata FILE.csv; if",
    ),
    "parts with a folder in each": (
        [f"images_{number:03}/images/{number}" for number in range(12)],
        "the folders images_000, images_001, images_002 and 9 more look like parts",
    ),
    "images beside masks": (
        ["images/1 2", "masks/1 2"],
        "some of the folders images, masks look like masks, .* a table: --metadata FILE.csv; if they are cl",
    ),
    "a folder beside its table": (
        ["pictures/1 2", "/labels.csv"],
        "all images lie in one folder, pictures, beside labels.csv; name .* --metadata labels.csv$",
    ),
    "archives": (
        ["/more.zip"],
        "1 files left out: archives: give one as --data_url",
    ),
    "nothing": (["/readme.txt"], "no images in .*; give a folder that holds one folder for each class"),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_layouts_that_are_refused_say_what_is_there_in_few_lines(tmp_path, layout, caplog):
    names, message = REFUSED[layout]
    with caplog.at_level(logging.INFO, "finetune_vit"), pytest.raises(SystemExit, match=message) as stopped:
        find_images(fill(tmp_path, names), Settings())
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)
    if layout not in (
        "a folder too high",
        "an empty class",
        "an empty class in a split",
        "archives",
        "nothing",
    ):
        *tree, accepted = [line for line in caplog.messages if ".csv is not used" not in line]
        assert tree[0] == f"found in {tmp_path}:" and 2 <= len(tree) <= 8
        assert accepted.startswith("accepted: CLASS/image, CLASS/PATIENT/image, PATIENT/CLASS/image")


def test_a_tree_of_many_folders_has_eight_lines(tmp_path, caplog):
    fill(
        tmp_path,
        [f"{letter}/{name}/x y" for letter in "abcdefghi" for name in ("one", "two", "six", "ten", "few")],
    )
    with caplog.at_level(logging.INFO, "finetune_vit"), pytest.raises(SystemExit, match="two ways"):
        find_images(tmp_path, Settings())
    assert caplog.messages[1] == "  a/ images: 10; folders: few, one, six, ten …"
    assert caplog.messages[7] == "  … and 3 more" and len(caplog.messages) == 9


@pytest.mark.parametrize(
    "group_by, names, message",
    [
        ("parent", ["p1/cat/a", "p2/b"], "p2/b.jpg is in no folder below p2; give another --group_by"),
        ("folder", ["cat/p1/a", "dog/b"], None),
    ],
)
def test_a_rule_that_does_not_fit_all_images(tmp_path, group_by, names, message):
    fill(tmp_path, names)
    if message:
        with pytest.raises(SystemExit, match=message):
            find_images(tmp_path, Settings(group_by=group_by))
    else:  # an image without a folder of its own is of no known patient
        table, _ = find_images(tmp_path, Settings(group_by=group_by))
        assert rows(table) == {"cat/p1/a.jpg": ("cat", "p1"), "dog/b.jpg": ("dog", "")}


def test_what_was_understood_is_said(tmp_path, caplog):
    shutil.copytree(
        fill(tmp_path / "one", ["p1/cat/a", "p1/dog/b", "p2/cat/c", "p2/dog/d"]), tmp_path / "x" / "train"
    )
    shutil.copytree(tmp_path / "one", tmp_path / "x" / "test")
    with caplog.at_level(logging.INFO, "finetune_vit"):
        find_images(tmp_path / "x", Settings())
        find_images(fill(tmp_path / "deep", ["cat/p7/a", "dog/p8/b"]), Settings())
        find_images(fill(tmp_path / "flat", ["train/a", "test/b"]), Settings())
    assert caplog.messages == [
        "understood as SPLIT/PATIENT/CLASS/image",
        "understood as CLASS/image",
        "warning: 2 folders lie in the class folders, such as cat/p7: if they are patients, "
        "give --group_by folder",
        "warning: the classes are called test, train: if these are splits, name the label of each image in a "
        "table: --metadata FILE.csv",
    ]


def test_a_patient_is_one_in_both_forms_of_the_name(tmp_path):
    names = [unicodedata.normalize(*pair) for pair in (("NFC", "cat/Jürg/a"), ("NFD", "dog/Jürg/b"))]
    table, _ = find_images(fill(tmp_path, names), Settings(group_by="folder"))
    assert table["group"].tolist() == ["Jürg", "Jürg"] and table["file"].tolist() == [
        f"{n}.jpg" for n in names
    ]


LOOKS = {
    "splits": ["train test1", "ISIC_2019_Training_Input ISIC_2019_Test_Input", "trainImages testImages",
               "stage_1_train_images stage_1_test_images", "train-jpg valid-jpg test-jpg"],
    "parts": ["HAM_images_part_1 HAM_images_part_2", "images_001 images_012", "fold1 fold2", "train1 train2"],
    "masks": ["images masks", "images annotations", "Images groundTruth", "train_images train_masks",
              "train test train_masks"],
    "": ["cat dog", "train test", "class_1 class_2", "grade0 grade1", "mask no_mask", "with_mask without",
         "train_images car", "1 2", "images", "part_1 whole", "胃 腸", "original retouched", "p1 p2"],
}  # fmt: skip


@pytest.mark.parametrize("kind", LOOKS)
def test_folders_that_are_called_like_something_else(kind):
    assert {names: looks_like(names.split()) for names in LOOKS[kind]} == dict.fromkeys(LOOKS[kind], kind)


def test_folders_that_look_like_something_else_are_classes_if_someone_says_so(tmp_path, caplog):
    names = ["masks/1", "images/1", "images/1_mask.png", "masks/1_seg_2.PNG", "masks/face_mask"]
    table, _ = find_images(fill(tmp_path, names), Settings(group_by="none"))
    assert set(table["label"]) == {"masks", "images"}
    assert caplog.messages == [
        "warning: some of the folders images, masks look like masks, not classes",
        "warning: 2 images look like masks, such as images/1_mask.png (of images/1.jpg); move them away, or "
        "the model learns them",
    ]


def test_names_of_patients():
    for names in ("p1 p02 p300", "case_01 case_2", "Patient-7 Patient-12", "lesion1"):
        assert looks_like_ids(names.split())
    for names in ("p1 q2", "anna bert", "grade0 grade1", "class_1 class_2", "1 2 3", "p q"):
        assert not looks_like_ids(names.split())
    assert looks_like_ids([f"{n}" for n in range(20)]) and looks_like_ids([f"TCGA-{n}" for n in range(20)])
    assert not looks_like_ids([f"{n}" for n in range(19)])


def test_split_folders():
    assert read_splits(["train/x.jpg", "VAL/a/y.jpg"]) == {"train": "train", "VAL": "validation"}
    assert (
        read_splits(["train/x.jpg", "other/y.jpg"]) is None and read_splits(["train/x.jpg", "y.jpg"]) is None
    )


def test_patients_where_classes_should_be_are_pointed_out(tmp_path, caplog):
    find_images(fill(tmp_path, ["p1/cat/a", "p1/dog/b", "p2/cat/c"]), Settings(group_by="folder"))
    assert (
        "warning: the classes are then p1, p2: if these are patients, give --group_by parent"
        in caplog.messages
    )
