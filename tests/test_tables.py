"""Step 3: a table says what images are; what does not fit is named, and nothing leads out of the folder."""

import json
import logging
import string
import unicodedata

import pandas as pd
import pytest
from conftest import load_images
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import fill, rows

from steps.columns import COLUMN_WORDS, choose_columns, find_columns
from steps.files import write_table
from steps.load import find_images
from steps.options import Settings
from steps.rows import check_paths, settle
from steps.tables import Table, index_files, match, read_table

FLAT = ["/a b c d"]  # four images without folders
CLASSES = ["cat/a b", "dog/c d"]
ALL = {"a.jpg": "cat", "b.jpg": "cat", "c.jpg": "dog", "d.jpg": "dog"}
LABELS = "file,label\na.jpg,cat\nb.jpg,cat\nc.jpg,dog\nd.jpg,dog\n"
SPLIT = {
    "cat/a.jpg": ("cat", "train"),
    "cat/b.jpg": ("cat", "test"),
    "dog/c.jpg": ("dog", "validation"),
    "dog/d.jpg": ("dog", "test"),
}
GROUP = {
    "cat/a.jpg": ("cat", "p1"),
    "cat/b.jpg": ("cat", "p2"),
    "dog/c.jpg": ("dog", "p1"),
    "dog/d.jpg": ("dog", "p3"),
}


def split_table(heads="file,split", separator=",", words=("train", "test", "validation", "test"), name="{}"):
    lines = [heads.replace(",", separator)]
    lines += [f"{name.format(file)}{separator}{word}" for file, word in zip(SPLIT, words, strict=True)]
    return "\n".join(lines) + "\n"


