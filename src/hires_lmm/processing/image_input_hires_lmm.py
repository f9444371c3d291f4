"""Whatever a user calls an image, as an upright 8-bit RGB Pillow image, or an error that says what is wrong."""

import base64
import binascii
import time
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

DOWNLOAD_LIMIT = 268_435_456
"""Most bytes that are fetched from a URL."""

DOWNLOAD_SECONDS = 300
"""Longest time that fetching a URL may take."""

NESTING_LIMIT = 16
"""Most lists around an image."""

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
"""EXIF orientation -> what makes the image upright; every other value means upright."""

ARRAY_CHANNELS = (1, 3, 4)
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def flatten_images(images: Any, depth: int = 0) -> list:
    """Flatten nested lists and 4-d arrays into a list of single images, in order.

    Args:
        images: An image, a 4-d array of images, or a (nested) list of these; None is no image.
        depth (`int`): Lists around `images` already.

    Returns:
        The images, untouched.

    Raises:
        ValueError: If the lists are nested too deeply, as one that holds itself.
    """
    if isinstance(images, (list, tuple)):
        if depth >= NESTING_LIMIT:
            raise ValueError(f"images is nested more than {NESTING_LIMIT} lists deep; pass one list, or one a sample.")
        return [image for entry in images for image in flatten_images(entry, depth + 1)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [] if images is None else [images]


def flatten_budgets(budget: Any, images: Any) -> list:
    """One budget an image.

    Args:
        budget: One for all images; a list of one an image, in their order; or a list nested as the images are.
        images: Images as `flatten_images` takes them.

    Returns:
        The budgets, in the order of `flatten_images`.

    Raises:
        ValueError: If there are more or fewer budgets than images.
    """
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
    """Open a path, URL, base64 text, data URL or encoded bytes as a Pillow image; anything else is passed on.

    Args:
        source: What the user gave.
        index (`int`): Named in errors.

    Returns:
        A Pillow image that may not be decoded yet, or `source` itself where it is an image or an array.

    Raises:
        ValueError: If the source cannot be read or holds no image.

    Source: the sources of transformers' `load_image` and the dicts of `datasets`. Differs: alpha and bit depth are
        kept for `to_rgb`.
    """
    if isinstance(source, dict) and source.keys() and source.keys() <= {"bytes", "path"}:
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (bytes, bytearray, memoryview)):
        given = bytes(source)
        return _open_bytes(given, f"{len(given)} bytes", index)
    if not isinstance(source, (str, PathLike)):
        return source
    text = str(source)
    shown = text if len(text) <= 120 else text[:117] + "..."
    if text.startswith(("http://", "https://")):
        return _open_bytes(_download(text, index), shown, index)
    if path.isfile(text):
        return _open_file(text, shown, index)
    if isinstance(source, PathLike):
        raise ValueError(f"Image {index}: there is no file {shown!r}; correct the path.")
    encoded = text.split(",", 1)[-1] if text.startswith("data:image/") else text
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"Image {index}: {shown!r} is no URL (http:// or https://), no existing file and no base64 text; "
            f"correct it or pass the image itself."
        ) from error
    return _open_bytes(data, shown, index)


def to_rgb(
    image: Any,
    index: int,
    background: tuple[int, int, int] = (255, 255, 255),
    pixel_limit: int = DEFAULT_PIXEL_LIMIT,
    input_data_format: str | None = None,
    unit_floats: bool = True,
) -> Image.Image:
    """Convert one image of any kind to an upright RGB image of 8 bit.

    Args:
        image: A Pillow image of any mode or an array (`numpy` or `torch`, any device) of shape `(height, width)`,
            `(height, width, channels)` or `(channels, height, width)` with 1, 3 or 4 channels.
        index (`int`): Named in errors.
        background (`tuple[int, int, int]`): Colour under transparent pixels, RGB.
        pixel_limit (`int`): Most pixels of an image.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`; arrays only.
        unit_floats (`bool`): Whether floats in [0, 1] are accepted.

    Returns:
        The image. Floats up to 1 are taken as [0, 1], others as [0, 255]; 16-bit integers, and wider ones that exceed
        255, are scaled from 65535; EXIF orientation is applied; the first frame of an animation is taken, and of a
        file of layers what it was opened with, all layers together.

    Raises:
        ValueError: If the image is empty, damaged, too large, of ambiguous channel order or out of range.
    """
    if isinstance(image, Image.Image):
        _check_size(image.height, image.width, index, pixel_limit)
        upright = _upright_first_frame(image, index)
        _check_size(upright.height, upright.width, index, pixel_limit)  # some formats know their size when decoded
        return _pillow_to_rgb(upright, index, background, unit_floats)
    if isinstance(image, torch.Tensor):
        image = _tensor_to_numpy(image, index)
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"Image {index} is a {type(image).__name__}; pass a PIL image, an array, a tensor, a path, a URL or bytes."
        )
    if isinstance(image, np.ma.MaskedArray):
        raise ValueError(f"Image {index} is a masked array of shape {image.shape}; pass image.filled(value).")
    if image.dtype.kind not in "biuf":
        raise ValueError(f"Image {index} is an array of {image.dtype}; pass integers or floats.")
    array = _channels_last(image, index, input_data_format)
    _check_size(array.shape[0], array.shape[1], index, pixel_limit)
    if array.dtype == np.uint16 and 0 < int(array.max()) <= 255:
        raise ValueError(
            f"Image {index} is an array of uint16 with values up to {int(array.max())}: 8 bits, or a nearly black "
            "picture of 16? Pass array.astype(numpy.uint8), or scale it to 0..65535."
        )
    eight_bit = np.ascontiguousarray(_to_eight_bit(array, index, unit_floats))
    if eight_bit.ndim == 3 and eight_bit.shape[2] == 1:
        eight_bit = eight_bit[:, :, 0]
    return _pillow_to_rgb(Image.fromarray(eight_bit), index, background, unit_floats)


