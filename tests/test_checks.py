"""What is refused or warned about before training: data set, adapter, quantized base and launch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from common.tiny import perturb, save
from datasets import Dataset
from helpers.runs import config
from helpers.scripted import script, scripted_trainer
from peft import LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tbrm_trl.checks.data import check_dataset
from tbrm_trl.checks.launch import check_sharding
from tbrm_trl.checks.model import check_adapters, warn_of_merging


def prompts(n: int) -> Dataset:
    return Dataset.from_list([{"prompt": str(i)} for i in range(n)])


@pytest.mark.parametrize(
    ("n", "options", "advice"),
    [
        (5, {"per_device_train_batch_size": 8}, "fits is 5 rollouts: set per_device_train_batch_size=5 "),
        (
            5,
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
            "fits is 4 rollouts: set per_device_train_batch_size=2 .and generation_batch_size=4,",
        ),
        (
            3,
            {"per_device_train_batch_size": 8, "num_generations": 2},
            "fits is 6 rollouts: set per_device_train_batch_size=6 ",
        ),
        (3, {"gradient_accumulation_steps": 4}, "Not even per_device_train_batch_size=1 fits 4 steps per generation"),
    ],
)
def test_too_few_prompts(n, options, advice):
    with pytest.raises(ValueError, match=f"has {n} prompts, fewer than.*{advice}"):
        check_dataset(prompts(n), config(**options), 1)
    logged, mix = check_dataset(prompts(64), config(**options), 1)
    assert not logged.any() and mix.logged == 0


def test_too_few_prompts_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="fits is 8 rollouts"):
        scripted_trainer("no/such/model", script(rows=8), tmp_path, per_device_train_batch_size=9)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoraConfig(lora_dropout=0.1), "`lora_dropout=0.1` is refused"),
        (LoHaConfig(rank_dropout=0.5), "`rank_dropout=0.5` is refused"),
        (LoraConfig(lora_dropout=0.0, bias="lora_only"), "`bias='lora_only'` is refused"),
        (PromptTuningConfig(num_virtual_tokens=2), "PromptTuningConfig is refused"),
    ],
)
def test_adapters_that_bias_the_residual(adapter, message):
    with pytest.raises(ValueError, match=message):
        check_adapters("a/model", adapter, config())
    assert check_adapters("a/model", LoraConfig(lora_dropout=0.0), config()) is None


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantization_config": NF4}, "`load_in_4bit` without an adapter is refused.*peft_config=LoraConfig"),
        ({"model_init_kwargs": {"quantization_config": NF4}}, "`load_in_4bit` without an adapter is refused"),
        ({"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}, "`load_in_4bit` without an adapter"),
        (
            {"quantization_config": NF4, "peft_config": LoraConfig(lora_dropout=0.0), "use_vllm": True},
            "`load_in_4bit` with `use_vllm=True` is refused.*merges the adapter into the quantized weights",
        ),
        (
            {
                "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
                "peft_config": LoraConfig(lora_dropout=0.0),
                "use_vllm": True,
                "vllm_mode": "server",
            },
            "`load_in_8bit` with rollouts by a server is refused",
        ),
    ],
)
def test_quantized_bases_before_anything_is_loaded(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scripted_trainer("no/such/model", script(), tmp_path, **given)


def quantized(folder):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4)


def test_quantized_models_as_objects(tmp_path):
    folder = save(tmp_path / "model")
    with pytest.raises(ValueError, match="`is_loaded_in_4bit` without an adapter is refused"):
        scripted_trainer(quantized(folder), script(), tmp_path)
    adapted = get_peft_model(quantized(folder), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="`is_loaded_in_4bit` with `use_vllm=True` is refused"):
        scripted_trainer(adapted, script(), tmp_path, use_vllm=True)


@pytest.fixture
def no_vllm(monkeypatch):
    """Replace TRL's vLLM part, so that the checks of the loaded model are reached."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda **options: None)


