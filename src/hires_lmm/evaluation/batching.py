"""Which questions are asked together: those of one image near each other, the longest first."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b


QUESTIONS_A_CHUNK, IMAGES_A_CHUNK = 4, 2
"""In batches: a chunk is closed when it holds that many questions, or images."""

MOST_SHARED = 64
"""Questions that hang together by more images than this are asked one by one."""


@dataclass(frozen=True)
class Prompt:
    """A question without its pixels.

    Args:
        text (`str`): What the chat template wrote, an image token for an image.
        images (`tuple[str]`): A hash of the pixels of each image, in reading order.
        num_tokens (`int`): Tokens of the prompt, those of its images among them.
        options (`str`): Options of generation, as JSON.
    """

    text: str
    images: tuple[str, ...]
    num_tokens: int
    options: str

    @cached_property
    def key(self) -> str:
        """What tells prompts apart."""
        parts = [self.text, *self.images, self.options]
        return blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def plan_batches(prompts: Sequence[Prompt], batch_size: int, share_images: bool) -> list[list[list[int]]]:
    """Chunks of batches of indices: a chunk's images are encoded together, and no other chunk needs them.

    A batch has one set of options. The longest prompts come first, so that one that does not fit fails at once, and
    with images shared those that have an image in common follow each other.
    """
    chunks: list[list[list[int]]] = []
    for options in dict.fromkeys(prompt.options for prompt in prompts):
        own = [index for index, prompt in enumerate(prompts) if prompt.options == options]
        chunk: list[int] = []
        images: set[str] = set()
        for group in _groups(prompts, own, share_images):
            chunk += group
            images |= {image for index in group for image in prompts[index].images}
            limit = QUESTIONS_A_CHUNK if share_images else 1
            if len(chunk) >= limit * batch_size or len(images) >= IMAGES_A_CHUNK * batch_size:
                chunks.append(_slices(chunk, batch_size))
                chunk, images = [], set()
        if chunk:
            chunks.append(_slices(chunk, batch_size))
    return chunks


def _slices(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _groups(prompts: Sequence[Prompt], indices: list[int], share_images: bool) -> list[list[int]]:
    """Questions whose images are encoded together; in each group and among the groups the longest come first."""
    ordered = sorted(indices, key=lambda index: (-prompts[index].num_tokens, index))
    if not share_images:
        return [[index] for index in ordered]
    heads: dict[str, str] = {}

    def head(image: str) -> str:
        while heads.setdefault(image, image) != image:
            heads[image] = image = heads[heads[image]]
        return image

    for index in ordered:
        for image in prompts[index].images:
            heads[head(image)] = head(prompts[index].images[0])
    groups: dict[str | int, list[int]] = {}
    for index in ordered:
        images = prompts[index].images
        groups.setdefault(head(images[0]) if images else index, []).append(index)
    split: list[list[int]] = []
    for group in groups.values():
        images_of = {image for index in group for image in prompts[index].images}
        split += [group] if len(images_of) <= MOST_SHARED else [[index] for index in group]
    return split