def _download(url: str, index: int) -> bytes:
    stop, parts, size = time.monotonic() + DOWNLOAD_SECONDS, [], 0
    try:
        with get_session().stream("GET", url, follow_redirects=True, timeout=60) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > DOWNLOAD_LIMIT or time.monotonic() > stop:
                    raise OSError(f"{size} bytes so far, at most {DOWNLOAD_LIMIT} in {DOWNLOAD_SECONDS} s are taken")
    except Exception as error:
        raise ValueError(f"Image {index}: {url!r} cannot be fetched ({error}); check the address.") from error
    return b"".join(parts)


def _open_bytes(data: bytes, shown: str, index: int) -> Image.Image:
    if not data:
        raise ValueError(f"Image {index}: {shown!r} is empty; pass the bytes of an image file.")
    return _open_file(BytesIO(data), shown, index)


def _open_file(file: str | BytesIO, shown: str, index: int) -> Image.Image:
    try:
        try:
            return Image.open(file)
        except BOMBS:
            raise
        except Exception:
            with file if isinstance(file, BytesIO) else open(file, "rb") as stream:
                stream.seek(0)
                return Image.open(BytesIO(_without_metadata(stream.read())))
    except BOMBS as error:
        raise ValueError(
            f"Image {index}: {shown!r} is refused by Pillow ({error}); shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS "
            f"and pixel_limit if you trust it."
        ) from error
    except Exception as error:
        raise ValueError(f"Image {index}: {shown!r} is not an image ({error}); replace it.") from error


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


def _check_size(height: int, width: int, index: int, pixel_limit: int) -> None:
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


def _upright_first_frame(image: Image.Image, index: int) -> Image.Image:
    if image.format in PROGRAM_FORMATS and getattr(image, "tile", None):
        raise ValueError(
            f"Image {index} is an {image.format} file, which Pillow decodes by starting another program; this is "
            "refused. Convert it to PNG."
        )
    try:
        if image.format != "PSD" and getattr(image, "is_animated", False) and image.tell() != 0:
            frame = image.tell()
            image.seek(0)
            first = image.copy()
            image.seek(frame)
            image = first
        image = _decoded(image)
        turn = TURNS.get(_orientation(image) or 0)
        return image if turn is None else image.transpose(turn)
    except BOMBS as error:
        raise ValueError(f"Image {index} is refused by Pillow ({error}); shrink it.") from error
    except Exception as error:
        raise ValueError(
            f"Image {index} cannot be decoded ({error}); it is truncated or damaged, replace it."
        ) from error


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


def _orientation(image: Image.Image) -> int | None:
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
            return _lab_to_rgb(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise ValueError(f"Image {index} of mode {image.mode!r} has no conversion to RGB ({error}).") from error


def _over_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    result = Image.new("RGB", image.size, background)
    result.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return result


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, rgb, "LAB", "RGB").apply(image)


def _tensor_to_numpy(tensor: torch.Tensor, index: int) -> np.ndarray:
    kind = f"Image {index} is a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}"
    if tensor.is_complex() or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"{kind}; pass integers or floats with values in memory.")
    try:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy(force=True)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{kind}, which has no values to read ({error}); pass integers or floats.") from error


def _channels_last(array: np.ndarray, index: int, data_format: str | None) -> np.ndarray:
    shape = array.shape
    if array.ndim == 2:
        return array
    if array.ndim != 3:
        raise ValueError(f"Image {index} has shape {shape}; it must have 2 or 3 dimensions.")
    if data_format is None:
        first, last = shape[0] in ARRAY_CHANNELS, shape[2] in ARRAY_CHANNELS
        if first and last:
            raise ValueError(
                f"Image {index} has shape {shape}, of which the first or the last number may be the channels; pass "
                f"input_data_format='channels_first' or 'channels_last'."
            )
        data_format = ChannelDimension.FIRST if first else ChannelDimension.LAST
    channels_first = ChannelDimension(data_format) == ChannelDimension.FIRST
    if shape[0 if channels_first else 2] not in ARRAY_CHANNELS:
        raise ValueError(
            f"Image {index} has shape {shape}, which is not 1, 3 or 4 channels in the order "
            f"{ChannelDimension(data_format).value!r}; transpose it or correct input_data_format."
        )
    return array.transpose(1, 2, 0) if channels_first else array


def _to_eight_bit(array: np.ndarray, index: int, unit_floats: bool) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        return _floats_to_eight_bit(array, index, unit_floats)
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest > 65535:
        raise ValueError(f"Image {index} holds integers from {lowest} to {highest}; scale them to 0..255 or 0..65535.")
    if highest <= 255 and array.dtype != np.uint16:
        return array.astype(np.uint8)
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _floats_to_eight_bit(array: np.ndarray, index: int, unit_floats: bool) -> np.ndarray:
    lowest, highest = float(array.min()), float(array.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        count = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"Image {index} holds {count} values that are NaN or infinite; replace them.")
    if lowest < 0 or highest > 255:
        raise ValueError(
            f"Image {index} holds floats from {lowest:.6g} to {highest:.6g}; scale them to [0, 1] or [0, 255]."
        )
    if highest > 1:
        return np.rint(array.astype(np.float32, copy=False)).astype(np.uint8)
    if not unit_floats:
        raise ValueError(
            f"Image {index} holds floats in [0, 1], which do_rescale=False would leave at 0..255; leave do_rescale at "
            f"True: such images are recognised and end in [0, 1] as they are."
        )
    return np.rint(array.astype(np.float32, copy=False) * np.float32(255)).astype(np.uint8)
