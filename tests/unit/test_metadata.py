"""What is not pixels does not stop pixels: broken EXIF, ICC, XMP and text chunks in PNG, JPEG and WebP files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from builders.images import picture
from hires_lmm.processing.image_input_hires_lmm import open_image, to_rgb


PIXELS = picture(20, 30)


def saved(form: str, **options) -> bytes:
    buffer = io.BytesIO()
    PIXELS.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def exif(orientation: int) -> bytes:
    """EXIF with an orientation."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


BOMB = zlib.compress(bytes(3 << 20))
CHUNKS = {
    "a large text": chunk(b"zTXt", b"key\0\0" + BOMB),
    "a large international text": chunk(b"iTXt", b"key\0\1\0en\0key\0" + BOMB),
    "an unknown method": chunk(b"zTXt", b"key\0\7abc"),
    "a wrong checksum": chunk(b"tEXt", b"key\0value", 0),
    "texts of many megabytes": b"".join(chunk(b"tEXt", b"key%d\0" % n + bytes(900_000)) for n in range(80)),
    "a profile without method": chunk(b"iCCP", b"name\0\5abc"),
    "an empty profile": chunk(b"iCCP", b""),
    "a large profile": chunk(b"iCCP", b"name\0\0" + BOMB),
    "a short size": chunk(b"pHYs", b"\0"),
    "a short gamma": chunk(b"gAMA", b"\0"),
    "short chromaticities": chunk(b"cHRM", b"\0"),
    "a short intent": chunk(b"sRGB", b""),
    "noise for EXIF": chunk(b"eXIf", b"\xff" * 20),
    "EXIF in a text": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzzzz"),
    "XMP": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="\xff"/>'),
    "a short animation": chunk(b"acTL", b"\0"),
    "a short frame": chunk(b"fcTL", b"\0\0"),
}
SEGMENTS = {
    "noise for EXIF": segment(0xE1, b"Exif\0\0\xff\xff\xff\xff\xff\0\0\0\x08"),
    "EXIF cut off": segment(0xE1, b"Exif\0\0II*\0"),
    "a short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "a profile of other parts": segment(0xE2, b"ICC_PROFILE\0\5\2abc"),
    "noise for other pictures": segment(0xE2, b"MPF\0garbage"),
    "XMP": segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="\xff"'),
    "a short header": segment(0xE0, b"JFIF"),
    "a short colour": segment(0xEE, b"Adobe"),
    "a short resource": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff"),
}
PNG, JPEG = saved("PNG"), saved("JPEG")
END = PNG.index(b"IEND") - 4
EARLY = {f"PNG, {name}": PNG[:33] + own + PNG[33:] for name, own in CHUNKS.items()}
LATE = {f"PNG, {name} at the end": PNG[:END] + own + PNG[END:] for name, own in CHUNKS.items()}
OTHERS = {
    "WebP, noise for EXIF": saved("WEBP", lossless=True, exif=b"\xff" * 20),
    "WebP, noise for a profile": saved("WEBP", lossless=True, icc_profile=b"garbage"),
    "WebP, XMP": saved("WEBP", lossless=True, xmp=b"\xff\xfe"),
    "TIFF, noise for a profile": saved("TIFF", icc_profile=b"garbage"),
}
LOSSLESS = {**EARLY, **LATE, **OTHERS}
JPEGS = {f"JPEG, {name}": JPEG[:2] + own + JPEG[2:] for name, own in SEGMENTS.items()}


def read(source) -> np.ndarray:
    return np.asarray(to_rgb(open_image(source, 0), 0))


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
@pytest.mark.parametrize("name", [*LOSSLESS, *JPEGS])
def test_the_pixels_are_those_of_the_sound_file(name, tmp_path):
    """From bytes, from a path, from what Pillow opened, and from what it decoded as far as it does both."""
    data = LOSSLESS.get(name, JPEGS.get(name))
    wanted = np.asarray(PIXELS) if name in LOSSLESS else np.asarray(Image.open(io.BytesIO(JPEG)))
    (tmp_path / "file").write_bytes(data)
    sources = [data, str(tmp_path / "file")]
    for finish in (lambda image: image, lambda image: image.convert("RGB"), lambda image: image.copy()):
        try:
            sources.append(finish(Image.open(io.BytesIO(data))))
        except Exception:  # Pillow itself goes no further
            break
    assert all((read(source) == wanted).all() for source in sources)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_sound_orientation_counts_beside_what_is_broken(form):
    if form == "PNG":
        data = PNG[:33] + CHUNKS["a large text"] + chunk(b"eXIf", exif(6)) + PNG[33:]
    else:
        own = SEGMENTS["a short profile"] + segment(0xE1, b"Exif\0\0" + exif(6))
        data = JPEG[:2] + own + JPEG[2:]
    sound = np.asarray(Image.open(io.BytesIO(PNG if form == "PNG" else JPEG)))
    assert (read(data) == np.rot90(sound, -1)).all()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
RAW = b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (26, exif(6).hex().encode())
TURNED = {
    "PNG, EXIF": PNG[:33] + chunk(b"eXIf", exif(6)) + PNG[33:],
    "PNG, EXIF in a text": PNG[:33] + chunk(b"tEXt", RAW) + PNG[33:],
    "PNG, XMP": PNG[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + PNG[33:],
    "JPEG, EXIF": JPEG[:2] + segment(0xE1, b"Exif\0\0" + exif(6)) + JPEG[2:],
    "JPEG, XMP": JPEG[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP) + JPEG[2:],
    "WebP, EXIF": saved("WEBP", lossless=True, exif=exif(6)),
}


@pytest.mark.parametrize("name", TURNED)
def test_an_upright_picture_is_not_turned_once_more(name):
    """Whoever opens an image himself passes it on to the processor."""
    upright = to_rgb(open_image(TURNED[name], 0), 0)
    assert upright.size == PIXELS.size[::-1]
    assert np.array_equal(np.asarray(to_rgb(upright, 0)), np.asarray(upright))


def test_transparency_is_no_metadata():
    """A palette with transparent entries beside a text that cannot be read."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((0, 0), 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    data = buffer.getvalue()
    place = data.index(b"IDAT") - 4
    found = read(data[:place] + CHUNKS["a wrong checksum"] + data[place:])
    assert found[0, 0].tolist() == [255, 255, 255] and found[1, 1].tolist() == [200, 10, 10]


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damaged_pixels_are_an_error_whatever_stands_behind_them(damage):
    start = PNG.index(b"IDAT") + 400
    pixels = PNG[:start] if damage == "cut" else PNG[:start] + bytes(200) + PNG[start + 200 : END]
    for tail in (b"", CHUNKS["a large text"] + PNG[END:]):
        with pytest.raises(ValueError, match="truncated or damaged"):
            read(pixels + tail)
