"""Whatever a user calls an image, as an upright 8-bit RGB Pillow image, or an error that says what is wrong."""

import base64
import binascii
from io import BytesIO
from os import PathLike, path
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageCms
from transformers.image_utils import ChannelDimension


DEFAULT_PIXEL_LIMIT = 178_956_970
"""The size from which Pillow itself refuses a file."""

SIDE_LIMIT = 1_000_000
"""Longest side of an image, pixels: a filter of Pillow holds up to 48 bytes for each pixel of a side."""

PROGRAM_FORMATS = ("EPS",)
"""Formats that Pillow decodes by starting another program (Ghostscript) on the file."""

EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright. `ImageOps.exif_transpose` also writes EXIF, and fails where the
other tags cannot be written."""

ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""What of an image's `info` names an orientation; with it, an upright image would be turned once more."""

ARRAY_CHANNELS = (1, 3, 4)


def flatten_images(images: Any) -> list:
    """Nested lists and 4-d arrays as a list of single images, untouched, in order; None is no image."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [] if images is None else [images]


def flatten_budgets(budget: Any, images: Any) -> list:
    """One budget an image, in the order of `flatten_images`: one for all, one each, or nested as the images are."""
    number = len(flatten_images(images))
    if not isinstance(budget, (list, tuple)):
        return [budget] * number
    is_nested = any(isinstance(own, (list, tuple)) for own in budget) and isinstance(images, (list, tuple))
    if len(budget) != (len(images) if is_nested else number):
        raise ValueError(
            f"max_image_tokens={budget!r} holds {len(budget)} budgets for {len(images) if is_nested else number} "
            f"{'samples' if is_nested else 'images'}; pass one number for all images, or one for each."
        )
    if is_nested:
        return [one for own, part in zip(budget, images, strict=True) for one in flatten_budgets(own, part)]
    return list(budget)


def open_image(source: Any, index: int) -> Any:
    """A path, URL, base64 text, data URL or bytes as a Pillow image, not decoded yet; anything else is passed on.

    Source: the sources of transformers' `load_image` and the dicts of `datasets`. Differs: alpha and bit depth stay
        for `to_rgb`.
    """
    if isinstance(source, dict) and source.keys() and source.keys() <= {"bytes", "path"}:
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (str, PathLike)):
        shown = str(source) if len(str(source)) <= 120 else str(source)[:117] + "..."
        data = _read(str(source), shown, index)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        shown = f"{len(data)} bytes"
    else:
        return source
    if not data:
        raise ValueError(f"Image {index}: {shown!r} is empty; pass the bytes of an image file.")
    try:
        return open_bytes(data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"Image {index}: {shown!r} is refused by Pillow ({error}); shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS "
            f"and pixel_limit if you trust it."
        ) from error
    except Exception as error:
        raise ValueError(f"Image {index}: {shown!r} is not an image ({error}); replace it.") from error


def to_rgb(
    image: Any,
    index: int,
    background: tuple[int, int, int] = (255, 255, 255),
    pixel_limit: int = DEFAULT_PIXEL_LIMIT,
    input_data_format: str | None = None,
    unit_floats: bool = True,
) -> Image.Image:
    """An image of any kind as an upright RGB image of 8 bit.

    A Pillow image of any mode or an array (numpy or torch) of shape `(height, width)`, `(height, width, channels)` or
    `(channels, height, width)` with 1, 3 or 4 channels. Floats up to 1 are taken as [0, 1] (`unit_floats`), others as
    [0, 255]; 16-bit integers, and wider ones that exceed 255, are scaled from 65535. EXIF orientation is applied; the
    frame at which an opened animation stands is taken, of a file the first; of a file of layers, all together.
    `background` is the colour under transparent pixels; `index` is named in errors.
    """
    picture = to_picture(image, index, background, pixel_limit, input_data_format, unit_floats)
    return picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))


def to_picture(
    image: Any,
    index: int,
    background: tuple[int, int, int],
    pixel_limit: int,
    input_data_format: str | None,
    unit_floats: bool,
) -> Image.Image | np.ndarray:
    """As `to_rgb`; an array of three channels stays one, `(height, width, 3)` of 8 bit, where it lies in memory."""
    if isinstance(image, Image.Image):
        check_size(image.height, image.width, index, pixel_limit)
        upright = _upright(image, index)
        check_size(upright.height, upright.width, index, pixel_limit)  # some formats know their size when decoded
        return _pillow_to_rgb(upright, index, background, unit_floats)
    if isinstance(image, torch.Tensor):
        image = _tensor_to_numpy(image, index)
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"Image {index} is a {type(image).__name__}; pass a PIL image, an array, a tensor, a path, a URL or bytes."
        )
    if image.dtype.kind not in "biuf" or isinstance(image, np.ma.MaskedArray):
        kind = "a masked array" if isinstance(image, np.ma.MaskedArray) else f"an array of {image.dtype}"
        raise ValueError(f"Image {index} is {kind}; pass integers or floats.")
    array = _channels_last(image, index, input_data_format)
    check_size(array.shape[0], array.shape[1], index, pixel_limit)
    if array.dtype == np.uint16 and 0 < int(array.max()) <= 255:
        raise ValueError(
            f"Image {index} is an array of uint16 with values up to {int(array.max())}: 8 bits, or a nearly black "
            "picture of 16? Pass array.astype(numpy.uint8), or scale it to 0..65535."
        )
    eight_bit = _to_eight_bit(array, index, unit_floats)
    if eight_bit.ndim == 3 and eight_bit.shape[2] == 3:
        return eight_bit
    if eight_bit.ndim == 3 and eight_bit.shape[2] == 1:
        eight_bit = eight_bit[:, :, 0]
    return _pillow_to_rgb(Image.fromarray(np.ascontiguousarray(eight_bit)), index, background, unit_floats)


def mean_color(image_mean: Any) -> tuple[int, ...]:
    """The mean of a tower's pixels as a colour, rounded down as LLaVA does."""
    channels = np.broadcast_to(np.asarray(image_mean, dtype=np.float64), (3,)).tolist()
    return tuple(int(min(max(255 * channel, 0), 255)) for channel in channels)


