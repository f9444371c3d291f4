"""One token an image: a compressor of the whole picture, and layers that let the prompt read the rest (LLaVA-Mini)."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers import initialization as init

from .attention_hires_lmm import (
    HiResLmmCrossAttention,
    default_num_heads,
    resize_positions,
    sincos_positions,
    square_side,
)
from .bases_hires_lmm import HiResLmmTokenOp, HiResLmmViewOp, PartContext, Traits
from .carriers_hires_lmm import ImageGeometry, Question, ViewFeatures, ViewGroup, VisualTokens, map_edges
from .geometry_hires_lmm import KINDS, MAIN_TOWER, WHOLE_KINDS, Grid, Kind
from .inputs_hires_lmm import copy_to_host


DETAIL = (KINDS["detail"], MAIN_TOWER)


class HiResLmmMiniCompressor(HiResLmmViewOp):
    """Learned queries read the map of all crops of an image, or its global view where it has none, and each frame of a
    video; what they give joins the other views as one of the kind `detail`.

    Source: LLaVA-Mini, huggingface.co/papers/2501.03895, and its released code (ictnlp/LLaVA-Mini). Ours: crops in
    any grid, without their padding where the planner leaves it out.
    """

    needs_equal_views = True

    positions: torch.Tensor

    @strict
    @dataclass
    class Options:
        """Options of `mini_compressor`.

        Args:
            num_queries (`int`): Tokens of an image, a square number; the paper's is 1, whose keys have no positions.
            num_heads (`int`): Heads of the attention.
        """

        num_queries: int = 1
        num_heads: int = 8

        def __post_init__(self) -> None:
            square_side(self.num_queries, "num_queries")
            if self.num_heads < 1:
                raise ValueError(f"num_heads={self.num_heads} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        width = context.width
        self.side = square_side(options.num_queries, "num_queries")
        self.crop_grid = context.grids.get((int(Kind.CROP), MAIN_TOWER))
        self.queries = nn.Parameter(torch.empty(options.num_queries, width))
        self.register_buffer("positions", sincos_positions(width, self.side, rounded=False).to(self.queries.dtype))
        self.query_norm, self.key_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = HiResLmmCrossAttention(context.config, width, options.num_heads)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """One more view an image, and for each frame, of the kind `detail`."""
        if (int(Kind.GLOBAL), MAIN_TOWER) not in context.grids:
            raise ValueError("mini_compressor needs a global view of every image, but none reaches it.")
        side = square_side(options.num_queries, "num_queries")
        grid = Grid(side, side, stride=None, whole=True, source=WHOLE_KINDS)
        return Traits({**context.grids, DETAIL: grid}, context.width)

    def init_weights(self) -> None:
        """Initialise queries and fill the position table."""
        init.trunc_normal_(self.queries, std=0.02)
        init.copy_(self.positions, sincos_positions(self.queries.shape[1], self.side, rounded=False))

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Add a group of compressed tokens `(U, num_queries, C)`, one an image or frame."""
        main, frames, crops = (views.group(name) for name in ("global", "frames", "crops"))
        rows = [sorted(image.rows(Kind.GLOBAL) + image.rows(Kind.FRAME)) for image in views.images]
        shown = {row: group for group in (main, frames) if group is not None for row in group.rows}
        if not all(rows) or any(row not in shown for own in rows for row in own):
            raise ValueError("mini_compressor needs the global view of every image; make the batch with views='all'.")
        read = [
            self._read(image, row, shown[row], crops)
            for image, own in zip(views.images, rows, strict=True)
            for row in own
        ]
        values = self.key_norm(torch.cat([tokens for tokens, _ in read]))
        keys = values + torch.cat([positions for _, positions in read])
        queries = (self.query_norm(self.queries) + self.positions.to(values.dtype)).expand(len(read), -1, -1)
        features = self.attention.read_ragged(queries, keys, values, [len(tokens) for tokens, _ in read])
        made = ViewGroup(int(Kind.DETAIL), features, (self.side, self.side), tuple(row for own in rows for row in own))
        return replace(views, groups=[*views.groups, made])

    def _read(
        self, image: ImageGeometry, row: int, whole: ViewGroup, crops: ViewGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the queries of an image or frame read, and its positions on the map that it is: `(n, C)` each."""
        table = self.positions.to(whole.features.dtype)
        if whole.kind == Kind.FRAME or crops is None or self.crop_grid is None or not image.rows(Kind.CROP):
            return whole.features[whole.rows.index(row)], resize_positions(table, whole.grid)
        views, tops, lefts = map_edges(image, self.crop_grid, Kind.CROP)
        table = resize_positions(table, (tops[-1], lefts[-1])).unflatten(0, (tops[-1], lefts[-1]))
        tokens, positions = [], []
        for number, (view, (top, bottom, left, right)) in views.items():
            plane = crops.features[crops.rows.index(image.first_view + number)].unflatten(0, crops.grid)
            tokens.append(plane[top:bottom, left:right].flatten(0, 1))
            row, col = tops[view.row], lefts[view.col]
            positions.append(table[row : row + bottom - top, col : col + right - left].flatten(0, 1))
        return torch.cat(tokens), torch.cat(positions)


class HiResLmmPromptFuser(HiResLmmTokenOp):
    """Decoder layers read all visual tokens, the compressed ones and the prompt, in that order; what they make of the
    compressed tokens and of the prompt goes on to the language model, the other visual tokens do not.

    The prompt is the readable text of an image: that of its turn, or all of it with `question_scope="prompt"`. It is
    read once; answers and later turns keep their embeddings. Each frame of a video is read like an image. Text about
    several images or frames becomes the mean over them.

    Source: LLaVA-Mini, huggingface.co/papers/2501.03895, and its released code (ictnlp/LLaVA-Mini), which reads the
    whole prompt. Ours: gradients into the word embeddings, several images, their own turns.
    """

    @strict
    @dataclass
    class Options:
        """Options of `prompt_fuser`.

        Args:
            num_layers (`int`): Decoder layers.
            num_heads, num_key_value_heads (`int`, *optional*): Heads, one per 128 channels by default.
            intermediate_size (`int`, *optional*): Width of the perceptrons; four times the width by default.
            rms_norm_eps, rope_theta (`float`): As in Llama.
            rope_scaling (`dict`, *optional*): How positions are scaled, as in the `rope_parameters` of transformers,
                such as `{"rope_type": "llama3", ...}`; not at all by default.
            compat (`str`, *optional*): `"release"`: the token id 0 is not read, and no gradient reaches the word
                embeddings through the layers.
        """

        num_layers: int = 4
        num_heads: int | None = None
        num_key_value_heads: int | None = None
        intermediate_size: int | None = None
        rms_norm_eps: float = 1e-5
        rope_theta: float | int = 500000.0
        rope_scaling: dict | None = None
        compat: Literal["release"] | None = None

        def __post_init__(self) -> None:
            for name in ("num_layers", "num_heads", "num_key_value_heads", "intermediate_size"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ValueError(f"{name}={value} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        heads = options.num_heads or default_num_heads(context.width)
        if context.width % heads or context.width // heads % 2 or heads % (options.num_key_value_heads or heads):
            raise ValueError(
                f"num_heads={heads} must cut the width {context.width} into heads of even size, and "
                f"num_key_value_heads={options.num_key_value_heads} must divide it; use others."
            )
        scaling = options.rope_scaling or {}
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=context.width,
            intermediate_size=options.intermediate_size or 4 * context.width,
            num_hidden_layers=options.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=options.num_key_value_heads or heads,
            rms_norm_eps=options.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": float(options.rope_theta), **scaling},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        config._attn_implementation = context.config._attn_implementation
        self.num_tokens = context.grids[DETAIL].rows * context.grids[DETAIL].cols
        self.model = LlamaModel(config)
        self.model.embed_tokens, self.model.norm = None, nn.Identity()  # it gets embeddings; no norm behind it

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """It leaves the compressed tokens alone and rewrites the prompt."""
        order = [] if context.config is None else (context.config.layout or {}).get("order", [])
        if DETAIL not in context.grids or "detail" not in order:
            raise ValueError(
                "prompt_fuser leaves the tokens of the view op mini_compressor, but there are none; put that into "
                'view_ops, and "detail" last into layout.order.'
            )
        if context.width != context.text_width:
            raise ValueError(
                f"prompt_fuser reads word embeddings of width {context.text_width} beside visual tokens of width "
                f"{context.width}; use an adapter that projects, such as mlp."
            )
        return Traits(
            context.grids,
            context.width,
            reads_question=True,
            writes_question=True,
            count="own",
            own_tokens="detail",
        )

    def forward(self, tokens: VisualTokens, question: Question | None) -> tuple[VisualTokens, Question | None]:
        """The compressed tokens, and the question with other embeddings where it was read."""
        image = torch.arange(len(tokens.lengths)).repeat_interleave(torch.tensor(tokens.lengths))
        is_made = tokens.kind == Kind.DETAIL
        rows = [sorted(own.rows(Kind.GLOBAL) + own.rows(Kind.FRAME)) for own in tokens.images]
        units = [(number, row) for number, own in enumerate(rows) for row in own]
        found = int(is_made.sum())
        if found != self.num_tokens * len(units) or not all(rows):
            raise ValueError(
                f"prompt_fuser leaves {self.num_tokens} compressed tokens of each of {len(rows)} images, or of each "
                f"frame of a video, but {found} are there; make the batch with views='all' or 'global'."
            )
        unit = torch.tensor([units.index((number, own[0])) for number, own in enumerate(rows)])[image]
        for number, (own, row) in enumerate(units):  # crops and separators go with the first view
            unit[(image == own) & (tokens.view == row)] = number
        lengths, number_of = torch.bincount(unit).tolist(), [self.num_tokens * len(own) for own in rows]
        order = (2 * unit + is_made).argsort(stable=True)  # compressed tokens behind the others
        parts = tokens.features[order.to(tokens.features.device)].split(lengths)
        places = [] if question is None else self._places(question)
        places = [places[own] for own, _ in units] if places else []
        if question is not None:
            embeds = question.embeds.detach() if self.options.compat == "release" else question.embeds
            texts = [embeds[row, columns].to(parts[0].dtype) for row, columns in places]
            parts = tuple(torch.cat(pair) for pair in zip(parts, texts, strict=True))
        batch = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)  # padding stands behind, where no one looks
        hidden = self.model(inputs_embeds=batch, use_cache=False).last_hidden_state
        ends, number = torch.tensor(lengths).cumsum(0).tolist(), self.num_tokens
        at = torch.cat([order[end - number : end] for end in ends])
        result = replace(
            tokens,
            features=torch.cat([own[size - number : size] for own, size in zip(hidden, lengths, strict=True)]),
            lengths=number_of,
            num_tokens=list(number_of),
            view=tokens.view[at],
            cell=tokens.cell[at],
            kind=tokens.kind[at],
            scores={},
            plan=None,
        )
        if question is None:
            return result, None
        read = [own[size:][: len(place[1])] for own, size, place in zip(hidden, lengths, places, strict=True)]
        return result, _write(question, places, torch.cat(read))

    def _places(self, question: Question) -> list[tuple[int, torch.Tensor]]:
        """Row and columns of the text that each image is read with."""
        mask = question.image_mask()
        if self.options.compat == "release" and question.ids is not None:
            mask = mask & (question.ids[question.image_row] != 0)
        rows, mask = copy_to_host(question.image_row, mask)
        device = question.embeds.device
        return [(row, own.nonzero()[:, 0].to(device)) for row, own in zip(rows.tolist(), mask, strict=True)]


def _write(question: Question, places: list[tuple[int, torch.Tensor]], read: torch.Tensor) -> Question:
    """Put what was read of the text in the place of its embeddings; the mean where several images share it."""
    embeds = question.embeds
    rows = torch.cat([torch.full_like(columns, row) for row, columns in places])
    at = (rows, torch.cat([columns for _, columns in places]))
    total = torch.zeros_like(embeds).index_put(at, read.to(embeds), accumulate=True)
    count = embeds.new_zeros(embeds.shape[:2]).index_put(at, embeds.new_ones(len(rows)), accumulate=True)[..., None]
    return replace(question, embeds=torch.where(count > 0, total / count.clamp(min=1), embeds))
