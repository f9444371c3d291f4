"""VLSA on needle scenes: accuracy of its rows against other connectors, and whether reconstruction helps.

    python benchmarks/vlsa_needle.py --work FOLDER [--arms vlsa_reconstruction,monkey] [--seeds 0,1]
    python benchmarks/vlsa_needle.py --work FOLDER --report

Every arm joins the committed halves and trains through its plan with the tower frozen. An interrupted run goes on when
it is started again; finished arms are skipped. `--report` writes results/vlsa_needle.json, a table and two pictures.
"""

import argparse
import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from record import RESULTS, write_result
from safetensors.torch import load_file, save_file

from hires_lmm.evaluation.statistics import wilson_interval
from hires_lmm.files import replacing, write_text
from hires_lmm.training import get_plan
from hires_lmm.training.objectives import Reconstruction
from hires_lmm.training.objectives.painting import look, paint
from hires_lmm.training.objectives.reconstruction import add_noise, clean_from_velocity
from hires_lmm.training.objectives.source_images import read_pixels
from hires_lmm.training.stages import Stage
from needle.from_halves import NEAR
from needle.questions import QUESTION_KINDS
from needle.runs import RunOptions, SceneSet, evaluate_packed, join_halves, small_rates, train


HALVES = Path(__file__).parents[1] / "checkpoints" / "halves"
DENOISER = "objectives.reconstruction.denoiser"
SIDE = 128
"""Side of the painted images in pixels; the low-resolution view has 64, the scene 384."""

LEVELS = (0.25, 0.5, 0.75, 0.95)
"""Noise levels at which the reconstruction error is measured."""

NAMES = ("fine", "fine_whole", "fine_cut", "scene", "all")
logger = logging.getLogger("vlsa_needle")


@dataclass(frozen=True)
class Arm:
    """A model that is trained.

    Args:
        preset: Preset of its connector.
        plan: Plan, whose stages before the last are one here.
        views: Views that it sees, in training and when asked.
        connector: Changes of the connector.
        share: Share of the visits that takes the processor time of the arms with 64 tokens.
    """

    preset: str
    plan: str
    views: str = "all"
    connector: tuple = ()
    share: float = 1.0


ARMS = {
    "low_resolution": Arm("vlsa", "vlsa_low_resolution", "global", (("view_ops", []),)),
    "vlsa": Arm("vlsa", "vlsa_perceiver"),
    "vlsa_reconstruction": Arm("vlsa", "vlsa_reconstruction"),
    "monkey": Arm("monkey", "end_to_end", share=0.1),
    "llava_hd": Arm("llava_hd", "end_to_end", share=0.03),
}


@dataclass(frozen=True)
class Sizes:
    """How much is done: scenes, visits of the two stages, steps of the autoencoder, validation scenes."""

    scenes: int = 1500
    visits: tuple[int, int] = (2400, 6000)
    vae_steps: int = 400
    validation: int = 300
    measured: int = 64
    painted: int = 6


SMOKE = Sizes(scenes=8, visits=(8, 8), vae_steps=4, validation=4, measured=4, painted=2)


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of runs")
    parser.add_argument("--cache", type=Path, help="folder of tower features, shared with other runs")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--visits", help="scene visits of the two stages, with a comma")
    parser.add_argument("--equal", choices=("time", "visits"), default="time", help="what all arms get the same of")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--report", action="store_true", help="only write the results of finished arms")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    sizes = SMOKE if options.smoke else Sizes()
    if options.visits:
        first, second = (int(part) for part in options.visits.split(","))
        sizes = replace(sizes, visits=(first, second))
    unknown = [arm for arm in options.arms.split(",") if arm not in ARMS]
    if unknown:
        parser.error(f"unknown arm {unknown[0]!r}; known arms: {', '.join(ARMS)}")
    if not options.report:
        for seed in options.seeds.split(","):
            for arm in options.arms.split(","):
                share = ARMS[arm].share if options.equal == "time" and not options.smoke else 1.0
                own = replace(sizes, visits=tuple(max(8, round(share * visits)) for visits in sizes.visits))
                run_arm(arm, int(seed), options.work, options.cache or options.work / "cache", own)
    report(options.work, options.work if options.smoke else RESULTS)
    return 0