def pad_to_square(picture: Image.Image, color: tuple[int, ...], pixel_limit: int, index: int) -> Image.Image:
    """A picture in the middle of a square of a colour; the error names its index."""
    side = max(picture.size)
    if picture.height == picture.width:
        return picture
    if side**2 > pixel_limit:
        raise ValueError(
            f"Image {index} of {picture.height}x{picture.width} pixels would stand on a square of {side**2} pixels, "
            f"more than pixel_limit={pixel_limit}; shrink it, or leave out square='pad'."
        )
    square = Image.new("RGB", (side, side), color)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def crop_to_square(picture: Image.Image, side: int, resample: int | None) -> Image.Image:
    """The middle of a picture whose short side is resized to a length, as CLIP's image processor cuts it."""
    short, filtered = min(picture.size), Image.Resampling.BICUBIC if resample is None else Image.Resampling(resample)
    width, height = (side * length // short for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    if width * height <= DEFAULT_PIXEL_LIMIT:
        return picture.resize((width, height), filtered).crop((left, top, left + side, top + side))
    across, down = picture.width / width, picture.height / height  # a strip, of which only the middle is resized
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    return picture.resize((side, side), filtered, box=box)


def _read(source: str, shown: str, index: int) -> bytes:
    """The bytes of an address, a file or a base64 text."""
    try:
        if source.startswith(("http://", "https://")):
            response = get_session().get(source, follow_redirects=True, timeout=60)
            response.raise_for_status()
            return response.content
        if path.isfile(source):
            with open(source, "rb") as file:
                return file.read()
    except Exception as error:  # of many kinds
        raise ValueError(f"Image {index}: {shown!r} cannot be fetched ({error}); check the address.") from error
    encoded = source.split(",", 1)[-1] if source.startswith("data:image/") else source
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"Image {index}: {shown!r} is no URL (http:// or https://), no existing file and no base64 text; "
            f"correct it or pass the image itself."
        ) from error


