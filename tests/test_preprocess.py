"""Step 4: each file decoded once, its pixels what the checkpoint's processor makes of it."""

import errno
import io
import logging
import os
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.ImageOps
import pytest
import torch
from conftest import draw
from draw_sample import save_processor
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import finetune_vit
from finetune_vit import collate, keep_readable, load_images, normalise_on_device, pixel_shape, prepare_pixels
from finetune_vit import read_rgb, resize

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


@pytest.mark.parametrize("numbers", PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_reach_the_model_as_the_processor_makes_them(tmp_path, kinds, numbers):
    save_processor(tmp_path, 224, **numbers)
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    pixels = prepare(kinds, processor, tmp_path / "cache")
    model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    normalise_on_device(model, processor)
    seen = []
    model.vit.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = collate(list(pixels), pixel_shape(processor))
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
        theirs = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][
            0
        ]
    levels = (resize(rgb, processor).int() - theirs.int()).abs()
    assert levels.max() <= 1 and levels.float().mean() < 0.01


def test_preparing_leaves_the_threads_of_torch_alone(tmp_path, make_images, processor):
    before = torch.get_num_threads()
    prepare(make_images(), processor, tmp_path / "cache")
    assert torch.get_num_threads() == before


def test_other_kinds_of_image_are_converted_and_counted(tmp_path, kinds, processor, caplog):
    with caplog.at_level(logging.INFO, "finetune_vit"):
        readable = keep_readable(prepare(kinds, processor, tmp_path / "cache"))
    assert len(readable) == len([path for path in kinds.rglob("*") if path.is_file()]) >= 8
    for mode in ("L", "CMYK", "P", "RGBA", "1"):
        assert f"converted to RGB: 1 of mode {mode}" in caplog.text
    assert "left out" not in caplog.text


def test_unreadable_files_are_named_and_left_out(tmp_path, make_images, processor, caplog):
    folder = make_images(count=5)
    whole = (folder / "red" / "000.jpg").read_bytes()
    half = whole[: len(whole) // 2]
    bad = {"cut.jpg": half, "empty.png": b"", "text.jpg": b"hello", "head.jpg": whole[:20]}
    for name, content in bad.items():
        (folder / "red" / name).write_bytes(content)
    with caplog.at_level(logging.WARNING, "finetune_vit"):
        pixels = keep_readable(prepare(folder, processor, tmp_path / "cache"))
    assert len(pixels) == 15 and not set(pixels["file"]) & {f"red/{name}" for name in bad}
    assert sorted(message.split()[3] for message in caplog.messages) == sorted(
        repr(f"red/{name}") for name in bad
    )
    assert None not in pixels["pixel_values"][:]


def test_cache_is_used_until_something_changes(tmp_path, make_images, processor, monkeypatch):
    folder, cache = make_images(count=3), tmp_path / "cache"
    first = prepare(folder, processor, cache)
    calls = []
    decode = finetune_vit.decode_files
    monkeypatch.setattr(
        finetune_vit, "decode_files", lambda files, **more: calls.extend(files) or decode(files, **more)
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

    decode = finetune_vit.decode_file
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_vit, "decode_file", interrupt)
        prepare(folder, processor, cache)
    assert not list(cache.glob("pixels-*"))
    assert len(prepare(folder, processor, cache)) == 9


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
    "bomb.png": (bomb, "DecompressionBombError"),
    "deep.png": (deep("I;16", np.uint16), "more than 8 bits"),
    "deep.tif": (deep("I", np.int32), "more than 8 bits"),
    "real.tiff": (deep("F", np.float32), "more than 8 bits"),
    "zero.jpg": (lambda path: path.write_bytes(b""), "UnidentifiedImageError"),
    "web.jpg": (lambda path: path.write_bytes(b"<html>"), "UnidentifiedImageError"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_would_be_read_wrong_is_left_out_by_name(tmp_path, make_images, processor, caplog, name):
    folder, (write, reason) = make_images(count=3), LEFT_OUT[name]
    write(folder / "red" / name)
    pixels = keep_readable(prepare(folder, processor, tmp_path / "cache"))
    assert len(pixels) == 9
    assert len(caplog.messages) == 1 and repr(f"red/{name}") in caplog.text and reason in caplog.text


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


def test_hostile_file_names_are_read(tmp_path, make_images, processor):
    folder = make_images(count=3)
    for name in HOSTILE_NAMES:
        shutil.copy(folder / "red" / "000.jpg", os.path.join(os.fsencode(folder / "red"), name))
    pixels = keep_readable(prepare(folder, processor, tmp_path / "cache"))
    assert {f"red/{name.decode()}" for name in HOSTILE_NAMES} <= set(pixels["file"])
    assert len(pixels) == 9 + len(HOSTILE_NAMES)


@pytest.mark.parametrize("name", [b"\xff\xfe.jpg", b"x.zip::y.jpg", b"gone.jpg", b"pipe.jpg"])
def test_names_that_cannot_be_taken_are_left_out_by_name(tmp_path, make_images, processor, caplog, name):
    folder = make_images(count=3)
    path = os.path.join(os.fsencode(folder / "red"), name)
    if name == b"gone.jpg":
        os.symlink("nowhere", path)
    elif name == b"pipe.jpg":
        os.mkfifo(path)
    else:
        shutil.copy(folder / "red" / "000.jpg", path)
    assert len(keep_readable(prepare(folder, processor, tmp_path / "cache"))) == 9
    assert len(caplog.messages) == 1 and repr(os.fsdecode(name))[1:-1] in caplog.text


def test_a_read_error_that_passes_is_not_kept_as_a_damaged_image(
    tmp_path, make_images, processor, monkeypatch
):
    folder, cache, waits = make_images(count=3), tmp_path / "cache", []
    read, failures = Path.read_bytes, [True, True]

    def fail(path):
        if path.name == "001.jpg" and failures and failures.pop():
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(finetune_vit.time, "sleep", waits.append)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert len(keep_readable(prepare(folder, processor, cache))) == 9
    assert waits == [1, 2] or sorted(waits) == [1, 1]

    failures[:] = [True] * 99  # it does not pass: no cache, and the next run reads everything
    os.utime(folder / "red" / "001.jpg", (1, 1))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(Path, "read_bytes", fail)
        prepare(folder, processor, cache)
    assert len(keep_readable(prepare(folder, processor, cache))) == 9


def test_a_cache_of_an_older_version_is_not_used(tmp_path, make_images, processor, monkeypatch):
    folder, cache = make_images(count=3), tmp_path / "cache"
    first = prepare(folder, processor, cache)["pixel_values"][0]
    resize = finetune_vit.resize
    monkeypatch.setattr(finetune_vit, "resize", lambda rgb, processor: 255 - resize(rgb, processor))
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
