"""What generation must give, written without splice, packing, cache or batch.

One sample at a time: the text goes through the tokenizer piece by piece, the visual tokens of each image are taken
from a run without a budget, selected here, concatenated between the pieces, and the bare language model runs over the
whole sequence again for every new token.
"""

import itertools
import re
from collections.abc import Callable

import torch

from builders.tiny import make_batch


MIN_SCORE_GAP = 1e-5


# --- kinds of visual tokens ----------------------------------------------------------------------------------------
def layout_kinds(positions: list[list[int]], spans: list[list[int]], layout: dict) -> list[str]:
    """`"global"`, `"crop"`, `"frame"` or `"mark"` for every visual token, from the views of one image, or one video of
    frames alone, and a token layout dict.

    Args:
        positions (`list`): Rows of `view_positions` of one image; the first is its global view.
        spans (`list`): Rows of `view_spans` of the same views.
        layout (`dict`): The token layout of the config.
    """
    grids, arrangement = layout["grids"], layout["layout"]
    marks = {separator["place"] for separator in arrangement["separators"].values()}  # one token each in the presets
    order = [name for name in arrangement["order"] if name in grids]

    def extent(span: list[int], name: str) -> list[int]:
        """Token rows and columns of a view; a side may be empty while the other is not."""
        grid = [grids[name]["rows"], grids[name]["cols"]]
        if grids[name].get("whole"):
            span = [0, layout["patch_grid"][0], 0, layout["patch_grid"][1]]
        sides = zip(span[0::2], span[1::2], grid, layout["patch_grid"], strict=True)
        return [
            -(-end * n // patches) - start * n // patches if end > start else 0 for start, end, n, patches in sides
        ]

    if positions[0][0] == 3:
        frames = [["frame"] * (rows * columns) for rows, columns in (extent(span, "frames") for span in spans)]
        mark = ["mark"] if "between_frames" in marks else []
        return [kind for number, frame in enumerate(frames) for kind in (mark if number else []) + frame]
    rows, columns = extent(spans[0], "global")
    global_block = ["global"] * (rows * columns)
    row_end = ["mark"] if "token_row_end" in marks else []
    crops = {}
    for position, span in list(zip(positions, spans, strict=True))[1:]:
        if "crops" in order:
            crops[position[3], position[4]] = extent(span, "crops")
    blocks = []  # one list of kinds a block, without the marks after and between blocks
    if arrangement["crop_order"] == "raster":  # rows without columns keep their marks, as in LLaVA-NeXT
        block = []
        for row in sorted({row for row, _ in crops}):
            band = [crops[key] for key in sorted(crops) if key[0] == row]
            block += (["crop"] * sum(columns for _, columns in band) + row_end) * band[0][0]
        blocks.append(block)
    else:
        for _, (rows, columns) in sorted(crops.items()):
            blocks.append((["crop"] * columns + row_end) * (rows if columns else 0))
    blocks = [global_block, *blocks] if order[0] == "global" else [*blocks, global_block]
    kinds = []
    for block in [block for block in blocks if block]:
        if "between_views" in marks and kinds:
            kinds.append("mark")
        kinds += block + (["mark"] if "view_end" in marks else [])
    return kinds


# --- selection -----------------------------------------------------------------------------------------------------
def select_by_saliency(tokens: torch.Tensor, kinds: list[str], budget: int | None, on: str = "all") -> list[int]:
    """Indices of the visual tokens that stay under a budget, in their order.

    A token's score is 1 - cosine to the mean of the image's scored tokens; marks and kinds outside `on` always stay.

    Args:
        tokens (`torch.Tensor` of shape `(n, D)`): All visual tokens of one image.
        kinds (`list[str]`): Kind of each token.
        budget (`int` or `None`): Tokens of the image that may stay, marks included; `None` keeps all.
        on (`str`): `"all"`, `"crops"` or `"global"`: the kinds that compete.

    Raises:
        AssertionError: If two scores at the border are too close for a float comparison to be a fair test.
    """
    count = len(kinds)
    assert tokens.shape[0] == count, f"{tokens.shape[0]} visual tokens, {count} kinds"
    if budget is None or budget >= count:
        return list(range(count))
    scored_kinds = {"all": {"global", "crop", "frame"}, "crops": {"crop"}, "global": {"global"}}[on]
    scored = [index for index, kind in enumerate(kinds) if kind in scored_kinds]
    protected = [index for index in range(count) if index not in set(scored)]
    vectors = tokens[scored].double()
    mean = vectors.mean(0)
    scores = [1 - float(v @ mean) / float(v.norm() * mean.norm()) for v in vectors]
    ranked = sorted(range(len(scored)), key=lambda index: (-scores[index], index))
    keep = budget - len(protected)
    assert 0 < keep <= len(scored), f"{keep} of {len(scored)} scored tokens"
    if keep < len(scored):
        gap = scores[ranked[keep - 1]] - scores[ranked[keep]]
        assert gap > MIN_SCORE_GAP, f"the test image leaves a gap of {gap} between kept and dropped: take another seed"
    return sorted(protected + [scored[index] for index in ranked[:keep]])


# --- the prompt's vectors ------------------------------------------------------------------------------------------
def full_visual_tokens(model, processor, images: list, **images_kwargs) -> tuple[list[torch.Tensor], list[list[str]]]:
    """All visual tokens of each image from a run without a budget, and their kinds."""
    if not images:
        return [], []
    text = "".join(processor.video_token if isinstance(source, list) else processor.image_token for source in images)
    batch = make_batch(processor, [(text, images)], **images_kwargs)
    with torch.no_grad():
        geometry = {name: batch[name] for name in ("view_positions", "view_boxes", "view_spans")}
        pixel_values = batch["pixel_values"].to(model.dtype)
        features = model.model.get_image_features(pixel_values=pixel_values, **geometry).pooler_output
    positions, spans = batch["view_positions"].tolist(), batch["view_spans"].tolist()
    starts = [index for index, row in enumerate(positions) if row[8] == 1] + [len(positions)]
    layout = model.config.token_layout()
    kinds = [layout_kinds(positions[a:b], spans[a:b], layout) for a, b in itertools.pairwise(starts)]
    return list(features), kinds


def split_text(processor, text: str) -> list[str]:
    """What stands before, between and behind images and videos."""
    return re.split(f"{re.escape(processor.image_token)}|{re.escape(processor.video_token)}", text)


def prompt_embeds(
    model,
    processor,
    text: str,
    images: list,
    budget: int | None = None,
    on: str = "all",
    select: Callable | None = None,
) -> torch.Tensor:
    """The vectors `(1, length, D)` that must enter the language model for one sample.

    Args:
        text (`str`): Prompt with one `<image>` an image.
        images (`list`): The images; a list of frames is a video.
        budget (`int`, *optional*): `max_image_tokens` of the call.
        on (`str`): Which kinds compete for the budget.
        select (`Callable`, *optional*): Another selection rule `(tokens, kinds, budget, on) -> indices`.
    """
    tokens, kinds = full_visual_tokens(model, processor, images)
    table = model.model.language_model.get_input_embeddings()
    pieces = split_text(processor, text)
    assert len(pieces) == len(images) + 1
    parts = []
    for index, piece in enumerate(pieces):
        ids = processor.tokenizer(piece, add_special_tokens=False).input_ids
        if ids:
            parts.append(table(torch.tensor(ids)))
        if index < len(images):
            keep = (select or select_by_saliency)(tokens[index], kinds[index], budget, on)
            parts.append(tokens[index][keep].to(parts[0].dtype if parts else tokens[index].dtype))
    return torch.cat(parts)[None].detach()


# --- decoding without any cache ------------------------------------------------------------------------------------
@torch.no_grad()
def run_logits(model, embeds: torch.Tensor, new_ids: list[int] = ()) -> torch.Tensor:
    """Logits `(length, vocabulary)` of the bare backbone and head over a prompt and forced ids, one full forward."""
    backbone = model.model.language_model
    if len(new_ids):
        embeds = torch.cat([embeds, backbone.get_input_embeddings()(torch.tensor(list(new_ids)))[None]], dim=1)
    hidden = backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)[0].float()
    softcap = getattr(model.config.text_config, "final_logit_softcapping", None)
    return torch.tanh(logits / softcap) * softcap if softcap else logits


