"""Steps 3 and 4: what is an image, whatever its name; DICOM and HEIC; more than 8 bits; no permission."""

import io
import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import draw, load_images
from datasets import Dataset
from PIL import Image
from transformers import BitImageProcessor, ViTImageProcessor
from transformers.image_utils import load_image

from steps.image_formats import DEEP, LOCKED, NO_WINDOW, is_huffman, judge, readable_endings, register
from steps.image_formats import sample_bits
from steps.load import find_images, list_images
from steps.options import Settings
from steps.preprocess import cache_key, decode_file, read_rgb, resize

PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


def photo(size=(60, 40)):
    return draw((90, 140, 200), np.random.default_rng(1), size)


def encode(image, kind, **options):
    image.save(content := io.BytesIO(), kind, **options)
    return content.getvalue()


JPEG, PNG, TIFF = (encode(photo(), kind) for kind in ("JPEG", "PNG", "TIFF"))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)
DICOM, DICOMDIR = (bytes(128) + b"DICM" + more for more in (bytes(99), b"1.2.840.10008.1.3.10\0"))
READ_BY = "{}: needs `pip install {}`"
IMAGES = {
    "noext": JPEG, "x.jpg_large": JPEG, "x.pjpeg": JPEG, "x.jpg.1": JPEG, "x.jpg ": JPEG, "x.txt": PNG,
    "x.": JPEG, "x.php": JPEG, "x.JPG": PNG, "x.heic": JPEG, "x.zip": JPEG, "x.old": TIFF, "cut": JPEG[:20],
    "x.data": encode(photo(), "BMP"), "IM0001": encode(photo(), "PPM"), "__000__.jpg": JPEG,
}  # fmt: skip
OTHERS = {
    "x.heic": (HEIC, READ_BY.format("HEIC", "pillow-heif")),
    "heic": (HEIC, READ_BY.format("HEIC", "pillow-heif")),
    "x.dcm": (DICOM, READ_BY.format("DICOM", "pydicom")),
    "IM0002": (DICOM, READ_BY.format("DICOM", "pydicom")),
    "DICOMDIR": (DICOMDIR, None),
    "x.nii.gz": (b"\x1f\x8b", ".nii.gz: Pillow cannot read it"),
    "x.jxl": (b"\xff\x0a", ".jxl: Pillow cannot read it"),
    "x.NEF": (TIFF, ".nef: Pillow cannot read it"),  # of a thumbnail
    "labels.txt": (b"P1 30 40 1 0 1\n", None),  # a patient; to Pillow the head of a PPM
    "notes": (b"BMI,age\n20,30\n", None),
    "empty": (b"", None),
    "x.gz": (b"\x1f\x8b" + bytes(99), None),
}


@pytest.mark.parametrize("name", [*IMAGES])
def test_an_image_is_one_whatever_its_ending(tmp_path, name):
    (tmp_path / name).write_bytes(IMAGES[name])
    assert list_images(tmp_path) == ([str(tmp_path / name)], {})


@pytest.mark.parametrize("name", [*OTHERS])
def test_what_only_looks_like_an_image_is_named(tmp_path, bare_pillow, name):
    content, reason = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    assert judge(str(tmp_path / name), readable_endings()) == reason


@pytest.mark.parametrize("size", range(17))
def test_short_files_are_judged(tmp_path, size):
    for content in (bytes(size), JPEG[:size], b"\n" * size):
        (tmp_path / "short").write_bytes(content)
        assert judge(str(tmp_path / "short"), readable_endings()) == ("" if content[:3] == JPEG[:3] else None)


def test_datasets_takes_every_ending(tmp_path):
    for label in ("a", "__b"):
        (tmp_path / label).mkdir()
        for name, content in IMAGES.items():
            (tmp_path / label / name).write_bytes(content)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._x.jpg").write_bytes(JPEG)
    expected = sorted(f"{label}/{name}" for label in ("a", "__b") for name in IMAGES)
    assert sorted(load_images(tmp_path)["file"]) == expected
    assert {decode_file(tmp_path / file, PROCESSOR)["error"] for file in expected if "cut" not in file} == {
        ""
    }