UNDERSTOOD = {  # the images, the table, flags: what is made of it
    "labels": (FLAT, LABELS, {}, ALL),
    "names without endings": (FLAT, LABELS.replace(".jpg", ""), {}, ALL),
    "APTOS": (
        ["train_images/a b", "test_images/c d"],
        "id_code,diagnosis\na,0\nb,4\n",
        {},
        {"train_images/a.jpg": "0", "train_images/b.jpg": "4"},
    ),
    "HAM10000": (
        ["part_1/a b", "part_2/c d"],
        "lesion_id,image_id,dx,dx_type\nl1,a,nv,x\nl1,b,nv,x\nl2,c,mel,x\nl3,d,nv,x\n",
        {},
        {
            "part_1/a.jpg": ("nv", "l1"),
            "part_1/b.jpg": ("nv", "l1"),
            "part_2/c.jpg": ("mel", "l2"),
            "part_2/d.jpg": ("nv", "l3"),
        },
    ),
    "ISIC, one-hot": (
        FLAT,
        "image,MEL,NV\na,1.0,0.0\nb,1.0,0.0\nc,0.0,1.0\nd,0,1\n",
        {"label_column_name": ["MEL", "NV"]},
        {"a.jpg": "MEL", "b.jpg": "MEL", "c.jpg": "NV", "d.jpg": "NV"},
    ),
    "columns of other names": (
        FLAT,
        "datei,befund,mensch\na.jpg,x,1\nb.jpg,y,1\n",
        {"image_column_name": "datei", "label_column_name": ["befund"], "group_column_name": "mensch"},
        {"a.jpg": ("x", "1"), "b.jpg": ("y", "1")},
    ),
    "a split": (CLASSES, split_table(), {}, SPLIT),
    "semicolons": (CLASSES, split_table(separator=";"), {}, SPLIT),
    "tabs": (CLASSES, split_table(separator="\t"), {}, SPLIT),
    "Windows": (CLASSES, split_table(name="{}").replace("/", "\\").replace("\n", "\r\n"), {}, SPLIT),
    "from here": (CLASSES, split_table(name="./{}"), {}, SPLIT),
    "from another machine": (CLASSES, split_table(name="/kaggle/input/pets/{}"), {}, SPLIT),
    "from another drive": (CLASSES, split_table(name="C:/pets/{}"), {}, SPLIT),
    "other words": (
        CLASSES,
        split_table("Image Path, Set", words=(" Train", "TEST", "val", "eval")),
        {},
        SPLIT,
    ),
    "patients": (CLASSES, "Patient ID,Filename\np1,a.jpg\np2,b.jpg\np1,c.jpg\np3,d.jpg\n", {}, GROUP),
    "patients before lesions": (
        CLASSES,
        "lesion_id,patient_id,image\nl,p1,a\nl,p2,b\nl,p1,c\nl,p3,d\n",
        {},
        GROUP,
    ),
    "what split.csv of a run says": (
        CLASSES,
        "file,label,split,group\ncat/a.jpg,cat,train,0\ncat/b.jpg,cat,test,1\ndog/c.jpg,dog,train,2\n",
        {},
        {
            "cat/a.jpg": ("cat", "train", "0"),
            "cat/b.jpg": ("cat", "test", "1"),
            "dog/c.jpg": ("dog", "train", "2"),
        },
    ),
    "one split only": (
        CLASSES,
        split_table(words=["train"] * 4),
        {},
        {file: v[0] for file, v in SPLIT.items()},
    ),
    "labels that folders do not know": (
        ["x/a b", "y/c d"],
        LABELS,
        {},
        {f"{'xxyy'[i]}/{file}": label for i, (file, label) in enumerate(ALL.items())},
    ),
    "folders that are splits": (
        ["train/a b", "test/c d"],
        LABELS,
        {},
        {
            "test/c.jpg": ("dog", "test"),
            "test/d.jpg": ("dog", "test"),
            "train/a.jpg": ("cat", "train"),
            "train/b.jpg": ("cat", "train"),
        },
    ),
    "a split that the folders contradict": (
        ["train/a b", "test/c d"],
        "file,label,split\na,cat,test\nb,cat,train\nc,dog,test\nd,dog,train\n",
        {},
        {
            "test/c.jpg": ("dog", "test"),
            "test/d.jpg": ("dog", "train"),
            "train/a.jpg": ("cat", "test"),
            "train/b.jpg": ("cat", "train"),
        },
    ),
    "words that pandas would take for nothing": (
        FLAT,
        "file,label\na,NA\nb,null\nc,007\nd,1e3\n",
        {},
        {"a.jpg": "NA", "b.jpg": "null", "c.jpg": "007", "d.jpg": "1e3"},
    ),
    "quotes and commas": (
        FLAT,
        'file,label\n"a.jpg","cat, small"\n"b.jpg","cat ""big"""\n',
        {},
        {"a.jpg": "cat, small", "b.jpg": 'cat "big"'},
    ),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_tables_that_are_understood(tmp_path, case):
    names, text, flags, expected = UNDERSTOOD[case]
    (tmp_path / "mine.csv").write_text(text, newline="")
    folder = fill(tmp_path / "images", names)
    table, left_out = find_images(folder, Settings(metadata=str(tmp_path / "mine.csv"), **flags))
    assert rows(table) == expected
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")}
    assert files == expected.keys() | {file for file in left_out if "," not in file}  # none is lost


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1254"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_with_umlauts_in_every_encoding_and_form(tmp_path, encoding, form):
    names = ["Ösophagus/ülser ışık", "k/a b"]
    folder = fill(tmp_path / "images", [unicodedata.normalize(form, name) for name in names])
    text = "file,set\nÖsophagus/ülser.jpg,train\nÖsophagus/ışık.jpg,test\nk/a.jpg,train\nk/b.jpg,test\n"
    (tmp_path / "mine.csv").write_bytes(text.encode(encoding))
    table, left_out = find_images(folder, Settings(metadata=str(tmp_path / "mine.csv")))
    assert table["split"].value_counts().to_dict() == {"train": 2, "test": 2} and not left_out
    assert set(table["label"]) == {"Ösophagus", "k"}  # in NFC; files keep the form that they have on disk
    assert all((folder / file).exists() for file in table["file"])


def test_our_own_table_gives_the_same_split_again_whatever_the_names(tmp_path):
    """README says to give report/split.csv. A label is no list of classes if the image lies in its folder."""
    labels = [
        "a|b",
        "[x]",
        "1.0",
        "2",
        "c,d",
        '"q"',
        "#1",
        "=1+1",
        "$x$ {{y}}",
        "t\tt",
        "r\rr",
        "n\nn",
        "胃",
        "é" * 120,
    ]
    files = [f"{label}/{name}.jpg" for label in labels for name in (" a ", "b\r", "'c', \"d\"", "x" * 251)]
    for file in files:
        (tmp_path / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / file).write_bytes(b"")
    written = pd.DataFrame({"file": files, "label": [file.split("/")[0] for file in files]})
    written["split"] = ["train", "validation", "test", "train"] * len(labels)
    write_table(tmp_path / "split.csv", written.assign(group=range(len(files))))
    table, left_out = find_images(tmp_path / "images", Settings(metadata=str(tmp_path / "split.csv")))
    assert not left_out and rows(table[["file", "label", "split"]]) == rows(written)


REFUSED = {  # the images, the table, flags: what the error says
    "no rows": (FLAT, "file,label\n", {}, "no row of .*mine.csv names one image in .*: no rows"),
    "empty": (FLAT, "", {}, "cannot read .*mine.csv: No columns to parse from file; save it as CSV"),
    "no images": (
        FLAT,
        "x,label\na,cat\n",
        {},
        "no column of .* the images; its columns are x, label: .*--image_column",
    ),
    "no roles": (
        FLAT,
        "file,x\na,cat\n",
        {},
        "hold labels, splits or patients; its columns .*--label_column_name",
    ),
    "other images": (
        FLAT,
        "file,label\nz.jpg,cat\n",
        {},
        "names one image .* for example 'z.jpg'; it should be like a.jpg",
    ),
    "a column that is not there": (
        FLAT,
        LABELS,
        {"group_column_name": "who"},
        "no column who; give --group_column_name",
    ),
    "labels in two columns": (
        FLAT,
        "file,target,diagnosis\na,1,mel\n",
        {},
        "could be in any of diagnosis, target; say which: --label_column_name",
    ),
    "several classes": (
        FLAT,
        "file,label\na,cat|dog\n",
        {},
        r"row 1 of .* gives a several classes: cat\|dog; give each",
    ),
    "a list of classes": (FLAT, "file,label\na,cat\nb,\"['cat', 'dog']\"\n", {}, "row 2 .* several classes"),
    "two ones": (
        FLAT,
        "file,x,y\na,1,0\nb,1,1\n",
        {"label_column_name": ["x", "y"]},
        "row 2 of .* names several classes",
    ),
    "unknown splits": (
        CLASSES,
        split_table(words=["train", "fold1", "test", "x"]),
        {},
        "unknown splits: fold1, x; use train",
    ),
    "out of the folder": (
        FLAT,
        LABELS + "../x.jpg,cat\n",
        {},
        r"mine.csv names \.\./x.jpg, which leads out of its folder",
    ),
    "out of the folder in between": (
        FLAT,
        LABELS + "sub/../../x.jpg,cat\n",
        {},
        "which leads out of its folder",
    ),
    "out of the folder for Windows": (FLAT, LABELS + "..\\x.jpg,cat\n", {}, "which leads out of its folder"),
    "a URL": (FLAT, LABELS + "file:///etc/passwd,cat\n", {}, "names file:///etc/passwd, which leads out"),
    "names that several images share": (
        ["cat/a b", "dog/a b"],
        "file,split\na,train\nb,test\n",
        {},
        "no row of .*mine.csv names one image in .*: several are called a; it should",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tables_that_are_refused(tmp_path, case):
    names, text, flags, message = REFUSED[case]
    (tmp_path / "mine.csv").write_text(text)
    folder = fill(tmp_path / "images", names)
    with pytest.raises(SystemExit, match=message) as stopped:
        find_images(folder, Settings(metadata=str(tmp_path / "mine.csv"), **flags))
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)


LEFT_OUT = {  # the table: what is left out, and why
    "an image without a row": (LABELS.replace("d.jpg,dog\n", ""), {"d.jpg": "images without a row"}),
    "a row without an image": (LABELS + "e.jpg,cat\n", {"mine.csv, row 5: e.jpg": "rows without an image"}),
    "an image without a label": (
        LABELS.replace("d.jpg,dog", "d.jpg,"),
        {"d.jpg": "images without a label"},
    ),
    "a second row": (LABELS + "a.jpg,cat\n", {"mine.csv, row 5: a.jpg": "repeated rows for an image"}),
    "rows that differ": (LABELS + "a.jpg,dog\n", {"a.jpg": "images whose rows in mine.csv differ"}),
    "all at once": (
        "file,label\na.jpg,cat\na,dog\nb,cat\nb.jpg,cat\nc,\nz,dog\n",
        {
            "a.jpg": "images whose rows in mine.csv differ",
            "mine.csv, row 4: b.jpg": "repeated rows for an image",
            "c.jpg": "images without a label",
            "mine.csv, row 6: z": "rows without an image",
            "d.jpg": "images without a row",
        },
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_does_not_fit_is_left_out_by_name(tmp_path, case):
    text, expected = LEFT_OUT[case]
    (tmp_path / "mine.csv").write_text(text)
    table, left_out = find_images(
        fill(tmp_path / "images", FLAT), Settings(metadata=str(tmp_path / "mine.csv"))
    )
    assert left_out == expected
    assert rows(table) == {file: label for file, label in ALL.items() if file not in expected}


def test_an_image_whose_folder_is_another_class_is_left_out(tmp_path):
    (tmp_path / "mine.csv").write_text("file,label\na,cat\nb,dog\nc,dog\nd,dog\n")
    folder = fill(tmp_path / "images", CLASSES)
    table, left_out = find_images(folder, Settings(metadata=str(tmp_path / "mine.csv")))
    assert left_out == {"cat/b.jpg": "images whose row and folder name different classes"}
    assert rows(table) == {"cat/a.jpg": "cat", "dog/c.jpg": "dog", "dog/d.jpg": "dog"}


def test_an_image_without_a_patient_is_kept_and_counted(tmp_path, caplog):
    (tmp_path / "mine.csv").write_text("file,patient\na,p1\nb,\nc,p1\nd,\n")
    table, left_out = find_images(
        fill(tmp_path / "images", CLASSES), Settings(metadata=str(tmp_path / "mine.csv"))
    )
    assert table["group"].tolist() == ["p1", "", "p1", ""] and not left_out
    assert "has no patient for 2 images: only near-duplicates keep those together" in caplog.text


FOUND = {  # an imagefolder's own tables: {file: text}, and what is made of them
    "metadata.csv": (
        {"metadata.csv": "file_name,label\na.jpg,cat\nb.jpg,dog\n"},
        FLAT,
        {"a.jpg": "cat", "b.jpg": "dog"},
    ),
    "metadata.jsonl": (
        {"metadata.jsonl": '{"file_name": "a.jpg", "label": 3}\n{"file_name": "b.jpg", "label": 10}\n'},
        FLAT,
        {"a.jpg": "3", "b.jpg": "10"},
    ),
    "in the splits": (
        {
            "train/metadata.csv": "file_name,label\na.jpg,cat\nb.jpg,dog\n",
            "test/metadata.csv": "file_name,label\na.jpg,cat\n",
        },
        ["train/a b", "test/a"],
        {"test/a.jpg": ("cat", "test"), "train/a.jpg": ("cat", "train"), "train/b.jpg": ("dog", "train")},
    ),
    "patients beside class folders": (
        {"metadata.csv": "file_name,patient\ncat/a.jpg,p1\ncat/b.jpg,p2\ndog/c.jpg,p1\ndog/d.jpg,p3\n"},
        CLASSES,
        GROUP,
    ),
    "in class folders": (
        {
            "cat/metadata.csv": "file_name,patient\na.jpg,p1\nb.jpg,p2\n",
            "dog/metadata.csv": "file_name,patient\nc.jpg,p1\nd.jpg,p3\n",
        },
        CLASSES,
        GROUP,
    ),
    "captions": (
        {"metadata.csv": "file_name,text\ncat/a.jpg,a cat\n"},
        ["cat/a", "dog/c"],
        {"cat/a.jpg": "cat", "dog/c.jpg": "dog"},
    ),
    "another name": (
        {"bad_metadata.csv": "file_name,label\ncat/a.jpg,x\n"},
        ["cat/a", "dog/c"],
        {"cat/a.jpg": "cat", "dog/c.jpg": "dog"},
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_tables_of_an_imagefolder_are_read(tmp_path, case):
    tables, names, expected = FOUND[case]
    folder = fill(tmp_path, names)
    for name, text in tables.items():
        (folder / name).write_text(text)
    table, _ = find_images(folder, Settings())
    assert rows(table) == expected


def test_parquet_is_read(tmp_path):
    folder = fill(tmp_path, FLAT)
    pd.DataFrame({"file_name": ["a.jpg", "b.jpg"], "label": [0, 1]}).to_parquet(folder / "metadata.parquet")
    assert rows(find_images(folder, Settings())[0]) == {"a.jpg": "0", "b.jpg": "1"}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "cat/metadata.csv"])
@pytest.mark.parametrize(
    "path", ["../outside/x.jpg", "cat/../../outside/x.jpg", "/etc/passwd", "file:///etc/passwd", "C:\\x.jpg"]
)
@pytest.mark.parametrize("column", ["label", "caption"])
def test_a_table_in_the_folder_that_leads_out_of_it_is_refused(tmp_path, name, path, column):
    """It may have come with an archive. `datasets` would open what it names."""
    folder, row = fill(tmp_path, CLASSES), {"file_name": path, column: "cat"}
    text = json.dumps(row) if name.endswith("l") else pd.DataFrame([row]).to_csv(index=False)
    (folder / name).write_text(text)
    with pytest.raises(SystemExit, match="which leads out of its folder"):
        find_images(folder, Settings())


@pytest.mark.parametrize("name, text", [("metadata.parquet", "PAR1x"), ("metadata.jsonl", '{"file_name": ')])
def test_a_damaged_table_is_one_error_line(tmp_path, name, text):
    (fill(tmp_path, CLASSES) / name).write_text(text)
    with pytest.raises(SystemExit, match=f"cannot read .*{name}: .*; save it as CSV"):
        find_images(tmp_path, Settings())


def test_a_table_is_looked_for_here_and_beside_the_images(tmp_path, monkeypatch):
    folder = fill(tmp_path / "pets" / "images", CLASSES)
    (tmp_path / "pets" / "mine.csv").write_text(split_table())
    assert rows(find_images(folder, Settings(metadata="mine.csv"))[0]) == SPLIT
    (folder / "mine.csv").write_text(split_table(words=("test", "train", "test", "train")))  # nearer
    assert find_images(folder, Settings(metadata="mine.csv"))[0]["split"].tolist() == ["test", "train"] * 2
    monkeypatch.chdir(fill(tmp_path / "work", ["/x"]))
    (tmp_path / "work" / "mine.csv").write_text(split_table(words=("train", "train", "test", "test")))
    assert (
        find_images(folder, Settings(metadata="mine.csv"))[0]["split"].tolist()
        == ["train"] * 2 + ["test"] * 2
    )
    with pytest.raises(SystemExit, match="--metadata other.csv is not a file, here or in"):
        find_images(folder, Settings(metadata="other.csv"))
    with pytest.raises(
        SystemExit, match="--split_column_name names a column, but there is no table; give one"
    ):
        find_images(folder, Settings(split_column_name="part"))


def test_what_was_understood_is_said_in_one_line(tmp_path, caplog):
    (tmp_path / "mine.csv").write_text("lesion_id,image_id,dx\nl1,a,x\nl1,b,x\nl2,c,y\nl3,d,y\n")
    with caplog.at_level(logging.INFO, "finetune_vit"):
        find_images(fill(tmp_path / "images", FLAT), Settings(metadata=str(tmp_path / "mine.csv")))
    assert caplog.messages == [
        "understood the columns of mine.csv as image: image_id, label: dx, group: lesion_id"
    ]


def test_column_words_are_plain_and_of_one_role():
    words = [word for words in COLUMN_WORDS.values() for word in words.split()]
    assert len(set(words)) == len(words) and all(word.isalnum() and word.islower() for word in words)
    assert find_columns("group", ["Video", "Patient ID", "x", "patient"]) == [
        "patient",
        "Patient ID",
        "Video",
    ]
    assert choose_columns("label", ["label", "target"], Settings()) == ["label"]
    assert choose_columns("split", ["label"], Settings()) == []


NAMES = (
    st.text(string.ascii_letters + string.digits + " _-()äß", min_size=1, max_size=8)
    .map(str.strip)
    .filter(bool)
)
TABLES = st.dictionaries(
    NAMES, st.tuples(NAMES, st.sampled_from(["train", "val", "Test"]), NAMES), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(TABLES, st.sampled_from(",;\t"), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1254"]))
def test_any_table_is_read_as_it_was_written(tmp_path_factory, table, separator, encoding):
    path = tmp_path_factory.mktemp("table") / "x.csv"
    written = pd.DataFrame(
        [(name, *row) for name, row in table.items()], columns=["file", "dx", "set", "patient"]
    )
    path.write_bytes(written.to_csv(index=False, sep=separator).encode(encoding))
    read = read_table(path)
    assert read.to_dict("list") == written.to_dict("list")


FILES = st.lists(st.tuples(NAMES, NAMES).map("/".join), min_size=1, max_size=9, unique=True)


@settings(max_examples=100, deadline=None)
@given(FILES, st.sampled_from(["{}.jpg", "{}", "./{}.jpg", "/far/{}.jpg", "D:/{}.jpg"]), st.data())
def test_a_whole_path_finds_its_file_however_it_is_written(files, form, data):
    names = [f"{file}.jpg" for file in files]
    known, chosen = index_files(names, ""), data.draw(st.sampled_from(files))
    found = match(form.format(chosen).replace("/", data.draw(st.sampled_from("/\\"))), known)
    assert found == f"{chosen}.jpg"
    bare = match(f"{chosen.split('/')[1]}.jpg", known)
    same = [name for name in names if name.endswith(f"/{chosen.split('/')[1]}.jpg")]
    assert bare == (same[0] if len(same) == 1 else "")  # never one of several


@pytest.mark.parametrize(
    "group_by, names, expected",
    [
        ("folder", ["p1/a b", "p2/c d"], ["p1", "p1", "p2", "p2"]),
        ("folder", ["cat/p1/a b", "dog/p2/c d"], ["p1", "p1", "p2", "p2"]),
        ("folder", ["p1/study/a b", "p2/study/c d"], ["p1", "p1", "p2", "p2"]),
        ("parent", ["p1/x/a b", "p2/x/c d"], ["p1", "p1", "p2", "p2"]),
        ("folder", ["train/p1/a b", "test/p2/c d"], ["p2", "p2", "p1", "p1"]),
        (None, ["p1/a b", "p2/c d"], None),
        ("none", ["p1/a b", "p2/c d"], None),
    ],
)
def test_folders_may_say_the_patients_of_a_table(tmp_path, group_by, names, expected):
    (tmp_path / "mine.csv").write_text(LABELS)
    settings = Settings(metadata=str(tmp_path / "mine.csv"), group_by=group_by)
    table, _ = find_images(fill(tmp_path / "images", names), settings)
    assert (table["group"].tolist() if "group" in table else None) == expected
    assert dict(zip(table["file"].str[-5:], table["label"], strict=True)) == ALL


WRONG_IF_GUESSED = {  # the images, tables beside them and --metadata, flags: what is made of it, or the error
    "a row of another folder": (
        ["train/a b", "test/b"],
        {
            "train/metadata.csv": "file_name,label\na.jpg,cat\nb.jpg,dog\n",
            "test/metadata.csv": "file_name,label\na.jpg,dog\nb.jpg,dog\n",
        },
        {},
        {"test/b.jpg": ("dog", "test"), "train/a.jpg": ("cat", "train"), "train/b.jpg": ("dog", "train")},
    ),
    "two tables, each with its part": (
        FLAT,
        {"metadata.csv": LABELS, "metadata.jsonl": '{"file_name": "a.jpg", "patient": 7}\n'},
        {},
        {"a.jpg": ("cat", "7"), "b.jpg": ("cat", ""), "c.jpg": ("dog", ""), "d.jpg": ("dog", "")},
    ),
    "two tables that say different things": (
        FLAT,
        {"metadata.csv": LABELS, "metadata.jsonl": '{"file_name": "a.jpg", "label": "dog"}\n'},
        {},
        {"b.jpg": "cat", "c.jpg": "dog", "d.jpg": "dog"},
    ),
    "integers beside a gap": (
        FLAT,
        {
            "metadata.jsonl": "".join(
                f'{{"file_name": "{f}.jpg", "label": {n}, "patient": {p}}}\n'
                for f, n, p in (("a", 1, 12345678901234567), ("b", 1, 12345678901234568), ("c", 2, "null"))
            )
        },
        {},
        {"a.jpg": ("1", "12345678901234567"), "b.jpg": ("1", "12345678901234568"), "c.jpg": ("2", "")},
    ),
    "patients in floats, forms and words for nobody": (
        ["/a b c d e f"],
        {"mine.csv": "file,label,patient\na,0,7\nb,0,7.0\nc,1,Müller\nd,1,Mu\u0308ller\ne,1.0,NA\nf,0,nan\n"},
        {},
        {
            "a.jpg": ("0", "7"),
            "b.jpg": ("0", "7"),
            "c.jpg": ("1", "Müller"),
            "d.jpg": ("1", "Müller"),
            "e.jpg": ("1", ""),
            "f.jpg": ("0", ""),
        },
    ),
    "groups beside patients": (
        FLAT,
        {"mine.csv": "file,label,patient,group\na,x,p1,drug\nb,y,p2,drug\n"},
        {},
        {"a.jpg": ("x", "p1"), "b.jpg": ("y", "p2")},
    ),
    "a grade beside class folders": (
        CLASSES,
        {"mine.csv": "file,patient,grade\na,p1,2\nb,p2,3\nc,p1,2\nd,p3,3\n"},
        {},
        GROUP,
    ),
    "a grade without class folders": (
        FLAT,
        {"mine.csv": "file,grade\na,2\nb,3\n"},
        {},
        {"a.jpg": "2", "b.jpg": "3"},
    ),
    "a set that is no split": (
        CLASSES,
        {"mine.csv": "file,patient,set\na,p1,A\nb,p2,B\nc,p1,A\nd,p3,B\n"},
        {},
        GROUP,
    ),
    "ones in other words": (
        FLAT,
        {"mine.csv": 'file,MEL,NV\na,TRUE,FALSE\nb,x,\nc,"0,0","1,0"\nd,no,yes\n'},
        {"label_column_name": ["MEL", "NV"]},
        {"a.jpg": "MEL", "b.jpg": "MEL", "c.jpg": "NV", "d.jpg": "NV"},
    ),
    "one folder with a table of its own": (
        CLASSES,
        {"cat/metadata.csv": "file_name,patient\na.jpg,p1\nb.jpg,p2\n"},
        {},
        {
            "cat/a.jpg": ("cat", "p1"),
            "cat/b.jpg": ("cat", "p2"),
            "dog/c.jpg": ("dog", ""),
            "dog/d.jpg": ("dog", ""),
        },
    ),
    "splits and a folder that has no rows": (
        ["train/a b", "test/c", "unlabelled/d"],
        {"mine.csv": LABELS.replace("d.jpg,dog\n", "")},
        {},
        {"test/c.jpg": ("dog", "test"), "train/a.jpg": ("cat", "train"), "train/b.jpg": ("cat", "train")},
    ),
    "a URL beside the name": (
        FLAT,
        {"mine.csv": "file_name,image,label\na.jpg,https://x/1,cat\nb.jpg,https://x/2,dog\n"},
        {},
        {"a.jpg": "cat", "b.jpg": "dog"},
    ),
    "Excel's hint": (FLAT, {"mine.csv": "sep=;\nfile;label\na;x\nb;y\n"}, {}, {"a.jpg": "x", "b.jpg": "y"}),
    "a row that is too short": (
        FLAT,
        {"mine.csv": "file,label,x\na,cat\nb,dog,1\n"},
        {},
        {"a.jpg": "cat", "b.jpg": "dog"},
    ),
    "two columns of names": (
        ["/1 2 3 4"],
        {"mine.csv": "image_id,filename,label\n1,4.jpg,x\n2,3.jpg,y\n3,2.jpg,z\n4,5.jpg,w\n"},
        {},
        "columns image_id and filename of mine.csv name different images; say which: --image_column_name",
    ),
    "images of two hospitals": (
        CLASSES,
        {"mine.csv": "file,patient\nhospA/cat/a.jpg,A1\nhospB/cat/b.jpg,B7\n"},
        {},
        "mine.csv names images in hospA and in hospB; give --data_dir a folder that holds both",
    ),
    "a row that is too long": (
        FLAT,
        {"mine.csv": "file,label\na,polyp,small\n"},
        {},
        "cannot read .*mine.csv: .*Expected 2 fields",
    ),
    "two columns of one name": (
        FLAT,
        {"mine.csv": "file,label,label \na,x,y\n"},
        {},
        "mine.csv has two columns label; rename",
    ),
    "a workbook": (
        FLAT,
        {"mine.csv": "PK\3\4"},
        {},
        "cannot read .*mine.csv: it is an Excel workbook; save it as CSV",
    ),
    "a one that is none": (
        FLAT,
        {"mine.csv": "file,MEL,NV\na,1,0\nb,maybe,0\n"},
        {"label_column_name": ["MEL", "NV"]},
        "row 2 of mine.csv has maybe in column MEL; give 1 or 0 there",
    ),
    "one of the one-hot columns": (
        FLAT,
        {"mine.csv": "file,MEL,NV,BCC\na,1,0,0\nb,0,1,0\nc,0,0,1\n"},
        {},
        "hold labels, splits or patients; its columns .*: give --label_column_name MEL NV BCC",
    ),
    "no label at all": (
        FLAT,
        {"mine.csv": "file,label\na,\nb,\n"},
        {},
        r"no image of .* is left: .*images without a label \(2\)",
    ),
    "every row and folder against each other": (
        CLASSES,
        {"mine.csv": "file,label\na,dog\nb,dog\nc,cat\nd,cat\n"},
        {},
        "no image of .* is left: images whose row and folder",
    ),
}


@pytest.mark.parametrize("case", WRONG_IF_GUESSED)
def test_what_would_be_wrong_in_silence_is_right_or_refused(tmp_path, case):
    names, tables, flags, expected = WRONG_IF_GUESSED[case]
    folder = fill(tmp_path / "images", names)
    for name, text in tables.items():
        (folder / name).write_text(text)
    flags |= {"metadata": "mine.csv"} if "mine.csv" in tables else {}
    if isinstance(expected, str):
        with pytest.raises(SystemExit, match=expected) as stopped:
            find_images(folder, Settings(**flags))
        assert "\n" not in str(stopped.value)
    else:
        assert rows(find_images(folder, Settings(**flags))[0]) == expected


def test_a_table_of_the_test_folder_is_not_taken_for_the_training_folder(tmp_path):
    folder = fill(tmp_path, ["train/0001 0002"])
    (tmp_path / "test.csv").write_text("file,label\ntest/0001.jpg,cat\ntest/0002.jpg,dog\n")
    with pytest.raises(
        SystemExit, match="test.csv names images in test, not in .*train; give that folder as"
    ):
        find_images(folder / "train", Settings(metadata=str(tmp_path / "test.csv")))


@pytest.mark.parametrize("names", [("Cat", "cat"), ("cat", "cat "), ("\u00fc", "u\u0308")])
def test_classes_that_look_alike_are_refused(tmp_path, names):
    (tmp_path / "mine.csv").write_text("\n".join(["file,label", f"a,{names[0]}", f"b,{names[1]}", "c,dog"]))
    folder = fill(tmp_path / "images", [f"{names[0]}/a", f"{names[1]}/b", "dog/c"])
    with pytest.raises(SystemExit, match="the classes .* and .* have the same name"):
        load_images(folder)


def test_what_a_beginner_would_not_notice_is_said(tmp_path, caplog):
    """A table that is not used, labels instead of folders, one of several columns of ones."""
    folder = fill(tmp_path / "images", CLASSES)
    (folder / "patients.csv").write_text("file,patient\na,p1\n")
    (folder / "notes.xlsx").write_text("x")
    find_images(folder, Settings())
    assert "warning: notes.xlsx is not used: if it tells of the images, give --metadata" in caplog.messages
    assert "warning: patients.csv is not used: if it tells of the images, give --metadata" in caplog.messages
    caplog.clear()
    (tmp_path / "mine.csv").write_text("file,dx,MEL,NV\na,x,1,0\nb,x,0,1\nc,y,0,1\nd,y,1,0\n")
    find_images(folder, Settings(metadata=str(tmp_path / "mine.csv")))
    assert any("the folders (cat, dog) are no classes then" in line for line in caplog.messages)
    (tmp_path / "mine.csv").write_text("file,MEL,NV,BCC\na,1,0,0\nb,0,1,0\nc,0,1,0\nd,0,0,1\n")
    find_images(folder, Settings(metadata=str(tmp_path / "mine.csv"), label_column_name=["MEL"]))
    assert any(
        "NV, BCC hold 0 and 1, too: if each is a class, name them all" in line for line in caplog.messages
    )


@pytest.mark.parametrize("nobody", ["N/A", "n.a.", "#N/A", "<NA>", "-", "?", " ", "Unknown", "unk"])
def test_signs_for_no_patient_are_no_patient(nobody):
    rows = pd.DataFrame({"file": ["a.jpg", "b.jpg", "c.jpg"], "group": ["p1", nobody, nobody]})
    rows["number"], rows["named"] = range(3), rows["file"]
    assert settle(rows, ["group"], "t.csv")[0]["group"].tolist() == ["p1", "", ""]


def test_a_table_of_another_patient_is_refused(tmp_path):
    for name in ("000.jpg", "001.jpg"):
        (tmp_path / "case12").mkdir(exist_ok=True)
        (tmp_path / "case12" / name).write_bytes(b"")
    table = Table(pd.DataFrame({"image": ["case07/000.jpg", "case07/001.jpg"]}), "t.csv", "", True)
    found = pd.Series(["000.jpg", "001.jpg"])
    with pytest.raises(SystemExit, match="t.csv names images in case07, not in .*case12"):
        check_paths(table, "image", found, tmp_path / "case12")
    check_paths(table, "image", found, tmp_path / "my-images")
