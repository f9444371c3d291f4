"""Tiny diffusion parts, VLSA models and runs with objectives."""

import torch

from builders.tiny import randomise, tiny_config, tiny_model, tiny_processor
from builders.training import training_arguments


WIDTH = 32  # of the tiny tower and of the tiny language model


def vlsa_config(**connector):
    """The `vlsa` preset at tiny size, at most 4 crops."""
    planner = {"name": "multiple", "max_crops": 4}
    return tiny_config("vlsa", connector_config=connector, planner=planner) if connector else tiny_config("vlsa")


def vlsa_parts(seed=0, **connector):
    """A tiny VLSA model in training mode and its processor (ChatML)."""
    config = vlsa_config(**connector)
    return tiny_model(config, seed).train(), tiny_processor(config, "chatml")


def diffusion_parts(seed=0):
    """A tiny denoiser, autoencoder and scheduler of the classes of Stable Diffusion 3, all weights random."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    denoiser = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.1,
    )
    return randomise(denoiser, seed), randomise(vae, seed), FlowMatchEulerDiscreteScheduler(shift=3.0)


def reconstruction(model, seed=0, **options):
    """The objective for a tiny model: images of 16 x 16 pixels, an Epigone of rank 6."""
    from hires_lmm.training.objectives import Reconstruction

    torch.manual_seed(seed)
    return Reconstruction.for_model(model, *diffusion_parts(seed), **{"rank": 6, "image_size": 16, **options})


def fixed_reconstruction(model):
    """The objective with noise that follows from the image alone, for comparing batches that are cut differently."""
    objective = reconstruction(model)
    timesteps, sigmas = objective.scheduler.timesteps[400], objective.scheduler.sigmas[400]
    objective.draw_levels = lambda count, device: (timesteps.expand(count).to(device), sigmas.expand(count).to(device))
    objective.draw_noise = lambda clean: torch.cos(50.0 * clean)
    return objective


def objective_trainer(model, processor, stage, objectives, data, folder, callbacks=(), eval_dataset=None, **changes):
    """A stock Trainer for one stage with objectives."""
    from transformers import Trainer

    from hires_lmm.training import HiResLmmCollator, StageCallback

    args = training_arguments(folder, **changes)
    columns = [column for objective in objectives.values() for column in objective.columns()]
    return Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=eval_dataset,
        data_collator=HiResLmmCollator(processor, views=stage.views, columns=columns),
        processing_class=processor,
        callbacks=[StageCallback(stage, show_table=False, objectives=objectives), *callbacks],
        optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
    )
