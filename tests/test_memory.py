"""The memory estimate: hand-computed parts, agreement with PEFT, DeepSpeed and a measured peak, and what is refused."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import memory_estimate
import pytest
from common.tiny import ARCHITECTURES, model
from helpers.own_code import give_code
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, Qwen2Config

from tbrm_trl.cli.estimate import main
from tbrm_trl.memory.estimate import estimate_memory

ROOT = Path(__file__).parent.parent
# Per layer: q 8·8+8, k and v 8·4+4 each, o 8·8, feed-forward 3·8·16, two norms of 8: 608. Two layers, embeddings 32·8
# (tied) and the last norm: 2·608 + 256 + 8 = 1,480.
TINY = Qwen2Config(
    vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip
N = 1480
LENGTHS = dict(rows=2, prompt_length=4, completion_length=12)
# Published sizes (their config.json).
QWEN_MATH = {
    "1.5B": dict(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "7B": dict(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
        vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip


def lora() -> LoraConfig:
    """A new configuration for each use, since PEFT writes into it."""
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def save_sizes(folder: Path, sizes: dict) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes}))
    return str(folder)


def test_weights_gradients_and_states_by_hand():
    """Full fine-tuning in float32: 4 bytes per parameter in weights, frozen copy and gradients, 8 in Adam's moments."""
    step = estimate_memory(TINY, **LENGTHS).phases["optimizer step"]
    assert (step["weights"], step["reference"], step["gradients"], step["optimizer"]) == (4 * N, 4 * N, 4 * N, 8 * N)
    assert sum(step.values()) == 20 * N

    alone = estimate_memory(TINY, **LENGTHS, dtype="bfloat16", mixed_precision=None, optimizer="sgd", reference=False)
    step = alone.phases["optimizer step"]
    assert (step["weights"], step["gradients"], sum(step.values())) == (2 * N, 2 * N, 4 * N)
    assert alone.parameters == alone.trained == N


def test_states_of_eight_bits_and_of_pages():
    """Tensors of fewer than 4,096 elements, all of these, keep float32 states, and so do embeddings; Lion has one.
    The head's 8,192 elements have 8,192 bytes and 32 block constants of 4, twice."""
    assert estimate_memory(TINY, **LENGTHS, optimizer="adamw_8bit").phases["update"]["optimizer"] == 8 * N
    assert estimate_memory(TINY, **LENGTHS, optimizer="lion_8bit").phases["update"]["optimizer"] == 4 * N
    paged = estimate_memory(TINY, **LENGTHS, optimizer="paged_adamw_32bit")
    assert (paged.phases["update"]["optimizer"], paged.paged) == (0, 8 * N)
    wide = Qwen2Config(**{**TINY.to_dict(), "vocab_size": 1024, "tie_word_embeddings": False})
    states = estimate_memory(wide, **LENGTHS, optimizer="adamw_8bit").phases["update"]["optimizer"]
    assert states == 8 * (N - 256) + 8 * 8192 + 2 * (8192 + 4 * 32)


@pytest.mark.parametrize(("stage", "weights", "gradients"), [(1, 2, 2), (2, 2, 0.5), (3, 0.5, 0.5)])
def test_partitions_of_zero(stage, weights, gradients):
    """bfloat16 on four processes: weights whole until stage 3, gradients until stage 2; master weights and Adam's two
    moments, 12 bytes, always in quarters. The reference is sharded where the policy is."""
    phases = estimate_memory(TINY, **LENGTHS, processes=4, zero_stage=stage).phases
    assert phases["update"]["weights"] == phases["update"]["reference"] == weights * N
    assert phases["update"]["gradients"] == gradients * N
    assert phases["update"]["optimizer"] == 12 * N // 4
    # What ZeRO-3 gathers: all of a model this small while it works, and always for generation.
    bucket = 2 * 500_000_000
    assert phases["update"]["communication"] == bucket + (2 * N if stage == 3 else 0)
    assert phases["generation"]["communication"] == (bucket + 2 * N if stage == 3 else 0)


def test_states_of_zero_2_are_those_of_deepspeeds_own_estimate():
    zero = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    theirs = zero.estimate_zero2_model_states_mem_needs(N, num_gpus_per_node=4, num_nodes=2, cpu_offload=False)[1]
    step = estimate_memory(TINY, **LENGTHS, processes=8, zero_stage=2, reference=False).phases["optimizer step"]
    assert step["weights"] + step["gradients"] + step["optimizer"] == theirs


