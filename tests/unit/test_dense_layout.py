"""The dense layout of image tensors: rows of samples hold the views of the flat layout, and what cannot be cut is
refused."""

import numpy as np
import pytest
import torch

from builders import GEOMETRY, random_image
from builders.trl import trl_parts
from hires_lmm.modeling.inputs_hires_lmm import take_images
from hires_lmm.processing.dense_layout_hires_lmm import pack_samples


IMAGES = [[random_image(80, 120, 1), random_image(60, 60, 2)], [random_image(200, 60, 3), random_image(70, 300, 4)]]
TEXTS = ["<image><image> a", "<image> <image> which one"]
EVEN = {"padding": True, "return_tensors": "pt"}


def flat_images() -> list:
    return [image for own in IMAGES for image in own]


@pytest.mark.parametrize("preset", ["llava_next", "llava_uhd", "mg_llava"])
def test_rows_hold_the_views_of_their_sample_in_order(preset):
    """Read off cell by cell: the main views of a sample, then those of its extra tower, padded at bottom and right."""
    _, processor = trl_parts(preset)
    flat = processor.image_processor(flat_images())
    dense = processor.image_processor(IMAGES, image_layout="dense")
    sources = [name for name in flat if name.startswith("pixel_values")]
    assert set(dense) == {"pixel_values", "pixel_attention_mask"}
    image_of = np.cumsum(flat["view_positions"][:, 8]) - 1
    extra = [] if len(sources) == 1 else [(2, row, row // 2) for row in range(len(flat[sources[1]]))]
    main = [(1, row, image_of[row] // 2) for row in range(len(image_of))]
    for sample in (0, 1):
        wanted = [view for view in (*main, *extra) if view[2] == sample]
        assert dense["pixel_attention_mask"][sample, :, 0].tolist() == [
            *(view[0] for view in wanted),
            *[0] * (dense["pixel_values"].shape[1] - len(wanted)),
        ]
        for place, (source, row, _) in enumerate(wanted):
            view = flat[sources[source - 1]][row]
            shown = dense["pixel_values"][sample, place]
            assert (shown[:, : view.shape[1], : view.shape[2]] == view).all()
            assert not shown[:, view.shape[1] :].any() and not shown[:, :, view.shape[2] :].any()
            geometry = np.concatenate([flat[name][row] for name in GEOMETRY[1:]]) if source == 1 else np.zeros(17)
            assert (dense["pixel_attention_mask"][sample, place, 1:] == geometry).all()
        assert not dense["pixel_values"][sample, len(wanted) :].any()


@pytest.mark.parametrize("preset", ["llava_next", "llava_uhd", "mg_llava"])
def test_the_model_sees_the_flat_tensors_again(preset):
    model, processor = trl_parts(preset)
    flat = processor.image_processor(flat_images(), return_tensors="pt")
    dense = dict(processor.image_processor(IMAGES, image_layout="dense", return_tensors="pt"))
    given = take_images(model.config, dense)
    for name in GEOMETRY:
        assert torch.equal(getattr(given, name), flat[name])
    assert all(torch.equal(given.extra[name], flat[name]) for name in flat if name.startswith("pixel_values_"))
    assert not dense, "nothing is left for the language model"


def test_samples_without_images_have_empty_rows():
    data = {
        "pixel_values": np.ones((2, 3, 4, 4), dtype=np.float32),
        "view_positions": np.array([[0] * 8 + [1], [0] * 8 + [1]]),
        "view_boxes": np.ones((2, 4), dtype=np.int64),
        "view_spans": np.ones((2, 4), dtype=np.int64),
    }
    dense = pack_samples(data, [0, 2, 0])
    assert dense["pixel_attention_mask"][:, :, 0].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert dense["pixel_values"].sum(axis=(2, 3, 4)).tolist() == [[0, 0], [48, 48], [0, 0]]


# ---- which layout a call gives --------------------------------------------------------------------------------------
def layout_of(batch) -> str:
    return "dense" if "pixel_attention_mask" in batch else "flat"


def test_one_tensor_of_evenly_nested_images_comes_out_dense():
    _, processor = trl_parts("llava_next")
    assert layout_of(processor(images=IMAGES, text=TEXTS, **EVEN)) == "dense"
    assert layout_of(processor(images=IMAGES, text=TEXTS, image_layout="flat", **EVEN)) == "flat"


@pytest.mark.parametrize("options", [{"padding": True}, {"return_tensors": "pt", "padding": "max_length"}, {}])
def test_other_calls_stay_flat(options):
    _, processor = trl_parts("llava_next")
    same = ["<image> a"] * 2
    options = {"max_length": 500, **options} if options.get("padding") == "max_length" else options
    assert layout_of(processor(images=[own[:1] for own in IMAGES], text=same, **options)) == "flat"
    assert layout_of(processor(images=flat_images(), text=TEXTS, **EVEN)) == "flat"
    assert layout_of(processor(images=[IMAGES[0], []], text=[TEXTS[0], "none"], **EVEN)) == "flat"
    assert layout_of(processor(images=[IMAGES[0], IMAGES[1][:1]], text=[TEXTS[0], "<image>"], **EVEN)) == "flat"


def chats() -> list:
    return [[{"role": "user", "content": [{"type": "image", "image": own[0]}]}] for own in IMAGES]


def test_a_chat_template_is_flat_unless_the_processor_is_dense():
    _, processor = trl_parts("llava_next")
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    assert layout_of(processor.apply_chat_template(chats(), **options)) == "flat"
    options["processor_kwargs"]["image_layout"] = "dense"
    assert layout_of(processor.apply_chat_template(chats(), **options)) == "dense"
    del options["processor_kwargs"]["image_layout"]
    processor.image_processor.image_layout = "dense"
    assert layout_of(processor.apply_chat_template(chats(), **options)) == "dense"


def test_a_dense_processor_gives_images_to_texts_by_their_placeholders():
    _, processor = trl_parts("llava_next", image_layout="dense")
    wanted = processor(images=IMAGES, text=TEXTS, **EVEN)
    found = processor(images=flat_images(), text=TEXTS, **EVEN)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    one = processor(images=IMAGES[0][0], text="<image> a", return_tensors="pt")
    assert one["pixel_values"].shape[0] == 1 and layout_of(one) == "dense"
    budgets = processor(images=flat_images(), text=TEXTS, max_image_tokens=[40, 30, 40, 30], **EVEN)
    assert (budgets["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [70, 70]


def test_the_layout_is_taken_at_loading_checked_and_not_saved(tmp_path):
    """What a trainer saves goes to servers that know the flat layout alone."""
    from transformers import AutoProcessor

    _, processor = trl_parts("llava_next")
    processor.save_pretrained(tmp_path)
    dense = AutoProcessor.from_pretrained(tmp_path, image_layout="dense")
    dense.save_pretrained(tmp_path / "dense")
    assert dense.image_processor.image_layout == "dense"
    assert AutoProcessor.from_pretrained(tmp_path / "dense").image_processor.image_layout is None
    with pytest.raises(ValueError, match="image_layout='rows' must be 'flat', 'dense' or None"):
        AutoProcessor.from_pretrained(tmp_path, image_layout="rows")


# ---- refused --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("counts", [(2, 0), (0, 2), (1, 2, 0), (2, 2, 0, 0)])
def test_as_many_images_as_samples_but_not_one_each_is_refused(counts):
    """TRL compares the number of rows with that of images, and would cut the rows by image."""
    _, processor = trl_parts("llava_next", image_layout="dense")
    images = [[random_image(50, 60)] * count for count in counts]
    texts = ["<image>" * count + "a" for count in counts]
    with pytest.raises(ValueError, match="as many as samples but not one each"):
        processor(images=images, text=texts, **EVEN)
    processor(images=[*images, []], text=[*texts, "a"], **EVEN)  # one row more, and they are no longer as many


def test_what_trl_asks_of_a_flat_processor_says_what_to_set():
    _, processor = trl_parts("llava_next")
    with pytest.raises(ValueError, match='set image_layout="dense"'):
        processor.image_processor(images=IMAGES, crop_to_patches=True, return_tensors="pt")
    with pytest.raises(ValueError, match="needs images as one list a sample"):
        processor.image_processor(images=flat_images(), image_layout="dense")


def test_wrong_dense_tensors_are_refused():
    model, processor = trl_parts("llava_next")
    batch = dict(processor(images=IMAGES, text=TEXTS, **EVEN))
    flat = processor(images=flat_images(), text=TEXTS, **EVEN)
    for changes in (
        {"pixel_values": flat["pixel_values"]},
        {"pixel_attention_mask": batch["pixel_attention_mask"][:1]},
        {"pixel_attention_mask": batch["pixel_attention_mask"][..., :1]},
        {"pixel_values": None},
    ):
        with pytest.raises(ValueError, match="pixel_attention_mask has the shape"):
            model(**{**batch, **changes})
    with pytest.raises(ValueError, match="pass no view_positions beside it"):
        model(**batch, view_positions=flat["view_positions"])
    del batch["pixel_attention_mask"]
    for pixels in (batch["pixel_values"], flat["pixel_values"]):
        with pytest.raises(ValueError, match='give their processor image_layout="dense"'):
            model(input_ids=flat["input_ids"], pixel_values=pixels)
