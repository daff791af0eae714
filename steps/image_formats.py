"""Which files are images, by ending or content; the kinds that other packages read; bits per sample."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Set
from contextlib import suppress
from typing import IO, Any

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin

# Endings of images that Pillow may not read: named when they are left out. Many hold a TIFF of a thumbnail.
OTHER_IMAGES = """.avif .heic .heif .hif .jxl .qoi .svg .dcm .dicom .nii .mha .mhd .nrrd .czi .svs .ndpi
.mrxs .vsi .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf""".split()
OTHER_READERS = {"DICOM": "pydicom", "HEIC": "pillow-heif"}
KIND_OF = {".dcm": "DICOM", ".dicom": "DICOM", ".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC"}
CERTAIN = "AVIF GIF JPEG JPEG2000 PNG TIFF WEBP".split()  # four bytes or so that nothing else begins with
HEIC_BRANDS = [f"ftyp{brand}".encode() for brand in "heic heix heim heis hevc hevx mif1 msf1".split()]
DICOMDIR = b"1.2.840.10008.1.3.10\0"  # says that a DICOM file is the table of contents of a disk
LOCKED = "no permission to read"
NO_WINDOW = "DICOM of more than 8 bits without a window: set its WindowCenter and WindowWidth"
DEEP = "more than 8 bits per channel (`pipeline` clips them at 255): convert as README shows"


@functools.cache
def register() -> None:
    """Let Pillow read what it does not by itself: HEIC and DICOM, where the packages for them are."""
    PIL.Image.init()
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # what is too large is left out
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    if importlib.util.find_spec("pydicom"):  # imported with the first such file: it takes its time
        PIL.Image.register_open("DICOM", open_dicom)
        PIL.Image.register_extensions("DICOM", [".dcm", ".dicom"])


@functools.cache
def readable_endings() -> frozenset[str]:
    """Return the file endings, in small letters, of all kinds of images that are read here."""
    register()
    endings = {ending for ending, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    return frozenset(endings - {".h5", ".hdf"} | {".mpo"})


def judge(path: str, endings: Set[str]) -> str | None:
    """Return "" for an image, a reason for an image that cannot be used, None for any other file.

    Files with one of `endings` (see `readable_endings`) are not opened; of others the content decides.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending in endings:
        return ""
    if ending == ".gz" and path.lower().endswith(".nii.gz"):
        return why_unread(".nii.gz")
    head = b""
    if os.path.isfile(path):
        try:
            with open(path, "rb") as file:
                head = file.read(1024)
        except PermissionError:
            return LOCKED
    return judge_content(head, ending, path)


def judge_content(head: bytes, ending: str, path: str) -> str | None:
    """Return what `judge` does, of a file's first 1,024 bytes and its ending."""
    if head[128:132] == b"DICM":
        return None if DICOMDIR in head else "" if "DICOM" in PIL.Image.OPEN else why_unread("DICOM")
    if head[4:12] in HEIC_BRANDS and b"avif" not in head[:64]:
        return "" if "HEIF" in PIL.Image.OPEN else why_unread("HEIC")
    start = head[:16].ljust(16, b"\0")
    kinds = [name for name, (_, accept) in PIL.Image.OPEN.items() if accept and accept(start) is True]
    if ending in OTHER_IMAGES and (not kinds or kinds == ["TIFF"]):
        return why_unread(ending)
    if {*kinds} & {*CERTAIN}:
        return ""
    with suppress(Exception):  # a text may begin as a PPM does, by chance: then it fails, in one way or other
        if kinds:
            PIL.Image.open(path, formats=kinds).load()
            return ""
    return None


def why_unread(kind: str) -> str:
    """Return why images with an ending, or of a kind, are left out."""
    if package := OTHER_READERS.get(kind := KIND_OF.get(kind, kind)):
        return f"{kind}: needs `pip install {package}`"
    return f"{kind}: Pillow cannot read it"