def open_bytes(data: bytes) -> Image.Image:
    """Open an image file; metadata before its pixels that cannot be read are left out."""
    try:
        return Image.open(BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception:
        return Image.open(BytesIO(_without_metadata(data)))


def _without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG file without what says nothing about its pixels; only the orientation stays."""
    kept, place = [], 0
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kept, place = [data[:8]], 8
        while place + 12 <= len(data):
            chunk = data[place : place + 12 + int.from_bytes(data[place : place + 4], "big")]
            kind, sound = chunk[4:8], binascii.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
            if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and sound):
                kept.append(chunk)
            place += len(chunk)
    elif data.startswith(b"\xff\xd8\xff"):
        kept, place = [data[:2]], 2
        while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] not in (b"\xda", b""):
            marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
            is_application, is_color = 0xE0 <= marker <= 0xEF, marker == 0xEE and length >= 14
            if is_color or marker == 0xE1 or not (is_application or marker == 0xFE):
                kept.append(data[place : place + 2 + length])
            place += 2 + length
    return b"".join(kept) + data[place:]


def check_size(height: int, width: int, index: int, pixel_limit: int) -> None:
    """Refuse a picture that is empty, too large or too long."""
    if height < 1 or width < 1:
        raise ValueError(f"Image {index} is empty: {height}x{width} pixels; both sides must be at least 1.")
    if height * width > pixel_limit:
        raise ValueError(
            f"Image {index} has {height}x{width} = {height * width} pixels, more than pixel_limit={pixel_limit}; "
            f"shrink it or raise pixel_limit."
        )
    if max(height, width) > SIDE_LIMIT:
        raise ValueError(
            f"Image {index} has {height}x{width} pixels, a side of more than {SIDE_LIMIT}; cut it into several images."
        )


def _upright(image: Image.Image, index: int) -> Image.Image:
    if image.format in PROGRAM_FORMATS and getattr(image, "tile", None):
        raise ValueError(
            f"Image {index} is an {image.format} file, which Pillow decodes by starting another program; this is "
            "refused. Convert it to PNG."
        )
    try:
        image = _decoded(image)
    except Exception as error:
        raise ValueError(
            f"Image {index} cannot be decoded ({error}); it is truncated or damaged, replace it."
        ) from error
    turn = TURNS.get(orientation(image) or 1)
    if turn is None:
        return image
    upright = image.transpose(turn)
    for name in ORIENTED:
        upright.info.pop(name, None)
    return upright


def _decoded(image: Image.Image) -> Image.Image:
    """The image with all its pixels; metadata behind them that cannot be read are left out."""
    try:
        image.load()
    except Exception:
        file = getattr(image, "fp", None)
        if file is None or file.closed:
            raise
        file.seek(0)
        image = Image.open(BytesIO(_without_metadata(file.read())))
        image.load()
    return image


def orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, as far as it can be read."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # each kind of damage raises another type
        return None
    return orientation if isinstance(orientation, int) else None


def _pillow_to_rgb(image: Image.Image, index: int, background: tuple[int, int, int], unit_floats: bool) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_eight_bit(np.asarray(image), index, unit_floats)).convert("RGB")
    try:
        if image.has_transparency_data:
            return _over_background(image, background)
        if image.mode == "LAB":
            lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            return ImageCms.buildTransform(lab, rgb, "LAB", "RGB").apply(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise ValueError(f"Image {index} of mode {image.mode!r} has no conversion to RGB ({error}).") from error


def _over_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    result = Image.new("RGB", image.size, background)
    result.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return result


def _tensor_to_numpy(tensor: torch.Tensor, index: int) -> np.ndarray:
    try:
        values = tensor.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy(force=True)
    except Exception as error:  # sparse, quantised, without memory, ...
        kind = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
        raise ValueError(
            f"Image {index} is a tensor of {kind}, which has no values to read ({error}); pass integers or floats."
        ) from error


def _channels_last(array: np.ndarray, index: int, data_format: str | None) -> np.ndarray:
    if array.ndim == 2:
        return array
    axes = {ChannelDimension.FIRST: 0, ChannelDimension.LAST: 2}
    if data_format is not None:
        axes = {ChannelDimension(data_format): axes[ChannelDimension(data_format)]}
    possible = [axis for axis in axes.values() if array.ndim == 3 and array.shape[axis] in ARRAY_CHANNELS]
    if len(possible) > 1:
        raise ValueError(
            f"Image {index} has shape {array.shape}, of which the first or the last number may be the channels; pass "
            "input_data_format='channels_first' or 'channels_last'."
        )
    if not possible:
        where = f" in the order {ChannelDimension(data_format).value!r}" if data_format is not None else ""
        raise ValueError(
            f"Image {index} has shape {array.shape}: it must have 2 dimensions, or 3 with 1, 3 or 4 channels{where}."
        )
    return array.transpose(1, 2, 0) if possible[0] == 0 else array


def _to_eight_bit(array: np.ndarray, index: int, unit_floats: bool) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    is_float, lowest, highest = array.dtype.kind == "f", array.min(), array.max()
    if not (lowest >= 0 and highest <= (255 if is_float else 65535)):
        kind, scale = ("floats", "[0, 1] or [0, 255]") if is_float else ("integers", "0..255 or 0..65535")
        raise ValueError(
            f"Image {index} holds {kind} from {lowest} to {highest}; replace what is NaN or infinite, and scale them "
            f"to {scale}."
        )
    if is_float and highest <= 1 and not unit_floats:
        raise ValueError(
            f"Image {index} holds floats in [0, 1], which do_rescale=False would leave at 0..255; leave do_rescale at "
            "True: such images are recognised and end in [0, 1] as they are."
        )
    if is_float:
        values = array.astype(np.float32, copy=False)
        return np.rint(values if highest > 1 else values * np.float32(255)).astype(np.uint8)
    if highest <= 255 and array.dtype != np.uint16:
        return array.astype(np.uint8)
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
