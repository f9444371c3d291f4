"""Reconstruction in numbers: noise levels, latents, Epigone, sampler, against formulas written out here."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from builders.objectives import reconstruction, vlsa_parts
from builders.tiny import random_image, tiny_config, tiny_model
from hires_lmm.training.objectives import load_objectives, save_objectives
from hires_lmm.training.objectives.epigone import Epigone, find_widths
from hires_lmm.training.objectives.reconstruction import add_noise, clean_from_velocity
from hires_lmm.training.objectives.source_images import SourceImages


def test_the_clean_latent_comes_back_from_the_true_velocity():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.5, 0.99], dtype=torch.float64)
    noisy = add_noise(clean, noise, sigma)
    for image, level in enumerate(sigma.tolist()):
        torch.testing.assert_close(noisy[image], (1 - level) * clean[image] + level * noise[image])
    torch.testing.assert_close(clean_from_velocity(noisy, noise - clean, sigma), clean)
    wrong = clean_from_velocity(noisy, noise - clean + 1.0, sigma) - clean
    torch.testing.assert_close(wrong.square().mean(dim=(1, 2, 3)), sigma.square())  # the error is σ times that of v


def test_noise_levels_are_logit_normal_under_the_shift():
    objective = reconstruction(vlsa_parts()[0], logit_mean=0.5, logit_std=0.8)
    torch.manual_seed(0)
    timesteps, sigma = objective.draw_levels(20_000, "cpu")
    torch.testing.assert_close(timesteps, 1000 * sigma)
    # undo the scheduler's shift of 3, then its order (high levels first), then the sigmoid: a normal number
    level = (sigma / (3 - 2 * sigma)).double().numpy()
    position = 1 - level
    normal = np.log((position + 5e-4) / (1 - position - 5e-4))
    found = np.sort((normal - 0.5) / 0.8)
    expected = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in found])
    assert np.abs(expected - (np.arange(len(found)) + 0.5) / len(found)).max() < 0.012  # Kolmogorov, p = 0.005


def test_latents_are_shifted_and_scaled_and_come_back():
    objective = reconstruction(vlsa_parts()[0])
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean = objective.vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(objective.encode_images(images), (mean - 0.1) * 1.5)
    latents = torch.randn(2, 4, 8, 8)
    pixels = objective.vae.decode(latents / 1.5 + 0.1).sample
    expected = ((pixels / 2 + 0.5) * 255).clamp(0, 255).round().to(torch.uint8)
    torch.testing.assert_close(objective.decode_latents(latents), expected, atol=1, rtol=0)


def test_the_epigone_is_two_linear_layers_with_silu():
    torch.manual_seed(0)
    epigone = Epigone(8, 6, 5, global_width=7, rank=3).double()
    tokens, embedding = torch.randn(2, 4, 8).double(), torch.randn(2, 7).double()
    prompt, pooled = epigone(tokens, embedding)

    def perceptron(part, values):
        hidden = values.numpy() @ part.linear_1.weight.detach().numpy().T + part.linear_1.bias.detach().numpy()
        hidden = hidden / (1 + np.exp(-hidden))
        return hidden @ part.linear_2.weight.detach().numpy().T + part.linear_2.bias.detach().numpy()

    np.testing.assert_allclose(prompt.detach(), perceptron(epigone.prompt, tokens))
    np.testing.assert_allclose(pooled.detach(), perceptron(epigone.pooled, embedding))
    alone = Epigone(8, 6, 5, rank=3).double()
    np.testing.assert_allclose(alone(tokens, None)[1].detach(), perceptron(alone.pooled, tokens.mean(dim=1)))


def test_widths_follow_the_model():
    assert find_widths(vlsa_parts()[0].model) == (32, 32)
    model = tiny_model(tiny_config("llava_next"))
    assert find_widths(model.model) == (32, None)
    assert reconstruction(model).epigone.global_width is None
    assert not model.training and not model.model.connector.training


@pytest.mark.parametrize("target", ["clean", "velocity"])
def test_the_loss_is_the_squared_error_of_its_target(target):
    model, _ = vlsa_parts()
    objective = reconstruction(model, target=target)
    tokens, embedding = torch.randn(3, 16, 32), torch.randn(3, 32)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(7)
    losses = objective.image_losses(tokens, embedding, images)
    torch.manual_seed(7)
    index = (torch.sigmoid(torch.normal(0.0, 1.0, (3,))) * 1000).long()
    level = (1000 - index) / 1000
    sigma = (3 * level / (1 + 2 * level)).view(3, 1, 1, 1)
    clean = (objective.vae.encode(images.float() / 127.5 - 1).latent_dist.mean - 0.1) * 1.5
    noise = torch.randn(3, 4, 8, 8)
    noisy = (1 - sigma) * clean + sigma * noise
    prompt, pooled = objective.epigone(tokens, embedding)
    velocity = objective.denoiser(noisy, prompt, pooled, 1000 * sigma.flatten()).sample
    error = noisy - sigma * velocity - clean if target == "clean" else velocity - (noise - clean)
    torch.testing.assert_close(losses, error.square().mean(dim=(1, 2, 3)))
    assert losses.min() > 1e-3


def test_the_sampler_ends_where_the_velocity_points():
    objective = reconstruction(vlsa_parts()[0])
    goal = torch.randn(1, 4, 8, 8)
    objective._velocity = lambda noisy, timesteps, prompt, pooled: (
        (noisy - goal) / (timesteps.view(-1, 1, 1, 1) / 1000)
    )
    seen = []
    painted = objective.sample(torch.randn(1, 16, 32), torch.randn(1, 32), steps=5, progress=lambda *a: seen.append(a))
    torch.testing.assert_close(painted, objective.decode_latents(goal), atol=1, rtol=0)
    assert seen == [(n, 5, "painting") for n in range(1, 6)]


def test_the_source_column_holds_the_resized_images():
    image = random_image(50, 90)
    content = [
        {"type": "image", "image": image},
        {"type": "text", "text": "Which?"},
        {"type": "image", "image": image},
    ]
    column = SourceImages(24)
    pixels = column.encode([{"role": "user", "content": content}])
    expected = np.array(image.resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 24, 24)
    assert (pixels.numpy() == expected).all()
    assert column.encode([{"role": "user", "content": content[1:2]}]) is None
    assert column.join([pixels, pixels[:1]]).shape == (3, 3, 24, 24)


def test_a_saved_objective_comes_back(tmp_path):
    objective = reconstruction(vlsa_parts()[0], target="velocity", logit_std=0.7).to(torch.bfloat16)
    save_objectives(tmp_path, {"reconstruction": objective})
    again = load_objectives(tmp_path)["reconstruction"]
    assert again.settings() == objective.settings()
    for (name, one), two in zip(objective.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two) and one.dtype == two.dtype, name
    assert not any(parameter.requires_grad for parameter in again.vae.parameters())
    with pytest.raises(ValueError, match="holds no objectives"):
        load_objectives(tmp_path / "reconstruction")
