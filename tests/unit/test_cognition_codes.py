"""Codebook indices: the nearest vector, models of diffusers, the cache."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from builders.tiny import random_image
from hires_lmm.training.data.cognition import (
    CachedCodes,
    CodebookTask,
    CognitionTransform,
    VqQuantiser,
    cache_codes,
    load_quantiser,
)
from hires_lmm.training.data.cognition_codes import nearest_codes


class Plain(torch.nn.Module):
    """A stand-in for a VQ model: latents are mean colours of cells of 8 pixels, the codebook is chosen."""

    def __init__(self, codebook):
        super().__init__()
        self.quantize = torch.nn.Module()
        self.quantize.embedding = torch.nn.Embedding.from_pretrained(torch.tensor(codebook, dtype=torch.float32))

    def encode(self, pixels):
        latents = torch.nn.functional.avg_pool2d(pixels, 8)
        return type("Output", (), {"latents": latents})


def tiny_vq(seed: int = 0):
    """A real VQModel of diffusers: 4 x 4 cells at 16 pixels, 37 vectors."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        num_vq_embeddings=37,
        vq_embed_dim=5,
        latent_channels=5,
    )
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model.eval()


# ---- nearest vectors


def test_the_nearest_vector_is_that_of_a_direct_search_in_float64():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 50, 6, generator=generator)
    codebook = torch.randn(40, 6, generator=generator) * torch.rand(40, 1, generator=generator) * 3
    distances = (vectors.double()[..., None, :] - codebook.double()).square().sum(-1)
    found = nearest_codes(vectors, codebook)
    assert torch.equal(found, distances.argmin(-1))
    similar = (vectors.double() @ codebook.double().T).argmin(-1)  # as eq. 5 is printed
    assert (found == similar).double().mean() < 0.2
    assert torch.equal(
        nearest_codes(vectors + 1000, codebook + 1000), nearest_codes((vectors + 1000) - 1000, codebook)
    )


# ---- quantisers


def test_a_labelled_codebook_gives_the_known_codes():
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    quantiser = VqQuantiser(Plain(np.array(colours) / 127.5 - 1), image_size=24)
    assert quantiser.grid == (3, 3) and quantiser.num_codes == 3
    codes = np.array([[0, 1, 2], [2, 2, 0], [1, 0, 1]])
    cells = np.array(colours, dtype=np.uint8)[codes].repeat(8, 0).repeat(8, 1)
    assert quantiser([Image.fromarray(cells), Image.new("RGB", (5, 70), (0, 250, 9))]).tolist() == [
        codes.tolist(),
        [[1, 1, 1]] * 3,
    ]


def test_a_model_of_diffusers_agrees_with_a_direct_search_and_with_itself():
    model = tiny_vq()
    quantiser = VqQuantiser(model, image_size=16)
    assert quantiser.grid == (4, 4) and quantiser.num_codes == 37
    images = [random_image(16, 16, seed) for seed in range(4)]
    found = quantiser(images)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float() / 255
    with torch.no_grad():
        latents = model.encode(pixels * 2 - 1).latents
        own = model.quantize(latents)[2][2].view(4, 4, 4)
    codebook = model.quantize.embedding.weight.detach().double().numpy()
    vectors = latents.permute(0, 2, 3, 1).double().numpy()
    direct = ((vectors[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)
    assert (found == direct).all() and (found == own.numpy()).all()
    assert len(np.unique(found)) > 3


def test_a_saved_model_is_loaded(tmp_path):
    model = tiny_vq()
    model.save_pretrained(tmp_path / "vqvae")
    loaded = load_quantiser(str(tmp_path), image_size=16, subfolder="vqvae")
    image = random_image(40, 30)
    assert (loaded([image]) == VqQuantiser(model, 16)([image])).all()
    assert loaded.fingerprint == VqQuantiser(model, 16).fingerprint != VqQuantiser(model, 32).fingerprint
    assert loaded.fingerprint != VqQuantiser(tiny_vq(1), 16).fingerprint


# ---- the cache


class Counting:
    """A quantiser that counts the images it is shown."""

    num_codes, grid = 300, (1, 2)

    def __init__(self):
        self.seen, self.batches = 0, []

    def __call__(self, images):
        self.seen += len(images)
        self.batches.append(len(images))
        return np.stack([np.asarray(image.resize((2, 1)), dtype=np.int64).sum(-1) % 300 for image in images])


def test_cached_codes_are_those_of_the_quantiser(tmp_path):
    quantiser, images = Counting(), [random_image(20, 30, seed) for seed in range(11)]
    cache = cache_codes(quantiser, [*images, images[0], images[3:5]], tmp_path, 3, show_progress=False, shard_bytes=24)
    assert quantiser.seen == 11 and max(quantiser.batches) == 3
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert {len(load_file(file)) for file in tmp_path.glob("*.safetensors")} == {6, 5}
    cache = pickle.loads(pickle.dumps(cache))
    assert (cache(images) == Counting()(images)).all() and len(cache) == 11
    row = {"messages": [{"role": "user", "content": "<image> q"}, {"role": "assistant", "content": "a"}]}
    run = [
        CognitionTransform({CodebookTask(q, (1, 1)): 1.0})({**row, "images": images[0]}) for q in (quantiser, cache)
    ]
    assert run[0]["messages"] == run[1]["messages"] != row["messages"]
    with pytest.raises(ValueError, match="does not hold the image"):
        cache([random_image(1, 1)])


def test_an_interrupted_run_goes_on(tmp_path, capfd):
    images = [random_image(20, 30, seed) for seed in range(6)]

    def stopping():
        yield from images[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_codes(Counting(), stopping(), tmp_path, batch_size=1, shard_bytes=8)
    assert len(CachedCodes(tmp_path)) == 4
    quantiser = Counting()
    cache = cache_codes(quantiser, images, tmp_path)
    assert quantiser.seen == 2 and (cache(images) == Counting()(images)).all()
    assert "codes" in capfd.readouterr().err


def test_a_cache_of_another_quantiser_is_refused(tmp_path):
    cache_codes(Counting(), [random_image(9, 9)], tmp_path, show_progress=False)
    other = Counting()
    other.num_codes = 301
    with pytest.raises(ValueError, match=r"made with num_codes=300, now it is 301; write it anew in another folder"):
        cache_codes(other, [], tmp_path)
    with pytest.raises(ValueError, match=r"holds no index.json"):
        CachedCodes(tmp_path / "none")
    assert json.loads((tmp_path / "index.json").read_text())["made_from"]["quantiser"] == "Counting"