def test_archives_in_class_folders_are_named(tmp_path, make_images):
    folder = make_images(count=2)
    for name in ("more.zip", "red/nested.tar.xz", "red/b.7z"):
        (folder / name).write_bytes(b"PK")
    table, left_out = find_images(folder, Settings())
    reason = "archives: give one as --data_url, or unpack them"
    assert len(table) == 6
    assert left_out == {"more.zip": reason, "red/nested.tar.xz": reason, "red/b.7z": "archives: unpack them"}
    (folder / "yellow").mkdir()
    (folder / "yellow" / "all.zip").write_bytes(b"PK")
    with pytest.raises(SystemExit, match=f"^error: no images in yellow; found there instead: {reason}$"):
        find_images(folder, Settings())


@pytest.fixture
def locked():
    """Return a folder of images in which another user has closed one thing; the user is not root."""
    ids = os.getresuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for label in ("a", "b"):
            (Path(folder) / label).mkdir()
            for number in range(3):
                (Path(folder) / label / f"{number}.jpg").write_bytes(JPEG)
        (Path(folder) / "a" / "noext").write_bytes(JPEG)

        def close(name, mode=0):
            os.chmod(Path(folder) / name, mode)
            if ids[1] == 0:
                os.setresuid(-1, 65534, -1)
            return Path(folder)

        yield close
        os.setresuid(*ids)
        for path in Path(folder).iterdir():
            path.chmod(0o755)


@pytest.mark.parametrize("name", ["a/1.jpg", "a/noext"])
def test_a_file_without_permission_is_named_and_left_out(locked, name):
    folder = locked(name)
    table, left_out = find_images(folder, Settings())
    errors = {file: decode_file(folder / file, PROCESSOR)["error"] for file in table["file"]}
    assert left_out | {file: error for file, error in errors.items() if error} == {name: LOCKED}


def test_a_permission_that_is_given_later_makes_the_pixels_anew(locked):
    folder = locked("a/1.jpg")
    images = Dataset.from_dict({"file": ["a/0.jpg", "a/1.jpg"]})
    before = cache_key(images, folder, PROCESSOR)
    os.setresuid(-1, os.getresuid()[2], -1)
    (folder / "a" / "1.jpg").chmod(0o644)
    assert cache_key(images, folder, PROCESSOR) != before


@pytest.mark.parametrize("mode", [0, 0o444, 0o111])
def test_a_folder_without_permission_is_an_error_that_says_so(locked, mode):
    folder = locked("a", mode)
    with pytest.raises(
        SystemExit, match=f"^error: no permission to read the folder {folder}/a; ask its owner"
    ):
        find_images(folder, Settings())


