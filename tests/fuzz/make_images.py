"""Image files, Pillow images, arrays and tensors that try to break whoever opens them.

`expected` is the RGB picture that must come out (`(height, width, 3)` uint8, made without the code under test),
`refused` says that only an error is right; without both, an error or a well-formed result is.
"""

import base64
import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, features

from fuzz.harness import Place, Subject
from fuzz.make_arrays import make_array, make_tensor
from fuzz.wild import mutate_bytes, wild


FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "DIB", "SGI", "IM", "DDS", "QOI", "SPIDER"]
FORMATS += [
    name for name, need in (("WEBP", "webp"), ("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(need)
]
ORIENTATION = 0x0112
PLANNERS = ("slime", "slime_release", "multiple", "hd", "llava_next")


def pixels(rng: random.Random, height: int = 0, width: int = 0, channels: int = 3) -> np.ndarray:
    """Blocks of colour, so that every format compresses it and no two corners look alike."""
    height, width = height or rng.randrange(8, 60), width or rng.randrange(8, 60)
    source = np.random.default_rng(rng.randrange(1 << 32))
    blocks = source.integers(0, 256, (-(-height // 4), -(-width // 4), channels), dtype=np.uint8)
    array = blocks.repeat(4, 0).repeat(4, 1)[:height, :width]
    return array if channels > 1 else array[:, :, 0]


def encode(picture: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def an_image(rng: random.Random) -> bytes:
    """A sound file of any format, some with palettes, alpha, few bits or several frames."""
    form = rng.choice(FORMATS)
    picture = Image.fromarray(pixels(rng))
    options: dict[str, Any] = {}
    if form == "SPIDER":
        picture = picture.convert("F")
    elif form in ("PNG", "GIF", "TIFF", "WEBP"):
        modes = ["RGB", "RGBA"] if form == "WEBP" else ["RGB", "P", "L", "1", "RGBA", "LA"]
        picture = picture.convert(rng.choice(modes))
        if rng.random() < 0.3:
            options = {"save_all": True, "append_images": [picture.copy() for _ in range(rng.randrange(1, 5))]}
    elif form == "JPEG":
        picture = picture.convert(rng.choice(["RGB", "L", "CMYK"]))
        options = rng.choice([{}, {"progressive": True}, {"icc_profile": rng.randbytes(300)}, {"comment": b"x" * 99}])
    return encode(picture, form, **options)


def damaged(rng: random.Random, place: Place) -> Subject:
    """A sound file of any format, then flipped, cut, filled, doubled."""
    name, data = mutate_bytes(an_image(rng), rng)
    return Subject(f"damaged: {name}", data)


def spliced(rng: random.Random, place: Place) -> Subject:
    """The head of one file before the tail of another."""
    first, second = an_image(rng), an_image(rng)
    return Subject("spliced", first[: rng.randrange(len(first))] + second[rng.randrange(len(second)) :])


# ---- PNG, chunk by chunk


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk with its right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header: bytes, extra: bytes = b"", body: bytes = b"") -> bytes:
    """A file with any header, any chunks after it, and a body."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_header(rng: random.Random, place: Place) -> Subject:
    """Sizes, depths, colours and interlacing that cannot be, over a small body."""
    sizes = [0, 1, 7, 40, 3000, 65_536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
    width, height = rng.choice(sizes), rng.choice(sizes)
    kinds = [rng.choice([0, 1, 2, 4, 8, 16, 255]), rng.choice([0, 2, 3, 4, 6, 200]), 0, rng.choice([0, 0, 9])]
    header = struct.pack(">IIBBBBB", width, height, *kinds, rng.choice([0, 1, 77]))
    return Subject("png header", png(header, body=zlib.compress(rng.randbytes(200))))


def png_bomb(rng: random.Random, place: Place) -> Subject:
    """A few kilobytes that become millions of pixels: above the limit of the processor, and refused unseen."""
    width, height = rng.choice([(30_000, 30_000), (5000, 5000), (4_100_000, 1), (1, 4_100_000), (100_000, 100)])
    row = b"\0" * (1 + -(-width // 8))
    body = zlib.compressobj(9)
    rows = min(height, 2000)
    data = b"".join(body.compress(row) for _ in range(rows)) + body.flush()
    return Subject("png bomb", png(struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), body=data), refused=True)


def png_chunks(rng: random.Random, place: Place) -> Subject:
    """Profiles, texts, EXIF and animation chunks full of noise around sound pixels, which come out unless refused."""
    array = pixels(rng)
    data = encode(Image.fromarray(array), "PNG")
    bomb = zlib.compress(b"\0" * (3 << 20))
    kinds = {
        b"iCCP": [b"name\0\0" + zlib.compress(rng.randbytes(500)), b"name\0\0" + bomb, b"\0", b"x" * 90],
        b"zTXt": [b"key\0\0" + bomb, b"key\0\0" + rng.randbytes(40), b"key"],
        b"iTXt": [b"XML:com.adobe.xmp\0\1\0\0\0" + bomb, b"key\0\1\0en\0\0" + rng.randbytes(30), b""],
        b"eXIf": [
            rng.randbytes(60),
            b"",
            b"II*\0\x08\0\0\0" + b"\xff" * 40,
            b"MM\0*\0\0\0\x08\0\1" + rng.randbytes(12),
        ],
        b"acTL": [struct.pack(">II", count, 0) for count in (0, 1, 5, (1 << 32) - 1)],
        b"fcTL": [rng.randbytes(26), b""],
        b"pHYs": [rng.randbytes(9), b"\0" * 9],
        b"gAMA": [b"\0\0\0\0", b"\xff" * 4],
        b"cHRM": [rng.randbytes(32)],
        b"tEXt": [b"Comment\0" + b"x" * 100_000, b"\0"],
        b"sRGB": [b"\xff"],
        b"PLTE": [rng.randbytes(30)],
        rng.choice([b"abcD", b"aBCd"]): [rng.randbytes(99)],
    }
    extra = b"".join(chunk(kind, rng.choice(kinds[kind])) for kind in rng.sample(sorted(kinds), rng.randrange(1, 4)))
    where = 33 if rng.random() < 0.7 else len(data) - 12
    return Subject("png chunks", data[:where] + extra + data[where:], expected=array)


# ---- EXIF and profiles


def turned(array: np.ndarray, orientation: Any) -> np.ndarray:
    """What a viewer shows of a picture with that EXIF orientation."""
    ways: dict[Any, Callable] = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }
    return ways.get(orientation, lambda a: a)(array)


def orientation(rng: random.Random, place: Place) -> Subject:
    """Every orientation, and numbers that are none."""
    array, value = pixels(rng), rng.choice([*range(1, 9), *range(1, 9), 0, 9, 255, 65_535])
    exif = Image.Exif()
    exif[ORIENTATION] = value
    form = rng.choice(["PNG", "TIFF"])
    return Subject(f"orientation in {form}", encode(Image.fromarray(array), form, exif=exif), turned(array, value))


def exif_noise(rng: random.Random, place: Place) -> Subject:
    """EXIF with wrong types, counts and offsets, in formats that carry it."""
    array = pixels(rng)
    exif = Image.Exif()
    exif[ORIENTATION] = rng.randrange(1, 9)
    data = bytearray(exif.tobytes())
    entries = [
        struct.pack("<HHII", tag, kind, count, at)
        for tag in (ORIENTATION, 0x8769, 0x8825, 0x0132, 0xA005)
        for kind in [rng.choice([0, 1, 2, 3, 4, 5, 7, 9, 10, 12, 13, 99])]
        for count in [rng.choice([0, 1, 2, 1000, (1 << 32) - 1])]
        for at in [rng.choice([0, 1, 8, 6, 0xFFFFFFFF, rng.randrange(1 << 16)])]
    ]
    noise = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + rng.choice([b"", b"\x08\0\0\0"])
    if rng.random() < 0.4:
        for _ in range(4):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        noise = bytes(data)
    prefix = rng.choice([b"", b"Exif\0\0"])
    if rng.random() < 0.5:
        sound = encode(Image.fromarray(array), "PNG")
        return Subject("exif noise in PNG", sound[:33] + chunk(b"eXIf", prefix + noise) + sound[33:])
    return Subject("exif noise in JPEG", encode(Image.fromarray(array), "JPEG", exif=b"Exif\0\0" + noise))


def profile_noise(rng: random.Random, place: Place) -> Subject:
    """ICC profiles that are none: they say nothing, so the pixels stay."""
    array, form = pixels(rng), rng.choice(["PNG", "TIFF"])
    profile = rng.choice([rng.randbytes(200), b"\0" * 200, b"acsp" * 60, b""])
    return Subject(f"profile in {form}", encode(Image.fromarray(array), form, icc_profile=profile), array)


# ---- other headers


def jpeg_header(rng: random.Random, place: Place) -> Subject:
    """A frame header with other sizes, precision and components."""
    data = bytearray(encode(Image.fromarray(pixels(rng)), "JPEG"))
    start = data.index(b"\xff\xc0")
    sizes = [0, 1, 9, 5000, 65_535]
    data[start + 4 : start + 9] = struct.pack(
        ">BHH", rng.choice([0, 8, 12, 255]), rng.choice(sizes), rng.choice(sizes)
    )
    if rng.random() < 0.5:
        data[start + 9] = rng.choice([0, 1, 4, 255])
    return Subject("jpeg header", bytes(data))


def bmp_header(rng: random.Random, place: Place) -> Subject:
    """Negative and absurd sizes, depths, palettes and offsets."""
    data = bytearray(encode(Image.fromarray(pixels(rng)), "BMP"))
    for offset, kind, values in (
        (10, "<I", [0, 14, 54, 1 << 31]),
        (14, "<I", [0, 12, 40, 64, 108, 124, 1 << 20]),
        (18, "<i", [0, 1, -20, 3000, (1 << 31) - 1, -(1 << 31)]),
        (22, "<i", [0, 1, -20, 3000, (1 << 31) - 1, -(1 << 31)]),
        (28, "<H", [0, 1, 2, 4, 8, 16, 24, 32, 64]),
        (30, "<I", [0, 1, 2, 3, 4, 99]),
        (46, "<I", [0, 2, 256, 1 << 31]),
    ):
        if rng.random() < 0.35:
            struct.pack_into(kind, data, offset, rng.choice(values))
    return Subject("bmp header", bytes(data))


def tiff_tags(rng: random.Random, place: Place) -> Subject:
    """Tags that lie about sizes, samples, strips, tiles and the next page."""
    data = bytearray(encode(Image.fromarray(pixels(rng)), "TIFF"))
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    for _ in range(rng.choice([1, 1, 2, 3])):
        entry = first + 2 + 12 * rng.randrange(count)
        values = [0, 1, 3, 8, 255, 30_000, 65_536, (1 << 31) - 1, (1 << 32) - 1]
        kind = rng.randrange(3)
        if kind == 0:
            struct.pack_into("<HI", data, entry + 2, rng.randrange(14), rng.choice(values))
        elif kind == 1:
            struct.pack_into(
                "<H", data, entry, rng.choice([256, 257, 258, 259, 262, 273, 277, 279, 322, 323, 338, 320])
            )
        else:
            struct.pack_into("<I", data, entry + 8, rng.choice(values))
    if rng.random() < 0.3:
        struct.pack_into("<I", data, first + 2 + 12 * count, rng.choice([first, 8, 1, 1 << 30]))
    return Subject("tiff tags", bytes(data))


def gif_screen(rng: random.Random, place: Place) -> Subject:
    """A screen and frames of other sizes than the pixels, hundreds of frames, no palette."""
    frames = [Image.fromarray(pixels(rng, 12, 12)).convert("P") for _ in range(rng.choice([1, 2, 300]))]
    data = bytearray(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    struct.pack_into("<HH", data, 6, rng.choice([0, 1, 12, 3000, 65_535]), rng.choice([0, 1, 12, 3000, 65_535]))
    block = data.find(b",", 13)
    if block > 0 and rng.random() < 0.7:
        struct.pack_into("<HHHH", data, block + 1, *(rng.choice([0, 1, 12, 3000, 65_535]) for _ in range(4)))
    if rng.random() < 0.3:
        data[10] &= 0x7F
    return Subject("gif screen", bytes(data))


def ico_inside(rng: random.Random, place: Place) -> Subject:
    """An icon whose directory names another size than the PNG in it: the limit holds for what is decoded."""
    side = rng.choice([20, 2500, 6000])
    inner = encode(Image.new("1", (side, side)), "PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return Subject("ico inside", struct.pack("<HHH", 0, 1, 1) + entry + inner, refused=side * side > 4_000_000)


def psd(array: np.ndarray, layers: int, depth: int = 8, mode: int = 3) -> bytes:
    """A layered file: raw channels of the whole picture, and layers of one pixel each."""
    height, width = array.shape[:2]
    records, data = b"", b""
    for _ in range(layers):
        channels = b"".join(struct.pack(">hI", channel, 3) for channel in range(3))
        records += struct.pack(">iiiiH", 0, 0, 1, 1, 3) + channels + b"8BIMnorm\xff\0\0\0" + struct.pack(">I", 12)
        records += struct.pack(">II", 0, 0) + b"\3abc"
        data += (b"\0\0" + b"\x80") * 3
    info = struct.pack(">h", layers) + records + data
    info += b"\0" * (len(info) % 2)
    section = struct.pack(">I", len(info)) + info + struct.pack(">I", 0) if layers else b""
    header = b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, height, width, depth, mode)
    body = b"\0\0" + b"".join(array[:, :, channel].tobytes() for channel in range(3))
    return header + struct.pack(">II", 0, 0) + struct.pack(">I", len(section)) + section + body


def layered(rng: random.Random, place: Place) -> Subject:
    """Photoshop files: all layers together are the picture; then with noise in them."""
    array = pixels(rng)
    data = psd(array, rng.choice([0, 1, 2, 5]))
    if rng.random() < 0.5:
        return Subject("layered", data, array)
    return Subject("layered, damaged", mutate_bytes(data, rng)[1])


def program(rng: random.Random, place: Place) -> Subject:
    """PostScript, which Pillow would hand to another program, and other files that are no pictures."""
    postscript = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"
        b"(" + str(place.marker).encode() + b") (w) file (x) writestring\nshowpage\n%%EOF\n"
    )
    binary = struct.pack("<IIIIIIIHxx", 0xC6D3D0C5, 32, len(postscript), 0, 0, 0, 0, 0) + postscript
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    value = rng.choice(
        [postscript, binary, svg, b"%PDF-1.4\n", b"\x80\x04cos\nsystem\n(S'true'\ntR.", b"GRIB\0\0\0\2", b"BUFR"]
    )
    return Subject("program", value, refused=True)


def frames(rng: random.Random, place: Place) -> Subject:
    """Animations and pages: the first frame is the picture, wherever the file was left open."""
    arrays = [pixels(rng, 24, 30) for _ in range(rng.randrange(2, 6))]
    form, options = rng.choice([("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("GIF", {})])
    if form not in FORMATS:
        form, options = "PNG", {}
    pictures = [Image.fromarray(array) for array in arrays]
    data = encode(pictures[0], form, save_all=True, append_images=pictures[1:], **options)
    expected = None if form == "GIF" else arrays[0]
    if rng.random() < 0.5:
        return Subject(f"frames of {form}", data, expected)
    opened = Image.open(io.BytesIO(data))
    opened.seek(rng.randrange(len(arrays)))
    return Subject(f"frames of {form}, sought", opened, expected, notes={"frame": opened.tell()})


MODES = [
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16",
    "I;16B", "I;16L", "F",
]  # fmt: skip


def modes(rng: random.Random, place: Place) -> Subject:
    """Pillow images of every mode, some with notes in `info` that are not true."""
    mode = rng.choice(MODES)
    size = (rng.randrange(1, 40), rng.randrange(1, 40))
    image = Image.new(mode, size)
    if mode in ("F", "I") and rng.random() < 0.6:
        values = np.random.default_rng(rng.randrange(1 << 32)).uniform(-1, 300, size[::-1])
        image = Image.fromarray(values.astype(np.float32 if mode == "F" else np.int32))
    elif mode not in ("F", "I"):
        image.frombytes(rng.randbytes(len(image.tobytes())))
    if mode in ("P", "PA") and rng.random() < 0.7:
        image.putpalette(rng.randbytes(rng.choice([3, 30, 768])))
    if rng.random() < 0.5:
        image.info["transparency"] = rng.choice([0, 300, -1, b"", b"\0" * 999, (1, 2, 3), (9,) * 9, "x", None, 1.5])
    if rng.random() < 0.2:
        image.info["exif"] = rng.choice([b"", b"noise", b"Exif\0\0MM", rng.randbytes(50)])
    return Subject(f"mode {mode}", image)


SOURCES: list[Any] = [
    "", " ", "\0", "a\0b.png", "\ud800", "x" * 70_000, "file:///etc/passwd", "/etc/passwd", "/dev/zero",
    "/proc/self/mem", "/", ".", "..", "~", "http://[", "https://", "http://127.0.0.1:1/x.png",
    "data:image/png;base64,", "data:image/png,%00", "data:text/html,x", "data:image/svg+xml;base64,PHN2Zz4=",
    b"", bytearray(b"x"), memoryview(b""), None, 3, 2.5, {}, {1}, object, {"path": "x"}, {"bytes": b"x"},
    range(3), iter([]), Image.Image(), Ellipsis,
]  # fmt: skip


def sources(rng: random.Random, place: Place) -> Subject:
    """Paths, addresses, texts and objects that hold no picture."""
    kind = rng.randrange(5)
    if kind == 0:
        data = mutate_bytes(an_image(rng), rng)[1]
        return Subject("base64 of damage", base64.b64encode(data).decode())
    if kind == 1:
        text = base64.b64encode(encode(Image.fromarray(pixels(rng)), "PNG"))
        return Subject("damaged base64", mutate_bytes(text, rng)[1].decode("latin-1"))
    if kind == 2:
        value: Any = Image.fromarray(pixels(rng))
        for _ in range(rng.choice([17, 100, 100_000])):
            value = [value]
        return Subject("nested lists", value, refused=True)
    if kind == 3:
        array = pixels(rng)
        path = place.folder / rng.choice(["a.png", "ü ö.PNG", "x.jpg", "-rf", "a\nb.png"])
        path.write_bytes(encode(Image.fromarray(array), "PNG"))
        return Subject("path", rng.choice([str(path), path]), array)
    return Subject("no source", rng.choice([*SOURCES, wild(rng)]), refused=True)


def by_default_limits(rng: random.Random, place: Place) -> Subject:
    """Sound in every header, with the limits as shipped: long sides and many pixels, few bytes."""
    width, height = rng.choice([(1_000_001, 1), (3, 999_999), (999_999, 2), (170, 60_000), (13_380, 13_380)])
    row, body = b"\0" * (1 + -(-width // 8)), zlib.compressobj(6)
    data = b"".join(body.compress(row) for _ in range(height if width * height < 20_000_000 else 3)) + body.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return Subject("default limits", png(header, body=data), notes={"limits": "default"})


GENERATORS: list[Callable[[random.Random, Place], Subject]] = [
    damaged, damaged, damaged, damaged, damaged, damaged, spliced, png_header, png_header, png_bomb, png_chunks,
    png_chunks, orientation, exif_noise, exif_noise, profile_noise, jpeg_header, bmp_header, bmp_header,
    tiff_tags, tiff_tags, gif_screen, ico_inside, layered, layered, program, frames, frames, modes, modes,
    sources, make_array, make_array, make_array, make_tensor, make_tensor,
]  # fmt: skip
RARE = {97: by_default_limits}
"""Dear ones: one case in so many."""


def make_image(rng: random.Random, number: int, place: Place) -> Subject:
    """Case by case through all generators."""
    rare = [generator for every, generator in RARE.items() if number % every == every - 1]
    subject = (rare or [GENERATORS[number % len(GENERATORS)]])[0](rng, place)
    subject.notes["planner"] = rng.choice(PLANNERS)
    return subject