def frames_of(image: PIL.Image.Image) -> int:
    """Return how many frames or pages an image has; the parts of a phone's photo (MPO) are no frames."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def sample_bits(image: PIL.Image.Image, content: bytes) -> int:
    """Return how many bits a sample has in the file `content`, which Pillow has opened as `image`.

    For RGB, Pillow keeps the top 8 bits of a sample, so 12 bits stored in 16 turn black. Formats whose depth
    it does not tell (AVIF, HEIC) use all their bits: they count as 8.
    """
    if image.mode[0] in "IF":  # I, I;16 and F
        return 16
    if image.format == "PNG":
        return content[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(PIL.TiffImagePlugin.BITSPERSAMPLE, (1,)))
    if image.format == "JPEG2000":
        start = content.find(b"\xff\x4f\xff\x51")  # SOC and SIZ, with which its codestream begins
        samples = int.from_bytes(content[start + 40 : start + 42])
        return max((bits & 127) + 1 for bits in content[start + 42 : start + 42 + 3 * samples : 3])
    if image.format == "SGI":
        return 8 * content[3]
    if image.format == "PPM" and isinstance(image.tile[0][3], tuple):
        return max(8, int(image.tile[0][3][1]).bit_length())  # its largest value
    return 8


def is_huffman(jpeg: bytes) -> bool:
    """Say whether a JPEG is baseline or progressive, in Huffman's code, as nearly all are.

    Whether others can be read (arithmetic code, lossless) differs from one build of the decoder to the next.
    """
    place, frames = 2, {0xC0 + kind for kind in range(16)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
    while place < len(jpeg) - 4 and jpeg[place] == 0xFF and jpeg[place + 1] not in frames:
        filling = jpeg[place + 1] == 0xFF
        place += 1 if filling else 2 + int.from_bytes(jpeg[place + 2 : place + 4])
    return jpeg[place : place + 2] in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2")


def open_dicom(file: IO[bytes], name: str | bytes) -> PIL.Image.Image:
    """Return the first frame of a DICOM file, as the opener of a Pillow plugin: 8 bits, if it has a window.

    Raises SyntaxError, as Pillow asks for, if it is none, ValueError if it cannot be decoded.
    """
    if file.read(132)[128:] != b"DICM":
        raise SyntaxError("not a DICOM file")
    file.seek(0)
    try:
        import pydicom

        dataset = pydicom.dcmread(file)
        image = PIL.Image.fromarray(render_dicom(dataset))
    except Exception as problem:  # of any kind, by what is wrong or missing in there
        raise ValueError(" ".join(str(problem).split())) from problem
    image.format, image.n_frames = "DICOM", int(dataset.get("NumberOfFrames") or 1)
    return image


def render_dicom(dataset: Any) -> np.ndarray:
    """Return the first frame: uint8 (height, width) or (height, width, 3), else uint16 (height, width).

    Grey values go through the file's own look-up table or window; MONOCHROME1, where 0 is white, is inverted.
    What has more than 8 bits and no window stays uint16, and is left out for that (of colours, the red
    channel only).
    """
    from pydicom.pixels import apply_color_lut, pixel_array

    frame, kind, bits = pixel_array(dataset, index=0), dataset.PhotometricInterpretation, dataset.BitsStored
    if kind == "PALETTE COLOR":
        frame = apply_color_lut(frame, dataset)
        return (frame >> 8 * (frame.itemsize - 1)).astype(np.uint8)  # a palette spreads over all its bits
    if not kind.startswith("MONOCHROME"):
        return frame.astype(np.uint8) if bits <= 8 else frame[..., 0].astype(np.uint16)
    if not (dataset.get("VOILUTSequence") or dataset.get("WindowWidth")) and bits > 8:
        return frame.astype(np.uint16)
    grey, black, white = apply_window(frame, dataset)
    grey = np.clip(np.rint((grey.astype(float) - black) * 255 / (white - black)), 0, 255).astype(np.uint8)
    return 255 - grey if kind == "MONOCHROME1" else grey


def apply_window(frame: np.ndarray, dataset: Any) -> tuple[np.ndarray, float, float]:
    """Return a grey frame, integer (height, width), as it is to be shown, and its black and white."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    if dataset.get("VOILUTSequence"):
        size = dataset.VOILUTSequence[0].LUTDescriptor
        white, size[2] = 2 ** size[2] - 1, 16  # with 8 bits, pydicom cuts what it looks up to 8 bits, too
        return apply_voi(apply_modality_lut(frame, dataset), dataset), 0, white
    if dataset.get("WindowWidth"):
        with np.errstate(over="ignore"):  # it may be a sigmoid: far below and above it are black and white
            black, white = apply_windowing(np.array([-1e15, 1e15]), dataset)
            return apply_windowing(apply_modality_lut(frame, dataset), dataset), black, white
    half = 2 ** (dataset.BitsStored - 1)
    return frame, *((-half, half - 1) if dataset.PixelRepresentation else (0, 2 * half - 1))