def deep_png(samples, colour, depth=16):
    """A PNG of uint8 or uint16 (height, width, channels); Pillow cannot write most of them."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    content = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(content)


def deep_tiff(samples):
    """A TIFF of uint16 (height, width, 3), little endian, without compression."""
    (height, width), size = samples.shape[:2], samples.size * 2
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8 + size + 114), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, size)]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    ending = bytes(4) + struct.pack("<HHH", 16, 16, 16)
    return b"II*\0" + struct.pack("<I", 8 + size) + samples.astype("<u2").tobytes() + table + ending


RGB = np.array(photo())
GREY16, TWELVE = Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), RGB.astype(np.uint16) * 16
DEPTHS = {
    "rgb16.png": (deep_png(TWELVE, 2), 16),
    "rgba16.png": (deep_png(TWELVE[..., [0, 1, 2, 2]], 6), 16),
    "la16.png": (deep_png(TWELVE[..., :2], 4), 16),
    "l16.png": (encode(GREY16, "PNG"), 16),
    "rgb8.png": (deep_png(RGB, 2, 8), 8),
    "palette.png": (encode(photo().quantize(8), "PNG"), 4),
    "rgb16.tif": (deep_tiff(TWELVE), 16),
    "l16.tif": (encode(GREY16, "TIFF"), 16),
    "int32.tif": (encode(Image.fromarray(RGB[..., 0].astype(np.int32)), "TIFF"), 16),
    "float.tif": (encode(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"), 16),
    "rgb8.tif": (encode(photo(), "TIFF", compression="tiff_lzw"), 8),
    "bilevel.tif": (encode(photo().convert("1"), "TIFF"), 1),
    "l16.jp2": (encode(GREY16, "JPEG2000"), 16),
    "rgb8.jp2": (encode(photo(), "JPEG2000"), 8),
    "rgb8.j2k": (encode(photo(), "JPEG2000", no_jp2=True), 8),
    "rgb16.sgi": (encode(photo(), "SGI", bpc=2), 16),
    "rgb8.sgi": (encode(photo(), "SGI"), 8),
    "rgb16.ppm": (b"P6 60 40 4095\n" + TWELVE.astype(">u2").tobytes(), 12),
    "l16.pgm": (encode(GREY16, "PPM"), 16),
    "rgb8.ppm": (encode(photo(), "PPM"), 8),
    "float.pfm": (encode(Image.fromarray(RGB[..., 0].astype(np.float32)), "PPM"), 16),
    "rgb8.webp": (encode(photo(), "WEBP"), 8),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_more_than_8_bits_are_left_out_whatever_the_kind(tmp_path, name):
    content, bits = DEPTHS[name]
    (tmp_path / name).write_bytes(content)
    with Image.open(tmp_path / name) as image:
        assert sample_bits(image, content) == bits
    row = decode_file(tmp_path / name, PROCESSOR)
    assert row["error"] == (DEEP if bits > 8 else "")
    if bits <= 8:
        expected = resize(np.array(load_image(str(tmp_path / name))), PROCESSOR)
        assert row["pixel_values"] == expected.numpy().tobytes()


def dicom(path, samples, **fields):
    """Write grey or RGB samples, uint8 or (u)int16, as an uncompressed DICOM file with these fields."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.Rows, dataset.Columns = samples.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    if samples.ndim == 3:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * samples.itemsize
    dataset.PixelRepresentation = int(samples.dtype.kind == "i")
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.HighBit, dataset.PixelData = dataset.BitsStored - 1, samples.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    register()


RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)  # 12 bits
LINE = np.clip(np.rint((RAMP.astype(float) - 1023.5) / 999 * 255 + 127.5), 0, 255)  # the standard's formula
DICOMS = {
    "window": (RAMP, {"WindowCenter": 1024, "WindowWidth": 1000}, LINE),
    "windows": (RAMP, {"WindowCenter": [1024, 9], "WindowWidth": [1000, 9]}, LINE),
    "monochrome1": (
        RAMP,
        {"WindowCenter": 1024, "WindowWidth": 1000, "PhotometricInterpretation": "MONOCHROME1"},
        255 - LINE,
    ),
    "signed": (
        (RAMP.astype(np.int16) - 1024),
        {"WindowCenter": 0, "WindowWidth": 1000, "BitsStored": 16},
        LINE,
    ),
    "rescaled": (
        RAMP,
        {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 1024, "WindowWidth": 2000},
        np.clip(np.rint((RAMP * 2.0 - 1024 - 1023.5) / 1999 * 255 + 127.5), 0, 255),
    ),
    "8 bits": (RGB[..., 0].copy(), {}, RGB[..., 0]),
    "8 bits inverted": (RGB[..., 0].copy(), {"PhotometricInterpretation": "MONOCHROME1"}, 255 - RGB[..., 0]),
    "colour": (RGB, {}, RGB),
}


@pytest.mark.parametrize("name", DICOMS)
def test_dicom_is_shown_as_its_window_says(tmp_path, name):
    samples, fields, expected = DICOMS[name]
    path = tmp_path / "IM0001"  # as on a clinic's CD
    dicom(path, samples, **({"BitsStored": 12} if samples is RAMP else {}) | fields)
    assert list_images(tmp_path)[0] == [str(path)]
    with Image.open(path) as image:
        assert np.abs(np.array(image).astype(float) - expected).max() <= 1 and image.format == "DICOM"
    row = decode_file(path, PROCESSOR)
    assert row["error"] == ""
    assert row["pixel_values"] == resize(np.array(load_image(str(path))), PROCESSOR).numpy().tobytes()