@torch.no_grad()
def greedy(
    model, embeds, max_new_tokens: int, eos: tuple[int, ...] = (), process: Callable | None = None
) -> list[int]:
    """Greedy ids of one sample. `process(new_ids, logits) -> logits` may change the scores of a step."""
    ids: list[int] = []
    while len(ids) < max_new_tokens and not (ids and ids[-1] in eos):
        logits = run_logits(model, embeds, ids)[-1]
        logits = process(ids, logits.clone()) if process else logits
        ids.append(int(logits.argmax()))
    return ids


@torch.no_grad()
def sample(model, embeds, max_new_tokens: int, temperature: float = 1.0) -> list[int]:
    """Sampled ids of one sample, drawn with the global generator one step after the other."""
    ids: list[int] = []
    for _ in range(max_new_tokens):
        probabilities = torch.softmax(run_logits(model, embeds, ids)[-1:] / temperature, dim=-1)
        ids.append(int(torch.multinomial(probabilities, 1)))
    return ids


@torch.no_grad()
def beam_search(
    model,
    embeds,
    num_beams: int,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    eos: tuple[int, ...] = (),
    length_penalty: float = 1.0,
    process: Callable | None = None,
) -> list[list[int]]:
    """The best hypotheses of one sample, best first: the library's rules for `early_stopping=False`."""
    width = max(2, 1 + len(eos)) * num_beams
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, max_new_tokens + 1):
        candidates = []
        for score, ids in running:
            log_probs = torch.log_softmax(run_logits(model, embeds, ids)[-1], dim=-1)
            log_probs = process(ids, log_probs) if process else log_probs
            values, tokens = log_probs.topk(min(width, len(log_probs)))
            candidates += [(score + v, [*ids, t]) for v, t in zip(values.tolist(), tokens.tolist(), strict=True)]
        candidates = sorted(candidates, key=lambda pair: -pair[0])[:width]
        ends = [length == max_new_tokens or ids[-1] in eos for _, ids in candidates]
        running = [pair for pair, end in zip(candidates, ends, strict=True) if not end][:num_beams]
        done = [
            (score / length**length_penalty, ids)
            for (score, ids), end in zip(candidates[:num_beams], ends[:num_beams], strict=True)
            if end
        ]
        finished = sorted(finished + done, key=lambda pair: -pair[0])[:num_beams]
        full = len(finished) == num_beams
        if not running or (full and running[0][0] / length**length_penalty <= finished[-1][0]):
            break
    return [ids for _, ids in finished[:num_return_sequences]]


def new_tokens(sequences: torch.Tensor, prompt_length: int, lengths: list[int] | None = None) -> list[list[int]]:
    """Generated ids a row, cut to `lengths` where the rows are padded at their end."""
    rows = [row[prompt_length:].tolist() for row in sequences]
    return rows if lengths is None else [row[:length] for row, length in zip(rows, lengths, strict=True)]
