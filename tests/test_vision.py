"""Vision-language models that generate for real: loss and gradient out of `train()` against brute force in float64.

There is a model for each layout of image inputs that can be built without torchvision. The oracle never sees the
library's image inputs: it gets the processor's inputs for each row alone, unpadded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from common import tiny
from datasets import Dataset
from helpers.oracle import distance, solve
from helpers.runs import config
from helpers.scripted import RecordingTrainer
from PIL import Image

from tbrm_trl import TBRMConfig
from tbrm_trl.batch import PER_TOKEN_INPUTS
from tbrm_trl.checks.data import check_sources_of_vision
from tbrm_trl.checks.model import VISION_MODEL_TYPES, check_vision
from tbrm_trl.evaluation.benchmarks import Benchmark
from tbrm_trl.evaluation.callback import EvaluationCallback
from tbrm_trl.evaluation.results import read_result
from tbrm_trl.evaluation.run import Settings
from tbrm_trl.evaluation.sampling import Sampling, rendered
from tbrm_trl.publishing import snippet
from tbrm_trl.sources.sampler import WindowMix
from tbrm_trl.trajectory import Trajectory

TOLERANCE = 1e-5

# Placeholders under the names by which the processors of the different families ask the tokenizer for them.
PLACEHOLDERS = dict(
    image_token="<image>", context_image_token="<image>", video_token="<video>", boi_token="<boi>", eoi_token="<eoi>",
    start_image_token="<boi>", end_image_token="<eoi>", boa_token="<boa>", eoa_token="<eoa>",
    fake_image_token="<fake_token_around_image>", end_of_utterance_token="<end_of_utterance>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>"
    "{% for c in m.content %}{{ '[<image>]' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tokenizer() -> hf.PreTrainedTokenizerFast:
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens=PLACEHOLDERS,
    )


IDS = {name: tokenizer().convert_tokens_to_ids(token) for name, token in PLACEHOLDERS.items()}
IMAGE = dict(image_token_id=IDS["image_token"], video_token_id=IDS["video_token"])
TEXT = {**tiny.ARCHITECTURES["qwen2"], "vocab_size": len(tokenizer()), "max_position_embeddings": 512}
LLAMA = {**TEXT, "model_type": "llama"}
MROPE = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
LOCAL = {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
TOWER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, depth=2, num_attention_heads=2, num_heads=2,
    num_key_value_heads=2, head_dim=8, patch_size=4, image_size=16, initializer_range=0.2,
)  # fmt: skip
QWEN_TOWER = {**TOWER, "embed_dim": 16, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1],
              "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
QWEN = dict(text_config=MROPE, vision_config=QWEN_TOWER, **IMAGE)
GRIDS = dict(image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]])
CLIP = {**TOWER, "model_type": "clip_vision_model"}
LLAVA = dict(text_config=LLAMA, vision_config=CLIP, image_token_index=IDS["image_token"])
IDEFICS = dict(text_config=LLAMA, vision_config=TOWER, scale_factor=2, **IMAGE)
GEMMA3 = dict(
    text_config={**LOCAL, "query_pre_attn_scalar": 8}, vision_config=TOWER, mm_tokens_per_image=4,
    image_token_index=IDS["image_token"], boi_token_index=IDS["boi_token"], eoi_token_index=IDS["eoi_token"],
)  # fmt: skip
INTERN = dict(
    text_config={**TEXT, "model_type": "qwen2"}, image_seq_length=4, **IMAGE,
    vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
)  # fmt: skip
SIZE = {"height": 16, "width": 16}


def image_only(processor: type[hf.ProcessorMixin], image_processor, **parts) -> hf.ProcessorMixin:
    """A processor without its video part, which needs torchvision."""

    class ImageOnly(processor):
        def check_argument_for_proper_class(self, name, argument):
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    return ImageOnly(image_processor=image_processor, tokenizer=tokenizer(), video_processor=None, **parts)


def qwen(processor):
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    return image_only(processor, images)


def llava(processor, image_processor, **options):
    images = image_processor(size={"shortest_edge": 16}, crop_size=SIZE, **options)
    return processor(images, tokenizer(), 4, "default", num_additional_image_tokens=1)


def idefics(image_processor):
    images = image_processor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return hf.Idefics3Processor(images, tokenizer(), image_seq_len=4)


def gemma3():
    return hf.Gemma3Processor(hf.Gemma3ImageProcessorPil(size=SIZE), tokenizer(), image_seq_length=4)


def internvl():
    images = hf.GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=True, max_patches=4)
    return image_only(hf.InternVLProcessor, images, image_seq_length=4)


# model type: configuration, processor
MODELS: dict[str, tuple[dict, Callable[[], hf.ProcessorMixin]]] = {
    # one row of pixel_values for each patch; image_grid_thw, mm_token_type_ids
    "qwen2_vl": ({**QWEN, "vision_config": {**QWEN_TOWER, "hidden_size": 32}}, lambda: qwen(hf.Qwen2VLProcessor)),
    "qwen2_5_vl": (QWEN, lambda: qwen(hf.Qwen2_5_VLProcessor)),
    "qwen3_vl": (QWEN, lambda: qwen(hf.Qwen3VLProcessor)),
    # for each image; with token_type_ids (Gemma 3), image_sizes (LLaVA-NeXT)
    "llava": (LLAVA, lambda: llava(hf.LlavaProcessor, hf.CLIPImageProcessorPil)),
    "llava_next": ({**LLAVA, **GRIDS}, lambda: llava(hf.LlavaNextProcessor, hf.LlavaNextImageProcessorPil, **GRIDS)),
    "gemma3": (GEMMA3, gemma3),
    # for each sample, padded to the most tiles that one has; pixel_attention_mask
    "idefics3": (IDEFICS, lambda: idefics(hf.Idefics3ImageProcessorPil)),
    "smolvlm": (IDEFICS, lambda: idefics(hf.SmolVLMImageProcessorPil)),  # its own processor needs num2words
    # for each tile
    "internvl": (INTERN, internvl),
}


def save(model_type: str, config: dict, processor: hf.ProcessorMixin, folder: Path) -> hf.ProcessorMixin | None:
    """Save a tiny model, and its processor if it can be loaded again; returns the processor if it cannot."""
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(model_type, **config)
    model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    tiny.perturb(model, seed=2)  # Gemma 3 projects its images with zeros at first
    model.save_pretrained(folder)
    processor.chat_template = CHAT_TEMPLATE.replace("<image>", processor.image_token)
    if type(processor).__name__ == "ImageOnly":
        return processor
    processor.save_pretrained(folder)
    return None


def test_benchmarks_are_asked_in_text(tmp_path):
    """The tokenizer reads them, by the template of the processor."""
    config, make = MODELS["llava"]
    processor = make()
    save("llava", config, processor, tmp_path)
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    benchmark = Benchmark("words", [[{"role": "user", "content": "ab"}]], {}, "helpers.reward_functions.letters")
    callback = EvaluationCallback([benchmark], Settings(1, Sampling(0.0, max_new_tokens=4)))
    args = SimpleNamespace(
        output_dir=str(tmp_path), chat_template_kwargs=None, process_index=0, world_size=1, disable_tqdm=True,
        should_save=True, bf16=False, fp16=False, deepspeed_plugin=None,
    )  # fmt: skip
    metrics: dict[str, float] = {}
    state = SimpleNamespace(global_step=1)
    callback.on_evaluate(args, state, None, model=model, processing_class=processor, metrics=metrics)
    header = read_result(tmp_path / "evaluations/step-1/words.jsonl").header
    assert "eval_words/avg@1" in metrics and "ab" in header["template"] and processor.tokenizer.chat_template is None
    tokenizer = processor.tokenizer
    tokenizer.chat_template = "{{ messages[0].role }}"
    with pytest.raises(ValueError, match="The chat template leaves out what is asked: 'ab' is not in 'user'"):
        rendered(tokenizer, benchmark.prompts[0])


def dataset(counts: tuple[int, ...]) -> list[dict]:
    """Prompts of different lengths with these numbers of images, of different sizes."""
    rng = np.random.default_rng(0)
    sizes = [[(*rng.choice([8, 16, 24, 32], 2), 3) for _ in range(count)] for count in counts]
    return [
        {
            "prompt": [{"role": "user", "content": "abcdefgh ij"[: 2 * row + 1]}],
            "images": [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in shapes],
        }
        for row, shapes in enumerate(sizes)
    ]


def trainer_on(data: list[dict], folder: Path, processor: hf.ProcessorMixin | None, **options) -> RecordingTrainer:
    return RecordingTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **kwargs: [0.1 * row for row in range(len(completions))],
        processing_class=processor,
        args=TBRMConfig(
            output_dir=str(folder / "out"),
            beta=0.1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=len(data) // 2,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            shuffle_dataset=False,
            max_completion_length=6,
            # A sampled placeholder would have no image. The end of the sequence should come now and then.
            generation_kwargs={"suppress_tokens": sorted({*IDS.values()}), "sequence_bias": [[[1], 3.0]]},
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(data),
        **options,
    )


def rollout(prompts: list, trainer: RecordingTrainer) -> dict[str, list]:
    """Made-up completions, since TRL itself generates no batch in which only some prompts have images."""
    encode = trainer.processing_class.apply_chat_template
    ids = [encode(p, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"][0] for p in prompts]
    completions = [[33 + row, 5, 40, 1][: 1 + row % 4] for row in range(len(prompts))]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * len(c) for c in completions]}


def plain(model: hf.PreTrainedModel) -> torch.nn.Module:
    """The model without any patch of the trainer, in float64."""
    config = copy.deepcopy(model.config)
    fresh = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    fresh.load_state_dict(model.state_dict())
    return fresh.double().eval()


def alone(trajectory: Trajectory, row: dict, processor: hf.ProcessorMixin) -> Trajectory:
    """The trajectory with the image inputs of its row alone."""
    images = [{"type": "image", "image": image} for image in row["images"]]
    text = {"type": "text", "text": row["prompt"][0]["content"]}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*images, text]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert inputs.pop("input_ids")[0].equal(trajectory.prompt_ids)
    del inputs["attention_mask"]
    for name in inputs.keys() & PER_TOKEN_INPUTS:
        inputs[name] = torch.cat([inputs[name][0], torch.zeros_like(trajectory.completion_ids)])
    return replace(trajectory, vision=dict(inputs))


@pytest.mark.parametrize(
    ("counts", "rollout_func"),
    [((1, 2, 1, 3), None), ((0, 0, 0, 0), None), ((2, 0, 1, 1, 2, 0), rollout)],
    ids=["images", "text", "mixed"],
)
@pytest.mark.parametrize("model_type", list(MODELS))
def test_loss_and_gradient(model_type, counts, rollout_func, tmp_path):
    config, processor = MODELS[model_type]
    data = dataset(counts)
    trainer = trainer_on(data, tmp_path, save(model_type, config, processor(), tmp_path), rollout_func=rollout_func)
    tiny.perturb(trainer.ref_model)
    policy, reference = plain(trainer.model), plain(trainer.ref_model)
    trainer.train()

    rows = [alone(t, row, trainer.processing_class) for t, row in zip(trainer.windows[0], data, strict=True)]
    answer = solve(policy, reference, rows, beta=0.1)
    expected = {name: g for name, g in answer.gradient.items() if g.norm() > 0}
    actual = {name: g for name, g in trainer.recorder.gradients[0].items() if name in expected}
    assert sum(trainer.losses) == pytest.approx(answer.loss, rel=TOLERANCE)
    assert distance(actual, expected) <= TOLERANCE
    assert any("vis" in name for name in expected) == any(counts)  # the images matter


@pytest.mark.parametrize("model_type", ["llava", "gemma3"])
def test_the_program_of_a_models_card_runs(model_type, tmp_path, capsys):
    config, processor = MODELS[model_type]
    assert save(model_type, config, processor(), tmp_path) is None
    exec(snippet(str(tmp_path), adapter=False, vision=True), {})
    assert "2 + 2 =" in capsys.readouterr().out


def test_untested_models_are_refused(tmp_path):
    assert set(MODELS) == VISION_MODEL_TYPES
    save("vipllava", LLAVA, llava(hf.LlavaProcessor, hf.CLIPImageProcessorPil), tmp_path)
    with pytest.raises(ValueError, match=r"type 'vipllava' are not supported.*qwen2_vl.*pass the tokenizer"):
        trainer_on(dataset((1, 1)), tmp_path, None)
    check_vision(hf.AutoModelForImageTextToText.from_pretrained(tmp_path), is_vision=False)


@pytest.mark.parametrize(
    ("options", "mix", "message"),
    [
        ({"replay_buffer_size": 8, "num_iterations": 2}, WindowMix(8, 0), "`replay_buffer_size` stores text alone"),
        ({"save_rollouts": True}, WindowMix(8, 0), "`save_rollouts` stores text alone"),
        ({"follow_rollouts": "records", "max_steps": 1}, WindowMix(8, 0), "`follow_rollouts` stores text alone"),
        ({}, WindowMix(4, 4), "Logged trajectories hold text alone"),
    ],
)
def test_sources_without_images_are_refused(options, mix, message):
    with pytest.raises(ValueError, match=message):
        check_sources_of_vision(config(**options), mix)
