"""Step 4: each file decoded once, its pixels what the checkpoint's processor makes of it."""

import errno
import io
import logging
import os
import re
import shutil
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pandas as pd
import PIL.ImageOps
import pytest
import torch
from conftest import draw, load_images
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from draw_sample import save_processor
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from steps import preprocess
from steps.architectures import pixel_shape
from steps.load import find_images
from steps.model import normalise_on_device
from steps.options import Settings
from steps.preprocess import Collator, decode_files, keep_readable, prepare_pixels, read_rgb, resize

PROCESSORS = {  # those of the two checkpoints that we develop with
    "bilinear, 0.5": {"resample": 2, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "bicubic, ImageNet": {"resample": 3, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}


@pytest.fixture
def processor(tmp_path):
    save_processor(tmp_path, 32)
    return ViTImageProcessor.from_pretrained(tmp_path)


@pytest.fixture
def kinds(make_images):
    """A folder with an image of every kind that must be read right."""
    folder = make_images(count=1)
    photo = draw((90, 140, 200), np.random.default_rng(1), (300, 211))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.save(folder / "red" / "turned.jpg", exif=exif)
    photo.convert("L").save(folder / "red" / "grey.jpg")
    photo.convert("CMYK").save(folder / "red" / "cmyk.jpg")
    photo.convert("P").save(folder / "red" / "palette.png")
    photo.convert("RGBA").save(folder / "red" / "alpha.png")
    photo.convert("1").save(folder / "red" / "bilevel.tif")
    photo.save(folder / "red" / "large.webp")
    photo.resize((5, 3)).save(folder / "red" / "small.bmp")
    return folder


def prepare(folder, processor, cache):
    return prepare_pixels(load_images(folder), folder, processor, cache)


@pytest.fixture
def kept(tmp_path, processor):
    """Return a function that prepares the images of a folder, and returns those that can be read."""

    def keep(folder, cache=tmp_path / "cache"):
        found = find_images(folder, Settings())[1]
        return keep_readable(prepare(folder, processor, cache), found, tmp_path / "report" / "left_out.csv")

    return keep


def left_out(tmp_path):
    """What left_out.csv says: {file: reason}; nothing if it is not there."""
    path = tmp_path / "report" / "left_out.csv"
    if not path.exists():
        return {}
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert [*table.columns] == ["file", "reason"] and table["file"].is_unique
    return dict(zip(table["file"], table["reason"], strict=True))


@pytest.mark.parametrize("numbers", PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_reach_the_model_as_the_processor_makes_them(tmp_path, kinds, numbers):
    save_processor(tmp_path, 224, **numbers)
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    pixels = prepare(kinds, processor, tmp_path / "cache")
    model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    normalise_on_device(model, processor)
    seen = []
    model.vit.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = Collator(pixel_shape(processor))(list(pixels))
    assert batch["pixel_values"].dtype == torch.uint8 and batch["labels"].tolist() == pixels["label"][:]
    with torch.no_grad():
        model(pixel_values=batch["pixel_values"])
    assert seen[0].shape == (len(pixels), 3, 224, 224) and seen[0].dtype == torch.float32
    for file, ours in zip(pixels["file"], seen[0], strict=True):
        upright = PIL.ImageOps.exif_transpose(Image.open(kinds / file)).convert("RGB")
        theirs = processor(upright, return_tensors="pt")["pixel_values"][0]
        assert (ours - theirs).abs().max() < 0.01, file


@pytest.mark.parametrize("size", [(720, 576), (300, 211), (211, 300), (40, 36)])
@pytest.mark.parametrize("resample", [2, 3])
def test_a_photo_becomes_what_the_processor_makes_of_it(tmp_path, size, resample):
    path, processor = tmp_path / "photo.jpg", ViTImageProcessor(resample=resample)
    draw((90, 140, 200), np.random.default_rng(0), size).save(path, quality=90)
    with Image.open(path) as image:
        rgb = read_rgb(image, io.BytesIO(path.read_bytes()))
        assert np.array_equal(rgb, np.array(image.convert("RGB")))
        theirs = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        theirs = theirs["pixel_values"][0]
    levels = (resize(rgb, processor).int() - theirs.int()).abs()
    assert levels.max() <= 1 and levels.float().mean() < 0.01


@pytest.fixture
def three_threads():
    """Torch has three threads in the test, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_preparing_leaves_the_threads_of_torch_alone(tmp_path, make_images, processor, three_threads):
    prepare(make_images(), processor, tmp_path / "cache")
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_an_error_leaves_the_threads_of_torch_alone(
    make_images, processor, monkeypatch, three_threads, error
):
    seen = []

    def fail(path, processor):
        seen.append(torch.get_num_threads())
        raise error

    monkeypatch.setattr(preprocess, "decode_file", fail)
    with pytest.raises(type(error)):
        decode_files(["red/000.jpg"], make_images(count=1), processor)
    assert seen == [1] and torch.get_num_threads() == 3


def test_other_kinds_of_image_are_converted_and_counted(tmp_path, kinds, kept, caplog):
    with caplog.at_level(logging.INFO, "finetune_vit"):
        readable = kept(kinds)
    assert len(readable) == len([path for path in kinds.rglob("*") if path.is_file()]) >= 8
    for mode in ("L", "CMYK", "P", "RGBA", "1"):
        assert f"converted to RGB: 1 of mode {mode}" in caplog.text
    assert "left out" not in caplog.text and not left_out(tmp_path)


def test_unreadable_files_are_named_and_left_out(tmp_path, make_images, kept, caplog):
    folder = make_images(count=5)
    whole = (folder / "red" / "000.jpg").read_bytes()
    half = whole[: len(whole) // 2]
    bad = {"cut.jpg": half, "empty.png": b"", "text.jpg": b"hello", "head.jpg": whole[:20]}
    for name, content in bad.items():
        (folder / "red" / name).write_bytes(content)
    with caplog.at_level(logging.WARNING, "finetune_vit"):
        pixels = kept(folder)
    assert len(pixels) == 15 and not set(pixels["file"]) & {f"red/{name}" for name in bad}
    assert left_out(tmp_path).keys() == {f"red/{name}" for name in bad} and all(left_out(tmp_path).values())
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("4 of 19 files left out: ")
    assert caplog.messages[0].endswith(f"; see {tmp_path}/report/left_out.csv")
    assert None not in pixels["pixel_values"][:]


def test_cache_is_used_until_something_changes(tmp_path, make_images, processor, monkeypatch):
    folder, cache = make_images(count=3), tmp_path / "cache"
    first = prepare(folder, processor, cache)
    calls = []
    decode = preprocess.decode_files
    monkeypatch.setattr(
        preprocess, "decode_files", lambda files, **more: calls.extend(files) or decode(files, **more)
    )
    again = prepare(folder, processor, cache)
    assert not calls and again[:] == first[:]

    os.utime(folder / "red" / "001.jpg", ns=(1, 1))  # a file that was replaced, even by one of the same size
    prepare(folder, processor, cache)
    assert len(calls) == 9
    processor.resample = 3
    bicubic = prepare(folder, processor, cache)
    assert len(calls) == 18 and bicubic["pixel_values"][0] != first["pixel_values"][0]
    (folder / "red" / "002.jpg").rename(folder / "red" / "003.jpg")
    assert prepare(folder, processor, cache)["file"][:][-1] == "red/003.jpg" and len(calls) == 27


def test_another_folder_with_the_same_names_sizes_and_times_is_not_mixed_up(tmp_path, processor):
    for name, grey in (("one", 10), ("two", 200)):
        for label in ("a", "b"):
            path = tmp_path / name / label / "0.bmp"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (grey,) * 3).save(path)
            os.utime(path, ns=(0, 0))
    one, two = (prepare(tmp_path / name, processor, tmp_path / "cache") for name in ("one", "two"))
    assert {*one["pixel_values"][0]} == {10} and {*two["pixel_values"][0]} == {200}


def test_interrupted_preparation_leaves_no_cache(tmp_path, make_images, processor, monkeypatch):
    folder, cache = make_images(count=3), tmp_path / "cache"

    def interrupt(path, processor):
        if path.name == "002.jpg":
            raise KeyboardInterrupt
        return decode(path, processor)

    decode = preprocess.decode_file
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preprocess, "decode_file", interrupt)
        prepare(folder, processor, cache)
    assert not list(cache.glob("pixels-*"))
    assert len(prepare(folder, processor, cache)) == 9


def test_a_run_waits_for_another_that_prepares_the_same_images(tmp_path, make_images, processor, caplog):
    """What the other has made is used, and stays. What a run that was killed has left is deleted."""
    folder, cache = make_images(), tmp_path / "cache"
    cache.mkdir()
    (cache / "tmp1234").write_bytes(b"half")
    prepare(folder, processor, cache)
    assert not (cache / "tmp1234").exists()
    (made,) = cache.glob("pixels-*.arrow")
    before = made.rename(tmp_path / made.name).stat()
    caplog.set_level("INFO")
    with ThreadPoolExecutor(1) as pool:
        with filelock.FileLock(cache / ".lock"):  # as another run holds it
            second = pool.submit(prepare, folder, processor, cache)
            while not second.done() and "waiting for another run" not in caplog.text:
                time.sleep(0.01)
            os.replace(tmp_path / made.name, made)
        assert len(second.result()) == 36
    after = made.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_cache_holds_little_more_than_the_pixels(tmp_path, make_images):
    save_processor(tmp_path, 224)
    pixels = prepare(make_images(count=20), ViTImageProcessor.from_pretrained(tmp_path), tmp_path / "cache")
    size = os.path.getsize(pixels.cache_files[0]["filename"]) / len(pixels)
    assert 150_528 <= size < 151_500


def bomb(path):
    """A PNG of 300 bytes that says it has 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def deep(mode, dtype):
    return lambda path: Image.fromarray(np.arange(1200, dtype=dtype).reshape(30, 40) * 50).save(path)


LEFT_OUT = {
    "bomb.png": (bomb, "more than 178 million pixels: scale it down"),
    "deep.png": (deep("I;16", np.uint16), "more than 8 bits"),
    "deep.tif": (deep("I", np.int32), "more than 8 bits"),
    "real.tiff": (deep("F", np.float32), "more than 8 bits"),
    "zero.jpg": (lambda path: path.write_bytes(b""), "UnidentifiedImageError"),
    "web.jpg": (lambda path: path.write_bytes(b"<html>"), "UnidentifiedImageError"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_would_be_read_wrong_is_left_out_by_name(tmp_path, make_images, kept, caplog, name):
    folder, (write, reason) = make_images(count=3), LEFT_OUT[name]
    write(folder / "red" / name)
    pixels = kept(folder)
    assert len(pixels) == 9
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("1 of 10 files left out: ")
    assert left_out(tmp_path).keys() == {f"red/{name}"} and reason in left_out(tmp_path)[f"red/{name}"]


SAYS = r"^{} of {} files left out: {}; see .*/report/left_out\.csv$"
DEEP = "more than 8 bits per channel (`pipeline` clips them at 255): convert as README shows"


def test_many_files_that_are_left_out_are_one_line(tmp_path, make_images, kept, caplog):
    folder, (write, reason) = make_images(count=5), LEFT_OUT["deep.png"]
    for i in range(20):
        write(folder / "red" / f"deep {i:02}.png")
    with caplog.at_level(logging.INFO, "finetune_vit"):
        assert len(kept(folder)) == 15
    assert len(caplog.messages) == 1 and re.match(SAYS.format(20, 35, re.escape(DEEP)), caplog.messages[0])
    assert left_out(tmp_path).keys() == {f"red/deep {i:02}.png" for i in range(20)}
    assert all(reason in text for text in left_out(tmp_path).values())


def test_damaged_files_are_counted_together_wherever_they_are_cut(tmp_path, make_images, kept, caplog):
    folder = make_images(count=5)
    whole = (folder / "red" / "000.jpg").read_bytes()
    for size in range(1, 9):
        (folder / "red" / f"cut {size}.jpg").write_bytes(whole[: -100 * size - size])
    assert len(kept(folder)) == 15
    assert len({*left_out(tmp_path).values()}) > 1  # "image file is truncated (17 bytes not processed)"
    assert len(caplog.messages) == 1
    assert re.match(SAYS.format(8, 23, "image file is truncated [^,]*"), caplog.messages[0])


def test_if_nothing_is_left_that_is_one_error_line(tmp_path, make_images, kept, caplog):
    folder, (write, _) = make_images(count=4), LEFT_OUT["deep.png"]
    for path in [*folder.glob("*/*.jpg")]:
        write(path.with_suffix(".png"))
        path.unlink()
    line = f"error: none of the images can be read: {DEEP}; "
    line += f"see {tmp_path}/report/left_out.csv"
    with pytest.raises(SystemExit, match=f"^{re.escape(line)}$"):
        kept(folder)
    assert not caplog.messages  # the error line says it all
    assert len(left_out(tmp_path)) == 12


def test_kinds_that_pillow_does_not_read_are_counted_and_named(
    tmp_path, make_images, kept, caplog, bare_pillow
):
    folder = make_images(count=3)
    for name in ("a.dcm", "b.DCM", "c.heic", "d.cr2", "notes.txt", "Thumbs.db", ".hidden.dcm"):
        (folder / "red" / name).write_bytes(b"x")
    (folder / "red" / "e.jpg").write_bytes(b"")
    assert len(kept(folder)) == 9
    dicom = "DICOM: needs `pip install pydicom`"
    heic = "HEIC: needs `pip install pillow-heif`"
    raw = ".cr2: Pillow cannot read it"
    named = left_out(tmp_path)
    assert "cannot identify" in named.pop("red/e.jpg")
    assert named == {"red/a.dcm": dicom, "red/b.DCM": dicom, "red/c.heic": heic, "red/d.cr2": raw}
    assert len(caplog.messages) == 1
    most = rf"{dicom} \(2\), ({heic}|{re.escape(raw)}) \(1\), .+ \(1\)"
    assert re.match(SAYS.format(5, 14, most), caplog.messages[0])


def test_the_list_of_what_is_left_out_is_written_when_it_changes(tmp_path, make_images, kept):
    folder, path = make_images(count=3), tmp_path / "report" / "left_out.csv"
    names = ["NA.dcm", "1.dcm", 'quo"te, comma.dcm', "new\nline.dcm", "\udcff.dcm"]
    for name in names:
        (folder / "red" / name).write_bytes(b"x")
    (folder / "red" / "empty.jpg").write_bytes(b"")
    kept(folder)
    before = path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()
    kept(folder)
    assert before == (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
    (folder / "red" / "empty.jpg").unlink()
    kept(folder)
    assert left_out(tmp_path).keys() == {"red/" + name.replace("\udcff", "\\udcff") for name in names}
    for name in names:
        (folder / "red" / name).unlink()
    kept(folder)
    assert not path.exists()


@pytest.mark.parametrize("ending", ["mpo", "avif", "qoi"])
def test_kinds_that_pillow_reads_are_taken(tmp_path, make_images, processor, kept, caplog, ending):
    """`datasets` does not know them: its list is older than Pillow."""
    folder = make_images(count=3)
    path = folder / "red" / f"photo.{ending.upper() if ending == 'qoi' else ending}"
    photo = draw((90, 140, 200), np.random.default_rng(1), (300, 211))
    if ending == "mpo":  # two pictures, as a stereo camera takes them: the first one counts
        photo.save(path, save_all=True, append_images=[Image.new("RGB", photo.size)])
    else:
        photo.save(path)
    with Image.open(path) as image:
        theirs = np.array(image.convert("RGB"))
        assert image.format == ending.upper() and abs(theirs.mean(axis=(0, 1)) - (90, 140, 200)).max() < 5
        assert np.array_equal(read_rgb(image, io.BytesIO(path.read_bytes())), theirs)
    images = kept(folder)
    row = images[images["file"][:].index(f"red/{path.name}")]
    assert row["pixel_values"] == resize(theirs, processor).numpy().tobytes()
    assert len(images) == 10 and not caplog.messages and not left_out(tmp_path)


def test_an_ending_that_this_pillow_lacks_is_counted(tmp_path, make_images, kept, monkeypatch, fresh_endings):
    folder = make_images(count=3)
    PIL.Image.init()  # or it would register the plugin later
    monkeypatch.setattr(ImageFolder, "EXTENSIONS", [*{*ImageFolder.EXTENSIONS} - {".avif", ".avifs"}])
    Image.new("RGB", (40, 36)).save(folder / "red" / "photo.avif")
    monkeypatch.delitem(PIL.Image.OPEN, "AVIF")
    monkeypatch.setattr(PIL.Image, "ID", [name for name in PIL.Image.ID if name != "AVIF"])  # in any order
    assert len(kept(folder)) == 9
    assert left_out(tmp_path) == {"red/photo.avif": ".avif: Pillow cannot read it"}


def test_an_animation_is_its_first_frame(tmp_path, make_images, processor):
    folder = make_images(count=1)
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    first.save(folder / "red" / "moving.gif", save_all=True, append_images=[second])
    pixels = prepare(folder, processor, tmp_path / "cache")
    row = pixels[pixels["file"][:].index("red/moving.gif")]
    assert np.frombuffer(row["pixel_values"], np.uint8).reshape(3, -1).mean(axis=1).tolist() == [200, 0, 0]


HOSTILE_NAMES = [
    b"new\nline.jpg", b"q'uo\"te.jpg", b"x" * 246 + b".jpg", b"[ab]*.jpg", b"-rf.jpg", b"a:b.jpg", b"%41.jpg",
    b"$(touch x);.jpg", b"\x1b[2Jclear.jpg", "ünï 🙂.jpg".encode(),
]  # fmt: skip


def test_hostile_file_names_are_read(make_images, kept):
    folder = make_images(count=3)
    for name in HOSTILE_NAMES:
        shutil.copy(folder / "red" / "000.jpg", os.path.join(os.fsencode(folder / "red"), name))
    pixels = kept(folder)
    assert {f"red/{name.decode()}" for name in HOSTILE_NAMES} <= set(pixels["file"])
    assert len(pixels) == 9 + len(HOSTILE_NAMES)


@pytest.mark.parametrize("name", [b"\xff\xfe.jpg", b"x.zip::y.jpg", b"$PATH.jpg", b"gone.jpg", b"pipe.jpg"])
def test_names_that_cannot_be_taken_are_left_out_by_name(tmp_path, make_images, kept, caplog, name):
    folder = make_images(count=3)
    path = os.path.join(os.fsencode(folder / "red"), name)
    if name == b"gone.jpg":
        os.symlink("nowhere", path)
    elif name == b"pipe.jpg":
        os.mkfifo(path)
    else:
        shutil.copy(folder / "red" / "000.jpg", path)
    assert len(kept(folder)) == 9
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("1 of 10 files left out: ")
    no_file = name in (b"gone.jpg", b"pipe.jpg")
    reason = "broken links or special files" if no_file else "names that `datasets`"
    ((file, text),) = left_out(tmp_path).items()
    assert file == "red/" + repr(os.fsdecode(name))[1:-1] and text.startswith(reason)


def test_a_read_error_that_passes_is_not_kept_as_a_damaged_image(
    tmp_path, make_images, processor, kept, monkeypatch
):
    folder, cache, waits = make_images(count=3), tmp_path / "cache", []
    read, failures = Path.read_bytes, [True, True]

    def fail(path):
        if path.name == "001.jpg" and failures and failures.pop():
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(preprocess.time, "sleep", waits.append)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert len(kept(folder, cache)) == 9
    assert waits == [1, 2] or sorted(waits) == [1, 1]

    failures[:] = [True] * 99  # it does not pass: no cache, and the next run reads everything
    os.utime(folder / "red" / "001.jpg", (1, 1))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(Path, "read_bytes", fail)
        prepare(folder, processor, cache)
    assert len(kept(folder, cache)) == 9


def test_a_cache_of_an_older_version_is_not_used(tmp_path, make_images, processor, monkeypatch):
    folder, cache = make_images(count=3), tmp_path / "cache"
    first = prepare(folder, processor, cache)["pixel_values"][0]
    resize = preprocess.resize
    monkeypatch.setattr(preprocess, "resize", lambda rgb, processor: 255 - resize(rgb, processor))
    other = prepare(folder, processor, cache)["pixel_values"][0]
    assert bytes(255 - value for value in other) == first


@pytest.mark.parametrize("size", [0, 100, 0.5])
def test_a_damaged_cache_is_made_again(tmp_path, make_images, processor, size):
    folder, cache = make_images(count=3), tmp_path / "cache"
    first = prepare(folder, processor, cache)[:]
    path = next(cache.glob("pixels-*.arrow"))
    with path.open("r+b") as file:
        file.truncate(int(size * path.stat().st_size) if 0 < size < 1 else size)
    assert prepare(folder, processor, cache)[:] == first


def test_a_disk_without_room_for_the_cache_is_noticed_before(tmp_path, make_images, processor, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=9 * 32 * 32 * 3 - 1))
    with pytest.raises(SystemExit, match="MB free, but .* MB are needed"):
        prepare(make_images(count=3), processor, tmp_path / "cache")