def test_ddp_and_fsdp_by_hand():
    """DDP's buckets are as large as the gradients. FSDP2 shards everything in float32, and gathers in bfloat16 what is
    outside the layers (264), two of them (608 each), and whole gradients of one."""
    ddp = estimate_memory(TINY, **LENGTHS, processes=2).phases["optimizer step"]
    assert (ddp["communication"], ddp["weights"]) == (4 * N, 4 * N)
    fsdp = estimate_memory(TINY, **LENGTHS, processes=2, fsdp=True).phases["update"]
    assert (fsdp["weights"], fsdp["reference"], fsdp["gradients"], fsdp["optimizer"]) == (2 * N, 2 * N, 2 * N, 4 * N)
    assert fsdp["communication"] == 2 * (264 + 2 * 608) + 2 * 608


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2"])
def test_adapters_are_those_of_peft(architecture):
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    estimate = estimate_memory(config, **LENGTHS, peft_config=lora())
    trained, whole = get_peft_model(model(architecture), lora()).get_nb_trainable_parameters()
    assert (estimate.trained, estimate.parameters) == (trained, whole)
    update = estimate.phases["update"]
    assert update["reference"] == 0 and update["optimizer"] == 8 * trained


def test_four_bits_by_hand():
    """1,152 weights in each layer's projections, at half a byte and a float32 for each 64; 4 bytes for the other 328,
    and for what is trained."""
    estimate = estimate_memory(TINY, **LENGTHS, peft_config=lora(), quantization="4bit")
    linear = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    constants = 4 * 2 * sum(size // 64 for size in (64, 32, 32, 64, 128, 128, 128))
    others = N - linear
    assert estimate.phases["update"]["weights"] == linear // 2 + constants + 4 * others + 4 * estimate.trained


def test_head_by_hand():
    """A tile of 100 tokens by the first 32,768 of 40,000 words, in float32; everything else is less than 5% of it."""
    wide = Qwen2Config(**{**TINY.to_dict(), "vocab_size": 40_000})
    estimate = estimate_memory(
        wide, rows=1, prompt_length=4, completion_length=100, mixed_precision=None, peft_config=lora()
    )
    assert estimate.phases["update"]["head"] == pytest.approx(100 * 32_768 * 4, rel=0.05)


def test_what_changes_activations():
    def activations(**options):
        return estimate_memory(
            TINY, rows=4, prompt_length=64, completion_length=64, **{"mixed_precision": None, **options}
        ).phases["update"]["activations"]

    kept = activations(gradient_checkpointing=False)
    assert activations() < 0.7 * kept  # of two layers, one at a time, and what enters each
    # eager keeps scores before and after softmax, (4, 2, 128, 128) in each of two layers, at least once
    assert activations(gradient_checkpointing=False, attn_implementation="eager") > kept + 2 * 4 * 4 * 2 * 128 * 128
    # sdpa gets no mask for padded rows; each layer would keep its own
    assert activations(gradient_checkpointing=False, attn_implementation="flash_attention_2") == kept


def test_cache_grows_with_rows_and_length():
    """2 layers × (K, V) × 16 rows × 255 tokens × one head of 4 in float32, and what one step takes."""
    estimate = estimate_memory(TINY, rows=1, prompt_length=56, completion_length=200, generated_rows=16)
    cache = 2 * 2 * 16 * 255 * 4 * 4
    assert cache < estimate.phases["generation"]["generation"] < 2.5 * cache
    assert estimate_memory(TINY, **LENGTHS, generated_rows=0).phases["generation"]["generation"] == 0


def test_a_sharded_policy_is_whole_only_where_it_generates():
    def gathered(**options: Any) -> int:
        estimate = estimate_memory(TINY, **LENGTHS, processes=4, zero_stage=3, **options)
        return estimate.phases["generation"]["communication"]

    assert gathered(generated_rows=2) - gathered(generated_rows=0) == 2 * N  # in bfloat16
    assert gathered(generated_rows=0, gathered_to_generate=True) == gathered(generated_rows=2)


def test_a_measured_peak(monkeypatch):
    """A real run's, within 15%; more of them in docs/benchmarks/memory_estimate.md."""
    sizes = dict(
        model_type="qwen2", hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=2000,
    )  # fmt: skip
    run = memory_estimate.run_of("tiny", rows=8, prompt_length=16, completion_length=112)
    monkeypatch.setitem(memory_estimate.MODELS, "tiny", sizes)
    monkeypatch.setitem(memory_estimate.RUNS, "tiny", run)
    measured = memory_estimate.measure("tiny")
    estimate = max(sum(parts.values()) for parts in memory_estimate.estimate(run, "cpu").values())
    assert estimate == pytest.approx(measured, rel=0.15)


def test_refusals(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"`optim='galore_adamw'` is not among those .* adamw_torch_fused"):
        estimate_memory(TINY, **LENGTHS, optimizer="galore_adamw")
    with pytest.raises(ValueError, match=r"No configuration of a model at .*nowhere.* folder with its config.json"):
        estimate_memory(str(tmp_path / "nowhere"), **LENGTHS)
    with pytest.raises(ValueError, match=r"ZeRO has stages 1 to 3, and goes without FSDP"):
        estimate_memory(TINY, **LENGTHS, zero_stage=3, fsdp=True)
    with pytest.raises(ValueError, match=r"`quantization='4bit'`: .* with an adapter"):
        estimate_memory(TINY, **LENGTHS, quantization="4bit")
    with pytest.raises(ValueError, match=r"`rows=0` must be at least 1"):
        estimate_memory(TINY, rows=0, prompt_length=1, completion_length=1)
    experts = AutoConfig.for_model("qwen3_moe", **ARCHITECTURES["qwen3_moe"])
    with pytest.raises(ValueError, match=r"'qwen3_moe' cannot be run without values"):
        estimate_memory(experts, **LENGTHS)
    for arguments, said in ((["--optim", "lomo", "--model", "nowhere"], "optim='lomo'"), (["--zero", "2"], "--zero")):
        with pytest.raises(SystemExit):
            main(arguments)
        assert said in capsys.readouterr().err


def test_the_dtype_of_the_configuration():
    halved = Qwen2Config(**{**TINY.to_dict(), "dtype": "bfloat16"})
    given = estimate_memory(TINY, **LENGTHS, dtype="bfloat16")
    assert estimate_memory(halved, **LENGTHS, dtype="auto").phases == given.phases
    assert estimate_memory(TINY, **LENGTHS, dtype="auto").phases != given.phases


def test_batches_are_those_of_the_processes_asked_for(tmp_path, capsys, monkeypatch):
    """2 rows on each of 4 processes hold a group of 8; 512 rollouts at a time are 128 on each."""
    words = ["--model", save_sizes(tmp_path / "model", TINY.to_dict()), "--per_device_train_batch_size", "2"]
    with pytest.raises(SystemExit):
        main([*words, "--num_generations", "8"])
    assert "num_generations" in capsys.readouterr().err
    monkeypatch.setattr("tbrm_trl.cli.estimate.estimate_memory", lambda *args, **sizes: sizes)
    main([*words, "--num_generations", "8", "--processes", "4"])
    assert "'generated_rows': 2," in capsys.readouterr().out
    main([*words, "--generation_batch_size", "512", "--processes", "4"])
    assert "'generated_rows': 128," in capsys.readouterr().out
    main([*words, "--follow_rollouts", "records", "--max_steps", "4"])
    assert "'generated_rows': 0, 'gathered_to_generate': False" in capsys.readouterr().out
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        main([*words, "--processes", "-1", "--generation_batch_size", "512"])
    assert "`processes=-1` must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("--zero_stage", "--beta", "--load_in_4bit"))  # of all three


def test_what_a_recipe_and_the_launcher_say(tmp_path, capsys, monkeypatch):
    """Fields are those of `tbrm train`, a wrong one is named, and the launcher's file says what is sharded."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {save_sizes(tmp_path / 'model', TINY.to_dict())}\ndataset_name: no.jsonl\n")
    monkeypatch.setattr("tbrm_trl.cli.estimate.estimate_memory", lambda *args, **sizes: sizes)
    launcher = ["--accelerate_config", str(ROOT / "examples/accelerate/zero3.yaml")]
    file, broken = tmp_path / "ds.json", tmp_path / "broken.yaml"
    file.write_text('{"zero_optimization": {"stage": 1, "offload_optimizer": null}}')
    without = tmp_path / "without.json"
    without.write_text('{"zero_optimization": null}')
    broken.write_text("[1")
    for more, said in (
        ([], "'processes': 1, 'zero_stage': 0, 'fsdp': False"),
        (launcher, "'processes': 4, 'zero_stage': 3, 'fsdp': False"),
        ([*launcher, "--num_processes", "2"], "'processes': 2, 'zero_stage': 3, 'fsdp': False"),
        (["--accelerate_config", "fsdp2", "--processes", "4"], "'processes': 4, 'zero_stage': 0, 'fsdp': True"),
        (["--accelerate_config", "fsdp2", "--fsdp2", "false"], "'processes': 8, 'zero_stage': 0, 'fsdp': False"),
        (["--use_deepspeed", "--num_processes", "4"], "'processes': 4, 'zero_stage': 2, 'fsdp': False"),
        (["--use_deepspeed", "--deepspeed_config_file", str(file)], "'processes': 1, 'zero_stage': 1, 'fsdp': False"),
        (
            ["--use_deepspeed", "--deepspeed_config_file", str(without)],
            "'processes': 1, 'zero_stage': 0, 'fsdp': False",
        ),
        (["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"], "'zero_stage': 0, 'fsdp': True"),
        ([], "'prompt_length': 512"),
        (["--max_prompt_length", "3000"], "'prompt_length': 3000"),
        (["--max_prompt_length", "3000", "--prompt_length", "64"], "'prompt_length': 64"),
    ):
        main(["--config", str(recipe), *more])
        assert said in capsys.readouterr().out
    offload = str(ROOT / "examples/accelerate/zero3_offload.yaml")
    for wrong, said in (
        (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read"),
        (["--use_deepspeed", "--deepspeed_config_file", str(broken)], f"{broken} cannot be read: Expecting"),
        (["--use_deepspeed", "--deepspeed_config_file", "no.json"], "no.json cannot be read: "),
        (["--config", str(recipe), "--device", "tpu"], "--device takes cuda, cpu, not 'tpu'"),
        (["--config", str(recipe), "--accelerate_config", offload], "to the host, which is not estimated"),
        (["--config", str(recipe), "--accelerate_config", str(broken)], "accelerate cannot read"),
        (["--config", str(recipe), "--fsdp", "full_shard"], "Say --zero_stage or --fsdp2"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert said in capsys.readouterr().err
    recipe.write_text(recipe.read_text() + "bata: 0.1\n")
    with pytest.raises(SystemExit):
        main(["--config", str(recipe)])
    assert "there is no field bata. Did you mean beta?" in capsys.readouterr().err


def test_lengths_that_are_none():
    for wrong in (dict(prompt_length=-5), dict(completion_length=0), dict(device="tpu")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            estimate_memory(TINY, **{**LENGTHS, **wrong})


def test_a_model_with_code_of_its_own(tmp_path, capsys):
    folder = give_code(save_sizes(tmp_path / "model", TINY.to_dict()))
    main(["--model", folder, "--trust_remote_code", "true"])
    assert f"{N:,} parameters" in capsys.readouterr().out
    with pytest.raises(ValueError, match="trust_remote_code"):
        estimate_memory(folder, **LENGTHS)


def test_an_evaluation_on_benchmarks(tmp_path, capsys, monkeypatch):
    """16 completions of 188 tokens beside prompts of 12: 16 rows · 200 tokens · 2 layers · keys and values of 4."""
    estimate = estimate_memory(
        TINY, rows=1, prompt_length=12, completion_length=20, evaluated_rows=16, evaluated_length=188,
    )  # fmt: skip
    generation, evaluation = (estimate.phases[name] for name in ("generation", "evaluation"))
    assert evaluation["generation"] > 16 * 200 * 2 * 2 * 4 * 2 > generation["generation"]
    assert {**evaluation, "generation": 0} == {**generation, "generation": 0}
    assert "evaluation" in str(estimate) and "evaluation" not in estimate_memory(TINY, **LENGTHS).phases
    words = ["--model", save_sizes(tmp_path / "model", TINY.to_dict()), "--eval_benchmarks", "math500"]
    monkeypatch.setattr("tbrm_trl.cli.estimate.estimate_memory", lambda *args, **sizes: sizes)
    main([*words, "--eval_strategy", "steps", "--eval_steps", "5", "--eval_max_new_tokens", "3000"])
    assert "'evaluated_rows': 64, 'evaluated_length': 3000" in capsys.readouterr().out


def test_what_model_init_kwargs_say(tmp_path, capsys, monkeypatch):
    """They go before the options of their own, as in `tbrm train`."""
    words = ["--model", save_sizes(tmp_path / "model", TINY.to_dict()), "--dtype", "float32"]
    monkeypatch.setattr("tbrm_trl.cli.estimate.estimate_memory", lambda *args, **sizes: sizes)
    main([*words, "--model_init_kwargs", '{"dtype": "bfloat16", "attn_implementation": "eager", "revision": "v2"}'])
    said = capsys.readouterr().out
    assert "'dtype': 'bfloat16'" in said and "'attn_implementation': 'eager'" in said and "'revision': 'v2'" in said


def test_the_documents_tables_are_what_the_command_prints(tmp_path, capsys):
    text = (ROOT / "docs/memory.md").read_text()
    blocks = re.findall(r"```bash\ntbrm estimate (.*?)\n```\n\n(\|.*?\n\n.*?)\n\n", text, flags=re.S)
    assert len(blocks) == 2
    for (arguments, table), name in zip(blocks, ("1.5B", "7B"), strict=True):
        words = arguments.replace("\\\n", " ").split()
        words[words.index("--config") + 1] = str(ROOT / words[words.index("--config") + 1])
        capsys.readouterr()
        main([*words, "--model", save_sizes(tmp_path / name, QWEN_MATH[name])])
        assert capsys.readouterr().out.strip() == table
