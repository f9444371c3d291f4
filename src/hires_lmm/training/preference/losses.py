"""What pairs of an image and its masked self are trained by: masked pixels, losses of log ratios."""

import torch
from torch.nn.functional import logsigmoid


def mask_pixels(pixels: torch.Tensor, share: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Set random pixels of each view to the mean of the view.

    Args:
        pixels (`torch.Tensor` of shape `(..., C, H, W)`): Views as the processor gives them.
        share (`float`): Of the pixels of a view, rounded down; above 0, at most 1.
        generator (`torch.Generator`, *optional*): Default: torch's own.

    Returns:
        Masked views of the same shape; all channels of a pixel are masked together.

    Raises:
        ValueError: If the share is out of range or the tensor holds no views.

    Source: OPA-DPO (released code, `mask_single_image`, "random"), which masks one image of one view.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1.")
    if pixels.ndim < 4:
        raise ValueError(
            f"pixel_values have the shape {tuple(pixels.shape)}; pixels are masked in views (..., channels, height, "
            "width), so the processor must not flatten patches."
        )
    views = pixels.flatten(0, -4).flatten(2)
    number, size = len(views), views.shape[-1]
    device = pixels.device if generator is None else generator.device
    chosen = [torch.randperm(size, generator=generator, device=device)[: int(size * share)] for _ in range(number)]
    index = torch.stack(chosen).to(pixels.device) if chosen else torch.zeros(0, 0, dtype=torch.long)
    hidden = torch.zeros(number, size, dtype=torch.bool, device=pixels.device).scatter_(1, index, True)
    masked = torch.where(hidden[:, None], views.mean(dim=(1, 2), keepdim=True), views)
    return masked.view_as(pixels)


def pair_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid of β times the difference of two log ratios, of tokens or of sequences.

    Args:
        chosen, rejected (`torch.Tensor`): Log-probability under the policy less that under the reference.
        beta (`float`): How near the policy stays to the reference.

    Returns:
        Losses of the same shape.
    """
    return -logsigmoid(beta * (chosen - rejected))


def anchor_losses(
    chosen: torch.Tensor, beta: float, up: torch.Tensor | bool = True, offset: float = 0.0
) -> torch.Tensor:
    """-log sigmoid of ±(β times a log ratio - offset): what keeps the reward of an answer above (below) a number.

    Args:
        chosen (`torch.Tensor`): Log ratios, as in `pair_losses`.
        beta (`float`): As there.
        up (`torch.Tensor` or `bool`): Where the answers are pushed up; elsewhere they are pushed down.
        offset (`float`): The number, in units of the reward.

    Returns:
        Losses of the same shape.

    Source: mDPO, which pushes up; OPA-DPO (released code) pushes revised answers down.
    """
    sign = torch.as_tensor(up, device=chosen.device).to(chosen.dtype) * 2 - 1
    return -logsigmoid(sign * (beta * chosen - offset))