def test_quantized_checkpoints(no_vllm, tmp_path):
    """Only the loaded model shows that it is quantized."""
    folder = save(tmp_path / "model")
    quantized(folder).save_pretrained(tmp_path / "quantized")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "quantized")
    adapter = LoraConfig(target_modules="all-linear", lora_dropout=0.0)
    with pytest.raises(ValueError, match="`is_loaded_in_4bit` with `use_vllm=True` is refused"):
        scripted_trainer(str(tmp_path / "quantized"), script(), tmp_path, peft_config=adapter, use_vllm=True)


@pytest.mark.parametrize(("dtype", "deepspeed", "warned"), [("float32", 0, 0), ("bfloat16", 0, 1), ("float32", 1, 1)])
def test_half_precision_bases_under_vllm(dtype, deepspeed, warned, no_vllm, tmp_path, recwarn):
    """Merging and unmerging rounds them. In float32 that is exact enough, but DeepSpeed casts a float32 base."""
    adapter = LoraConfig(target_modules="all-linear", lora_dropout=0.0)
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(), tmp_path, peft_config=adapter, use_vllm=True,
        model_init_kwargs={"dtype": dtype},
    )  # fmt: skip
    if deepspeed:
        warn_of_merging(
            trainer.model,
            SimpleNamespace(draws_from_own_engine=True, deepspeed_plugin=object(), bf16=True, fp16=False),
        )
    warn_of_merging(trainer.model.get_base_model(), trainer.args)  # nothing to merge
    said = [str(w.message) for w in recwarn if "the base drifts" in str(w.message)]
    assert len(said) == warned and all('"dtype": "float32"' in text for text in said)
    assert ["launch with DDP or FSDP2" in text for text in said] == [bool(deepspeed)] * warned


def test_sharding_that_was_asked_for(monkeypatch):
    """accelerate replaces FSDP by DDP on CPUs. A single process shards nothing anyway."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    args = config()
    for kind, processes in ((DistributedType.FSDP, 2), (DistributedType.MULTI_CPU, 1)):
        check_sharding(args, SimpleNamespace(distributed_type=kind, num_processes=processes))
    became_ddp = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2)
    with pytest.raises(ValueError, match="FSDP was asked for, and accelerate made MULTI_CPU of it"):
        check_sharding(args, became_ddp)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    check_sharding(config(), became_ddp)
    with pytest.raises(ValueError, match="DEEPSPEED was asked for, and accelerate made MULTI_CPU of it"):
        check_sharding(config(deepspeed={"zero_optimization": {"stage": 3}}), became_ddp)


def test_why_vllm_is_refused_with_a_quantized_base(tmp_path):
    """What TRL does at each sync, `merge_adapter` and `unmerge_adapter`, changes the base that is the reference.

    After one merge vLLM would get packed bytes, two weights in each, instead of the layer's matrix.
    """
    policy = get_peft_model(quantized(save(tmp_path / "model")), LoraConfig(r=4, target_modules="all-linear"))
    perturb(torch.nn.ParameterList([p for name, p in policy.named_parameters() if "lora_B" in name]), 0.02)
    ids = torch.arange(3, 30)[None]

    def reference():
        with torch.no_grad(), policy.disable_adapter():
            return policy.train()(ids).logits.log_softmax(dim=-1)

    before, drift = reference(), []
    for _ in range(4):
        policy.merge_adapter()
        sent = dict(policy.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
        assert sent.dtype == torch.uint8 and sent.shape == (32 * 32 // 2, 1)
        policy.unmerge_adapter()
        drift.append((reference() - before).abs().mean().item())
    assert 0.01 < drift[0] < drift[-1]


def test_one_process_for_several_gpus_is_refused(tmp_path):
    """TRL would spread a model given by its name over them, or refuse to wrap it in `nn.DataParallel`."""
    rows = script()
    trainer = scripted_trainer(save(tmp_path / "model"), rows, tmp_path)
    trainer.args._n_gpu = 2  # as `torch.cuda.device_count()` sets it
    with pytest.raises(ValueError, match=r"This process sees 2 GPUs, .* `accelerate launch` or `torchrun`"):
        type(trainer)(save(tmp_path / "model"), lambda prompts, **kwargs: [0.0], trainer.args, trainer.train_dataset)
