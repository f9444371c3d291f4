"""Reconstructive training: a diffusion model paints the image from what the language model is given to see."""

import copy
import json
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from ...extras import import_extra
from ..parameters import find_base
from .base import BatchColumn, Objective, StepValues
from .epigone import Epigone, find_widths, read_aux
from .source_images import SOURCE_IMAGES, SourceImages


TARGETS = ("clean", "velocity")


def clean_from_velocity(noisy: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The clean latent that a predicted velocity implies: `z_t - σ v`, since `z_t = (1 - σ) z + σ ε`, `v = ε - z`."""
    return noisy - _like(sigma, noisy) * velocity


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The noisy latent `(1 - σ) z + σ ε` of a rectified flow."""
    return (1.0 - _like(sigma, clean)) * clean + _like(sigma, clean) * noise


def _like(sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """One number an image, ready to multiply latents."""
    return sigma.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))


class Reconstruction(Objective):
    """The loss of painting each image of a batch from its tokens.

    Args:
        epigone (`Epigone`): From tokens to conditions.
        denoiser (`SD3Transformer2DModel`): Predicts the velocity of noisy latents.
        vae (`AutoencoderKL`): Between images and latents; stays frozen.
        scheduler (`FlowMatchEulerDiscreteScheduler`): Noise levels.
        image_size (`int`): Side of the images that are painted, pixels.
        target (`str`): `"clean"`: squared error of the clean latent, as the paper prints it, converted from the
            velocity; this is σ² times that of `"velocity"`, on which Stable Diffusion 3 was trained.
        logit_mean (`float`): Mean of the logit of a noise level before the scheduler's shift.
        logit_std (`float`): Its standard deviation.

    Raises:
        ValueError: If the parts do not fit together.

    Source: VLSA, openreview.net/forum?id=RLhEGWt94S; noise levels: Stable Diffusion 3,
    huggingface.co/papers/2403.03206, logit-normal. Ours: the latent is the mode of the autoencoder's distribution;
    the error is a mean over the latent; no level is weighted more than another.
    """

    frozen: tuple[str, ...] = ("vae",)
    no_split_modules: tuple[str, ...] = ("JointTransformerBlock",)

    def __init__(
        self,
        epigone: Epigone,
        denoiser: Any,
        vae: Any,
        scheduler: Any,
        image_size: int = 256,
        target: Literal["clean", "velocity"] = "clean",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
    ):
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"target={target!r} is unknown; use one of {', '.join(TARGETS)}.")
        self.epigone, self.denoiser, self.vae = epigone, denoiser, vae.requires_grad_(False)
        self.scheduler = scheduler
        self.image_size, self.target = image_size, target
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self._check_parts()

    def _check_parts(self) -> None:
        """Compare widths and sizes of the parts."""
        own, model = self.epigone, self.denoiser.config
        pairs = {
            "joint_attention_dim": (model.joint_attention_dim, own.prompt_width, "prompt_width"),
            "pooled_projection_dim": (model.pooled_projection_dim, own.pooled_width, "pooled_width"),
            "in_channels": (model.in_channels, self.vae.config.latent_channels, "latent_channels"),
        }
        for name, (found, expected, what) in pairs.items():
            if found != expected:
                raise ValueError(f"The denoiser has {name}={found}, but {what}={expected}; make the two equal.")
        step = 2 ** (len(self.vae.config.block_out_channels) - 1) * model.patch_size
        if self.image_size % step or self.image_size > step * model.pos_embed_max_size:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {step}, at most "
                f"{step * model.pos_embed_max_size}, for this autoencoder and denoiser."
            )
        if self.scheduler.config.use_dynamic_shifting:
            raise ValueError("use_dynamic_shifting=True is not supported; use the scheduler of Stable Diffusion 3.")

    @classmethod
    def for_model(
        cls, model: nn.Module, denoiser: Any, vae: Any, scheduler: Any, rank: int = 256, **options: Any
    ) -> "Reconstruction":
        """Build the objective with a new Epigone of the widths of a model.

        Args:
            model (`nn.Module`): The model that is to be trained; where its parts give a global embedding (the
                perceiver), that makes the pooled prompt.
            denoiser, vae, scheduler, options: Arguments of the class.
            rank (`int`): Width of the middle of the Epigone.
        """
        width, global_width = find_widths(find_base(model))
        config = denoiser.config
        epigone = Epigone(width, config.joint_attention_dim, config.pooled_projection_dim, global_width, rank)
        return cls(epigone, denoiser, vae, scheduler, **options)

    @classmethod
    def from_stable_diffusion(
        cls, model: nn.Module, checkpoint: str, dtype: torch.dtype | None = None, **options: Any
    ) -> "Reconstruction":
        """Build the objective from a checkpoint of Stable Diffusion 3 in the layout of diffusers.

        Args:
            model (`nn.Module`): The model that is to be trained.
            checkpoint (`str`): Folder or Hub id; its `transformer`, `vae` and `scheduler` are read.
            dtype (`torch.dtype`, *optional*): Type of denoiser and autoencoder; as saved by default.
            options: As in `for_model`.

        Raises:
            ImportError: If diffusers is not installed.
        """
        classes = diffusion_classes()
        denoiser = classes["denoiser"].from_pretrained(checkpoint, subfolder="transformer", torch_dtype=dtype)
        vae = classes["vae"].from_pretrained(checkpoint, subfolder="vae", torch_dtype=dtype)
        scheduler = classes["scheduler"].from_pretrained(checkpoint, subfolder="scheduler")
        return cls.for_model(model, denoiser, vae, scheduler, **options)

    @classmethod
    def from_recipe(cls, model: nn.Module, **options: Any) -> "Reconstruction":
        """Build it for a model from the plain values of a recipe."""
        dtype = options.pop("dtype", None)
        return cls.from_stable_diffusion(model, dtype=None if dtype is None else getattr(torch, dtype), **options)

    def columns(self) -> list[BatchColumn]:
        """The source images."""
        return [SourceImages(self.image_size)]

    def check(self, stage: Any, model: Any) -> None:
        """Compare widths with the model and views with the stage."""
        self.check_model(model)
        if stage.views == "crops":
            raise ValueError(
                f"Stage {stage.name!r} uses views='crops', but images are painted from the low-resolution view; use "
                "'all' or 'global'."
            )

    def check_model(self, model: Any) -> None:
        """Compare widths with a model."""
        found = find_widths(model)
        own = (self.epigone.width, self.epigone.global_width)
        if found[0] != own[0] or own[1] not in (None, found[1]):
            raise ValueError(
                f"The Epigone reads tokens of width {own[0]} and a global embedding of width {own[1]}, but the model "
                f"gives {found[0]} and {found[1]}; build it with Reconstruction.for_model(model, ...)."
            )

    def forward(self, step: StepValues) -> torch.Tensor:
        """The loss of each row `(B,)`: the mean over its images."""
        tokens, embedding = read_aux(step.aux)
        images = step.columns.get(SOURCE_IMAGES)
        if images is None and not step.has_images:
            images = tokens.new_zeros(len(tokens), 3, self.image_size, self.image_size, dtype=torch.float32)
        if images is None or len(images) != len(tokens):
            found = "no" if images is None else len(images)
            raise ValueError(
                f"The batch has {found} {SOURCE_IMAGES} for {len(tokens)} images; pass "
                "HiResLmmCollator(processor, columns=objective.columns())."
            )
        return step.per_row(self.image_losses(tokens, embedding, images))

    def image_losses(self, tokens: torch.Tensor, embedding: torch.Tensor | None, images: torch.Tensor) -> torch.Tensor:
        """The loss of each image at a random noise level."""
        clean = self.encode_images(images)
        timesteps, sigma = self.draw_levels(len(clean), clean.device)
        noise = self.draw_noise(clean)
        noisy = add_noise(clean, noise, sigma)
        velocity = self._velocity(noisy, timesteps, *self.epigone(tokens, embedding)).float()
        error = velocity - (noise - clean)
        if self.target == "clean":
            error = clean_from_velocity(noisy, velocity, sigma) - clean
        return error.square().flatten(1).mean(dim=1)

    def _velocity(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, prompt: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """Run the denoiser in its own type."""
        dtype = self.denoiser.proj_out.weight.dtype
        output = self.denoiser(
            noisy.to(dtype),
            encoder_hidden_states=prompt.to(dtype),
            pooled_projections=pooled.to(dtype),
            timestep=timesteps,
        )
        return output.sample

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of images."""
        pixels = (images.float() / 127.5 - 1.0).to(self.vae.encoder.conv_in.weight.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents `(I, channels, s, s)`, as `encode_images` makes them: `(I, 3, S, S)` uint8."""
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels = self.vae.decode(latents.to(self.vae.decoder.conv_in.weight.dtype)).sample.float()
        return ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def draw_levels(self, count: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Random noise levels: the sigmoid of a normal number picks one of the scheduler's levels."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        density = compute_density_for_timestep_sampling(
            "logit_normal", count, logit_mean=self.logit_mean, logit_std=self.logit_std, device=device
        )
        steps = self.scheduler.config.num_train_timesteps
        index = (density * steps).long().clamp(max=steps - 1).cpu()
        return self.scheduler.timesteps[index].to(device), self.scheduler.sigmas[index].to(device)

    def draw_noise(self, clean: torch.Tensor) -> torch.Tensor:
        """Random noise of the shape of latents."""
        return torch.randn(clean.shape, device=clean.device, dtype=clean.dtype)

    @torch.no_grad()
    def sample(
        self,
        tokens: torch.Tensor,
        embedding: torch.Tensor | None,
        steps: int = 28,
        seed: int = 0,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> torch.Tensor:
        """Paint images from their tokens."""
        prompt, pooled = self.epigone(tokens, embedding)
        side = self.image_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (len(tokens), self.denoiser.config.in_channels, side, side)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        latents = latents.to(tokens.device)
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=tokens.device)
        for done, timestep in enumerate(scheduler.timesteps):
            velocity = self._velocity(latents, timestep.expand(len(latents)), prompt, pooled).float()
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if progress is not None:
                progress(done + 1, steps, "painting")
        return self.decode_latents(latents)

    def settings(self) -> dict:
        """What builds it anew: configurations of all parts."""
        numbers = {name: getattr(self, name) for name in ("image_size", "target", "logit_mean", "logit_std")}
        configs = {name: json.loads(getattr(self, name).to_json_string()) for name in ("denoiser", "vae", "scheduler")}
        return {"epigone": self.epigone.settings(), **configs, **numbers}

    @classmethod
    def from_settings(cls, settings: dict) -> "Reconstruction":
        """Build it with random weights."""
        classes = diffusion_classes()
        parts = {name: classes[name].from_config(settings[name]) for name in classes}
        rest = {name: value for name, value in settings.items() if name not in classes and name != "epigone"}
        return cls(epigone=Epigone(**settings["epigone"]), **parts, **rest)


def diffusion_classes() -> dict[str, Any]:
    """The classes of diffusers that are used, by the name of the part."""
    diffusers = import_extra("diffusers", "reconstruction")
    return {
        "denoiser": diffusers.SD3Transformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
    }