def test_dicom_through_its_own_table(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 8])
    item.add_new("LUTData", "OW", (np.arange(4096) // 16).astype("<u2").tobytes())
    dicom(tmp_path / "x.dcm", RAMP, BitsStored=12, VOILUTSequence=[item])
    with Image.open(tmp_path / "x.dcm") as image:
        assert np.array_equal(np.array(image), RAMP // 16)


def test_dicom_without_a_window_or_pixels_is_left_out(tmp_path):
    dicom(tmp_path / "deep.dcm", RAMP, BitsStored=12)
    dicom(tmp_path / "colour.dcm", TWELVE, BitsStored=12)
    dicom(tmp_path / "empty.dcm", RAMP, BitsStored=12, WindowCenter=9, WindowWidth=9)
    content = (tmp_path / "empty.dcm").read_bytes()
    (tmp_path / "empty.dcm").write_bytes(content[: len(content) - RAMP.nbytes])
    for name in ("deep.dcm", "colour.dcm"):
        assert decode_file(tmp_path / name, PROCESSOR)["error"] == NO_WINDOW
    assert decode_file(tmp_path / "empty.dcm", PROCESSOR)["error"].startswith("ValueError: ")


@pytest.mark.parametrize("name", ["x.heic", "IMG_1.jpg", "noext"])
def test_heic_is_read_as_pipeline_reads_it(tmp_path, name):
    pytest.importorskip("pillow_heif")
    register()
    (tmp_path / name).write_bytes(encode(photo(), "HEIF", quality=95))
    assert list_images(tmp_path)[0] == [str(tmp_path / name)]
    row, rgb = decode_file(tmp_path / name, PROCESSOR), np.array(load_image(str(tmp_path / name)))
    assert row["error"] == "" and np.abs(rgb.mean((0, 1)) - (90, 140, 200)).max() < 5
    assert row["pixel_values"] == resize(rgb, PROCESSOR).numpy().tobytes()


@pytest.mark.parametrize(
    ("before", "after", "huffman"),
    [(b"", b"", True), (b"\xff\xc0", b"\xff\xc9", False), (b"\xff\xc0", b"\xff\xc3", False)],
)
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0" + JPEG])
def test_pillow_decides_of_jpegs_in_other_codes(before, after, huffman, exif):
    """The thumbnail in the Exif data has a frame of its own, in Huffman's code."""
    content = encode(photo(), "JPEG", exif=exif)
    frame = content.rfind(b"\xff\xc0")
    content = content[:frame] + content[frame:].replace(before, after, 1)
    assert is_huffman(content) is huffman
    try:
        theirs = np.array(load_image(Image.open(io.BytesIO(content))))
    except OSError:
        with pytest.raises(OSError):
            read_rgb(Image.open(io.BytesIO(content)), io.BytesIO(content))
    else:
        assert np.array_equal(read_rgb(Image.open(io.BytesIO(content)), io.BytesIO(content)), theirs)


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}, {"subsampling": 0}])
def test_usual_jpegs_take_the_short_road(options):
    assert is_huffman(encode(photo(), "JPEG", **options))
    assert not is_huffman(JPEG[:2]) and not is_huffman(JPEG[:40]) and not is_huffman(b"")


def test_a_strip_that_would_fill_the_memory_is_left_out(tmp_path):
    """12,000 x 1 pixels, scaled to a shortest edge of 256, are 786 million."""
    Image.new("RGB", (12_000, 1)).save(tmp_path / "strip.png")
    processor = BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    assert "strip of 12000 x 1" in decode_file(tmp_path / "strip.png", processor)["error"]


def test_of_several_frames_the_first_is_taken_and_that_is_said(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    for name in ("x.gif", "x.tif", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        row = decode_file(tmp_path / name, PROCESSOR)
        assert row["error"] == "" and row["mode"].endswith(", the first of several frames")
    frames[0].save(tmp_path / "one.tif")
    assert decode_file(tmp_path / "one.tif", PROCESSOR)["mode"] == "RGB"


def test_hidden_images_are_named_but_not_the_notes_of_macos(tmp_path):
    for name in ("a/x.png", "a/.x.png", "a/._x.png", "b/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    table, left_out = find_images(tmp_path, Settings())
    assert table["file"].tolist() == ["a/x.png", "b/x.png"] and left_out == {"a/.x.png": "hidden files"}