def run_arm(name: str, seed: int, work: Path, cache: Path, sizes: Sizes) -> None:
    """Train and score one arm, unless that is done."""
    folder = work / f"{name}-{seed}"
    if (folder / "result.json").is_file():
        logger.info("%s, seed %d is finished", name, seed)
        return
    arm = ARMS[name]
    model, processor = join_halves(
        HALVES, arm.preset, seed=seed, planner={"name": "slime"}, connector_config=dict(arm.connector)
    )
    for limit in ("max_crops", "unpad", "global_view"):  # no part in cutting square scenes; one cache serves all arms
        setattr(processor.image_processor, limit, None)
    stages = short_plan(arm)
    objectives: dict[str, Any] = {}
    if any(stage.loss_weights for stage in stages):
        objectives["reconstruction"] = make_objective(model, work, seed, sizes)
    columns = [column for objective in objectives.values() for column in objective.columns()]
    settings = RunOptions(
        cache=str(cache),
        visits=sizes.visits,
        scenes=sizes.scenes,
        seed=seed,
        near=NEAR,
        kinds={"global": QUESTION_KINDS},
    )
    model = train(model, processor, stages, folder, settings, objectives, columns)
    validation = SceneSet("validation", sizes.validation)
    result: dict[str, Any] = {
        "arm": name,
        "seed": seed,
        "tokens": tokens_of(processor, validation, arm.views),
        "visits": list(sizes.visits),
        "seconds": json.loads((folder / "training_log.json").read_text())["seconds"],
        "scores": evaluate_packed(model, processor, validation, cache, arm.views),
    }
    if objectives:
        result["curve"] = read_curve(folder)
        result["errors"] = measure_errors(model, processor, objectives["reconstruction"], sizes.measured)
        draw_paintings(model, processor, objectives["reconstruction"], folder, sizes.painted)
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")


def short_plan(arm: Arm) -> list[Stage]:
    """The plan at the size of the halves: first and last stage, the tower frozen, the denoiser learning throughout.

    The denoiser of the paper comes trained from text to image and stays frozen at first; this one starts from nothing.
    """
    stages = get_plan(arm.plan)
    short = []
    for stage in (stages[0], stages[-1]):
        parts = {pattern: rate for pattern, rate in stage.trainable.items() if pattern != "vision_tower"}
        if stage.loss_weights:
            parts.setdefault(DENOISER, 1e-3)
        short.append(replace(stage, trainable=parts, views=arm.views))
    return small_rates(short)


def tokens_of(processor: Any, scenes: SceneSet, views: str) -> int:
    """Tokens of a scene."""
    side = scenes.options.scene_size
    return int(processor.image_processor(np.zeros((side, side, 3), np.uint8), views=views)["view_positions"][0][5])


# --- the small Stable Diffusion 3 ---


def make_objective(model: Any, work: Path, seed: int, sizes: Sizes) -> Reconstruction:
    """The objective with a small denoiser of the class of Stable Diffusion 3 and an autoencoder trained on scenes."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    vae = make_autoencoder(work / "vae.safetensors", sizes)
    torch.manual_seed(seed)
    denoiser = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=96,
        caption_projection_dim=96,
        pooled_projection_dim=96,
        pos_embed_max_size=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return Reconstruction.for_model(model, denoiser, vae, scheduler, rank=64, image_size=SIDE)


def make_autoencoder(file: Path, sizes: Sizes) -> Any:
    """A small autoencoder of 128 pixels to 16 x 16 x 8 numbers, trained on scenes for a minute or read back."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
    )
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        train_autoencoder(vae, sizes.vae_steps)
        with replacing(file) as partial:
            save_file(vae.state_dict(), partial)
    vae.load_state_dict(load_file(file))
    latents = encode_some(vae, 32 if sizes.vae_steps > 10 else 4)
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return vae.eval()


def scene_batch(numbers: list[int]) -> torch.Tensor:
    """Pictures of training scenes `(n, 3, 128, 128)`, -1 to 1."""
    scenes = SceneSet("train", max(numbers) + 1)
    return torch.stack([read_pixels(scenes.picture(number), SIDE) for number in numbers]).float() / 127.5 - 1


@torch.no_grad()
def encode_some(vae: Any, count: int) -> torch.Tensor:
    """Latents of the first scenes."""
    return vae.encode(scene_batch(list(range(count)))).latent_dist.mode()


def train_autoencoder(vae: Any, steps: int, batch_size: int = 8) -> None:
    """Absolute error and a weak Kullback-Leibler term, on the first 256 scenes."""
    pictures = scene_batch(list(range(min(256, 8 * steps))))
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        images = pictures[torch.randint(len(pictures), (batch_size,))]
        posterior = vae.encode(images).latent_dist
        painted = vae.decode(posterior.sample()).sample
        loss = (painted - images).abs().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("autoencoder, step %d: %.4f", step, loss.item())


# --- what reconstruction does ---


