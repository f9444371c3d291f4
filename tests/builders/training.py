"""Small training runs: models with known parts, conversations, and a Trainer for one stage."""

from builders.tiny import random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids


COMPRESS = {"part": "query_compressor", "on": "crops", "num_queries": 4}
QUIET_ROUTER = {"part": "router", "on": "crops", "keep": {"rule": "threshold", "gamma": 0.75}, "noise": 0.0}


def slime_config(**connector):
    """The `slime` preset at tiny size: 4 queries a crop, at most 4 crops, a router without noise."""
    changes = {"view_ops": [COMPRESS], "token_ops": [QUIET_ROUTER], **connector}
    return tiny_config("slime", connector_config=changes, planner={"name": "slime", "max_crops": 4})


def query_former_config():
    """A query former for every view and no router: nothing random in training."""
    connector = {"view_ops": [], "adapter": {"part": "query_former", "num_queries": 4}, "token_ops": []}
    return tiny_config("slime", connector_config=connector, planner={"name": "slime", "max_crops": 4})


def slime_parts(seed=0, **connector):
    """A tiny SliME model in training mode and its processor (ChatML)."""
    config = slime_config(**connector)
    return tiny_model(config, seed).train(), tiny_processor(config, "chatml")


def fusion_parts(seed=0, **options):
    """A tiny fusion model in training mode (12 queries, 3 in later turns, unless options say otherwise), and its
    processor (ChatML)."""
    fusion = {"part": "fusion", "num_queries": 12, "later_queries": 3, "num_layers": 2, "num_heads": 4, **options}
    planner = {"name": "hd", "max_crops": 4}
    config = tiny_config("fusion", connector_config={"token_ops": [fusion]}, planner=planner)
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids = answer_prefix_ids(processor)
    config.question_prefix_ids = question_prefix_ids(processor)
    return tiny_model(config, seed).train(), processor


def conversation(number: int, images: int = 1) -> dict:
    """One question on some images of different sizes; every number gives another text and other pictures."""
    marks = "<image>\n" * images
    pictures = [random_image(60 + 20 * ((number + index) % 3), 90, 10 * number + index) for index in range(images)]
    return {
        "messages": [
            {"role": "user", "content": f"{marks}How many cats are on table {number}?"},
            {"role": "assistant", "content": f"A small boat and {number} cats."},
        ],
        "images": pictures,
    }


def conversations(count: int, images: int = 1) -> list[dict]:
    """Different conversations."""
    return [conversation(number, images) for number in range(count)]


def training_arguments(folder, **changes):
    """Arguments of a short quiet run on the CPU."""
    from hires_lmm.training.arguments import build_arguments

    values = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "adamw_torch",
    }
    return build_arguments(folder, **{**values, **changes})


def make_trainer(model, processor, stage, data, folder, collator=None, callbacks=(), trainer_kwargs=None, **changes):
    """A stock Trainer for one stage, with the optimizer built by the stage."""
    from transformers import Trainer

    from hires_lmm.training import HiResLmmCollator, StageCallback

    args = training_arguments(folder, **changes)
    extra = {"optimizer_cls_and_kwargs": stage.optimizer_cls_and_kwargs(args)}
    return Trainer(
        model,
        args,
        train_dataset=data,
        data_collator=collator or HiResLmmCollator(processor, views=stage.views),
        processing_class=processor,
        callbacks=[StageCallback(stage, show_table=False), *callbacks],
        **(extra if trainer_kwargs is None else trainer_kwargs),
    )


def losses(trainer) -> list[float]:
    """The losses that a trainer logged, exactly."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
