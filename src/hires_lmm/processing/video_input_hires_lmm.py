"""Whatever a user calls a video, as frames that become 8-bit RGB pictures one by one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from os import PathLike, path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import (
    is_av_available,
    is_cv2_available,
    is_decord_available,
    is_torchcodec_available,
    logging,
)
from transformers.video_utils import load_video

from .frame_sampling_hires_lmm import Sampling
from .image_input_hires_lmm import flatten_images, open_image, to_rgb


FILE_FRAMES = 16
"""Frames that are taken of a file where nobody says how many."""

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
"""Ends of files that are frames where a list of them is a video."""

NO_END = 2**62
"""The number of a frame that no video has."""

BAR_AFTER = 2.0
"""Seconds of decoding after which a progress bar is shown."""

EXTRA = "pip install 'hires-lmm[video]' (PyAV), or install torchcodec"


class Video:
    """A video among images, as it was passed: frames, an array, a path or an address; or opened, as `Frames`."""

    hires_lmm_kind = "video"

    def __init__(self, source: Any):
        self.source = source


class Frames(Sequence):
    """The frames of an opened video; each becomes a picture when it is asked for.

    Args:
        frames: PIL images, arrays or tensors, as `to_rgb` takes them.
        convert: Makes a picture of number and frame.
        size (`tuple[int, int]`): Height and width of each, pixels.
    """

    hires_lmm_kind = "frames"

    def __init__(self, frames: Any, convert: Callable[[int, Any], Image.Image], size: tuple[int, int]):
        self.frames, self.convert, self.size = frames, convert, size

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, number: Any) -> Image.Image:  # type: ignore[override]
        return self.convert(number, self.frames[number])


def is_video(value: Any, kind: str = "video") -> bool:
    """Whether it is a `Video`, or opened `Frames`; told by a mark, for as remote code a class may exist twice."""
    return getattr(value, "hires_lmm_kind", None) == kind


def flatten_videos(videos: Any) -> list[Video]:
    """Videos of a call in order: one, a list of them, or nested lists as transformers' processors take them."""
    if videos is None or is_video(videos):
        return [] if videos is None else [videos]
    if _is_array(videos) and videos.ndim == 5:
        return [Video(one) for one in videos]
    if is_one_video(videos):
        return [Video(videos)]
    if isinstance(videos, (list, tuple)):
        return [video for entry in videos for video in flatten_videos(entry)]
    raise ValueError(
        f"A video is a {_describe(videos)}; pass a list of frames (PIL images, arrays, tensors), one array of the "
        "shape (frames, height, width, 3) or (frames, 3, height, width), a path or a URL."
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _is_frame(value: Any) -> bool:
    is_file = isinstance(value, (str, PathLike)) and str(value).lower().endswith(PICTURES)
    return is_file or isinstance(value, Image.Image) or (_is_array(value) and value.ndim in (2, 3))


def is_one_video(value: Any) -> bool:
    """Whether it is one video, and no list of them."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_frame, value))
    is_source = isinstance(value, (str, PathLike)) or is_video(value, "frames")
    return is_source or (_is_array(value) and value.ndim == 4) or _is_frame(value)


def _describe(value: Any) -> str:
    return f"{type(value).__name__} of {value.ndim} dimensions" if _is_array(value) else type(value).__name__


def count_videos(videos: Any) -> list[int] | None:
    """Videos of each sample where they come as one list a sample, else None."""
    if not isinstance(videos, (list, tuple)) or is_one_video(videos):
        return None
    if not all(own is None or (isinstance(own, (list, tuple)) and not is_one_video(own)) for own in videos):
        return None
    return [len(flatten_videos(own)) for own in videos]


def merge_videos(images: Any, text: Any, videos: Any, tokens: tuple[str, str]) -> tuple[Any, int, int]:
    """Images and videos of a call in one list: in the order in which their `tokens` stand in the texts, a list a
    text; without texts images first. What one of the two kinds has too much stands behind.

    Returns:
        The list, and how many images and videos there are.
    """
    flat, clips = flatten_images(images), flatten_videos(videos)
    if text is None:
        return [*flat, *clips], len(flat), len(clips)
    waiting = {tokens[0]: iter(flat), tokens[1]: iter(clips)}
    nested: list[list] = []
    for sample in [text] if isinstance(text, str) else text:
        found = sorted((at, token) for token in tokens for at in _places(sample, token))
        nested.append([one for _, token in found for one in _next(waiting[token])])
    rest = [*waiting[tokens[0]], *waiting[tokens[1]]]
    return [*nested[:-1], [*(nested[-1] if nested else []), *rest]], len(flat), len(clips)


def _places(text: str, token: str) -> Iterator[int]:
    at = text.find(token)
    while at >= 0:
        yield at
        at = text.find(token, at + len(token))


def _next(entries: Iterator) -> list:
    """The next entry, if there is one."""
    for entry in entries:
        return [entry]
    return []


def open_video(video: Video, index: int, sampling: Sampling, settings: Any) -> Frames:
    """Read a video and take its frames; `index` is named in errors, `settings` are those of `to_rgb`."""
    source = video.source
    if is_video(source, "frames"):
        return source
    if isinstance(source, (str, PathLike)):
        frames = _load(str(source), index, sampling)
    else:
        frames = [source] if _is_frame(source) else source
        if not len(frames):
            raise ValueError(f"Video {index} has no frames; pass at least one.")
        frames = _select(frames, sampling.choose(len(frames)))
    is_bright = _exceeds_one(frames, index)
    options = (settings.background, settings.pixel_limit, settings.input_data_format, settings.do_rescale)

    def convert(number: int, frame: Any) -> Image.Image:
        if is_bright and _is_float(frame) and bool(((frame >= 0) & (frame <= 1)).all()):
            frame = torch.as_tensor(frame).round().to(torch.uint8)  # alone it would be taken for [0, 1]
        try:
            picture = to_rgb(open_image(frame, number), number, *options)
        except ValueError as error:
            raise ValueError(f"Video {index}, frames counted as images: {error}") from error
        if size and (picture.height, picture.width) != size[0]:
            raise ValueError(
                f"Video {index}: frame {number} has {picture.height}x{picture.width} pixels, frame 0 "
                f"{size[0][0]}x{size[0][1]}; all frames of a video are equally large, resize or crop them first."
            )
        return picture

    size: list[tuple[int, int]] = []
    first = convert(0, frames[0])
    size.append((first.height, first.width))
    return Frames(frames, convert, size[0])


def _select(frames: Any, chosen: list[int]) -> Any:
    """Some of the frames; those of an array are not copied."""
    return frames if len(chosen) == len(frames) else [frames[number] for number in chosen]


def _is_float(frame: Any) -> bool:
    return _is_array(frame) and "float" in str(frame.dtype)


def _exceeds_one(frames: Any, index: int) -> bool:
    """Whether floats of a video are in [0, 255]: told by all its frames. Integers beyond are refused."""
    arrays = [frame for frame in frames if _is_array(frame)]
    wide = [a for a in arrays if "int" in str(a.dtype) and not str(a.dtype).endswith("int8")]
    if any(bool((a > 255).any()) for a in wide):
        raise ValueError(f"Video {index} is of {wide[0].dtype} with values above 255; scale it to 8 bits (uint8).")
    return any(bool((a > 1).any()) for a in arrays if _is_float(a))


class _Wanted(list):
    """Numbers of frames for a decoder, which asks of each frame that it reads whether it is wanted."""

    def __init__(self, numbers: list[int], bar: Any):
        super().__init__(numbers)
        self.seen, self._known, self._bar = 0, set(numbers), bar

    def __contains__(self, number: Any) -> bool:
        self.seen += 1
        self._bar.update(1)
        return number in self._known


def _load(source: str, index: int, sampling: Sampling) -> Any:
    """Decode the frames of a file or address that are wanted: uint8, `(frames, height, width, 3)` with most decoders.

    A file that does not say how many frames it has, or says it wrongly, is read twice: once to count them.
    """
    shown = source if len(source) <= 120 else source[:117] + "..."
    if not source.startswith(("http://", "https://")) and not path.isfile(source):
        raise ValueError(f"Video {index}: {shown!r} is no existing file and no URL (http:// or https://); correct it.")
    backends = {
        "pyav": is_av_available(),
        "torchcodec": is_torchcodec_available(),
        "opencv": is_cv2_available(),
        "decord": is_decord_available(),
    }
    backend = next((name for name, is_there in backends.items() if is_there), None)
    if backend is None:
        raise ImportError(f"Video {index}: {shown!r} needs a decoder, and none is installed: {EXTRA}.")
    if sampling.num_frames is None and sampling.fps is None:
        sampling = replace(sampling, num_frames=FILE_FRAMES)
    try:
        frames, wanted, is_counted = _decode(source, backend, sampling, None)
        if not is_counted or len(frames) != len(wanted):
            frames, wanted, _ = _decode(source, backend, sampling, wanted.seen)
        if len(frames) != len(wanted):
            raise ValueError(f"{len(frames)} of {len(wanted)} frames came")
    except Exception as error:  # of many kinds, by decoder
        raise ValueError(
            f"Video {index}: {shown!r} cannot be decoded by {backend} ({' '.join(str(error).split())[:300]}); replace "
            "it, or pass its frames."
        ) from error
    return frames


def _decode(source: str, backend: str, sampling: Sampling, total: int | None) -> tuple[Any, _Wanted, bool]:
    """Frames, which were wanted, and whether their number was known; where it is not, they are counted alone."""
    asked: list[_Wanted] = []
    with logging.tqdm(desc=f"decoding {path.basename(source)}", unit=" frames", delay=BAR_AFTER, leave=False) as bar:

        def choose(metadata: Any, **_: Any) -> _Wanted:
            number = metadata.total_num_frames if total is None else total
            numbers = sampling.choose(number, metadata.fps) if number > 0 else [0, NO_END]
            bar.total = numbers[-1] + 1 if number > 0 else None
            asked.append(_Wanted(numbers, bar))
            return asked[0]

        frames, _ = load_video(source, backend=backend, sample_indices_fn=choose)
    return frames, asked[0], asked[0][-1] != NO_END


__all__ = ["Frames", "Video", "flatten_videos", "open_video"]