def read_curve(folder: Path) -> list[list[float]]:
    """Optimizer step and logged reconstruction loss over both stages."""
    curve: list[list[float]] = []
    for stage in sorted(folder.glob("[0-9]-*")):
        first = curve[-1][0] if curve else 0
        last = max(stage.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        curve += [
            [first + entry["step"], entry["loss/reconstruction"]]
            for entry in history
            if "loss/reconstruction" in entry
        ]
    return curve


@torch.no_grad()
def measure_errors(model: Any, processor: Any, objective: Reconstruction, count: int) -> list[dict]:
    """Mean squared error of the clean latent on validation scenes, from their own tokens and from those of another."""
    scenes = SceneSet("validation", count)
    pictures = [scenes.picture(number) for number in range(count)]
    seen = [look(model, processor, picture) for picture in pictures]
    tokens, embeddings = torch.cat([s[0] for s in seen]), torch.cat([s[1] for s in seen])
    clean = objective.encode_images(torch.stack([read_pixels(picture, SIDE) for picture in pictures]))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for level in LEVELS:
        sigma = torch.full((count,), level)
        noisy = add_noise(clean, noise, sigma)
        row: dict[str, float] = {"sigma": level, "variance": float(clean.var())}
        for name, shift in (("own", 0), ("another", 1)):
            prompt, pooled = objective.epigone(tokens.roll(shift, 0), embeddings.roll(shift, 0))
            output = objective.denoiser(
                noisy, encoder_hidden_states=prompt, pooled_projections=pooled, timestep=1000 * sigma
            )
            row[name] = float((clean_from_velocity(noisy, output.sample, sigma) - clean).square().mean())
        rows.append(row)
    return rows


def draw_paintings(model: Any, processor: Any, objective: Reconstruction, folder: Path, count: int) -> None:
    """Scenes, what the autoencoder keeps of them, and what is painted from their tokens, as one picture."""
    scenes = SceneSet("validation", count)
    figure = Figure(figsize=(1.5 * count, 4.6), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    for column in range(count):
        picture = scenes.picture(column)
        pixels = read_pixels(picture, SIDE)
        kept = objective.decode_latents(objective.encode_images(pixels[None]))[0]
        for row, image in enumerate((pixels, kept, paint(model, processor, objective, picture, steps=20))):
            axes[row, column].imshow(image.permute(1, 2, 0).numpy())
            axes[row, column].set(xticks=[], yticks=[])
    for row, name in enumerate(("scene, 128 px", "autoencoder", "from tokens")):
        axes[row, 0].set_ylabel(name)
    figure.savefig(folder / "paintings.png", dpi=110)


# --- results ---


def report(work: Path, target: Path) -> None:
    """Write what finished arms gave: JSON, table, pictures."""
    results = [json.loads(file.read_text()) for file in sorted(work.glob("*/result.json"))]
    if not results:
        logger.info("no arm is finished")
        return
    rows = [row_of(result) for result in results]
    if target == RESULTS:
        write_result("vlsa_needle", rows, sorted({row["seed"] for row in rows}))
    else:
        (target / "vlsa_needle.json").write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.write(make_table(rows) + "\n")
    draw(rows, target / "vlsa_needle.png")
    painted = sorted(work.glob("vlsa_reconstruction-*/paintings.png"))
    if painted:
        (target / "vlsa_needle_paintings.png").write_bytes(painted[0].read_bytes())


def row_of(result: dict) -> dict:
    """One row of the results: shares with their 95 % intervals."""
    scores = {}
    for name in result["scores"]:
        entry = result["scores"][name]
        low, high = wilson_interval(entry["right"], entry["questions"])
        scores[name] = {**entry, "wilson": [round(low, 4), round(high, 4)]}
    return {**result, "scores": scores}


def make_table(rows: list[dict]) -> str:
    """A Markdown table of the accuracies."""
    lines = ["| arm | seed | tokens | visits | minutes | " + " | ".join(NAMES) + " |", "|" + "---|" * (5 + len(NAMES))]
    for row in rows:
        cells = []
        for name in NAMES:
            entry = row["scores"][name]
            cells.append(f"{entry['accuracy']:.3f} ({entry['wilson'][0]:.3f}–{entry['wilson'][1]:.3f})")
        minutes = row["seconds"]["processor"] / 60
        lines.append(
            f"| {row['arm']} | {row['seed']} | {row['tokens']} | {sum(row['visits'])} | {minutes:.1f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy of all arms, and the reconstruction loss over training."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [f"{row['arm']}\n{row['tokens']} tokens, seed {row['seed']}" for row in rows]
    for offset, name in ((-0.2, "fine"), (0.2, "scene")):
        shares = np.array([row["scores"][name]["accuracy"] for row in rows])
        ends = np.array([row["scores"][name]["wilson"] for row in rows])
        errors = np.abs(np.stack([shares - ends[:, 0], ends[:, 1] - shares]))
        left.barh(np.arange(len(rows)) + offset, shares, 0.38, xerr=errors, label=name, capsize=2)
    left.set_yticks(range(len(rows)), labels, fontsize=7)
    left.set(xlabel="exact answers, 95 % interval", xlim=(0, 1))
    left.legend(fontsize=8)
    for row in rows:
        if row.get("curve"):
            steps, losses = zip(*row["curve"], strict=True)
            right.plot(steps, losses, label=f"seed {row['seed']}")
            right.legend(fontsize=8)
    right.set(xlabel="optimizer step", ylabel="error of the clean latent", ylim=(0, None))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
