"""tbrm estimate: say how much memory a run will take, before anything is loaded.

    tbrm estimate --config examples/recipes/tbrm.yaml --processes 4 --zero_stage 2

It takes the options of `tbrm train`, the launcher's among them, and those of the machine where the run will be.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .quiet import silence

silence()

import torch  # noqa: E402
from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # noqa: E402
from trl import ModelConfig, get_peft_config  # noqa: E402
from trl.cli.accelerate_config import resolve_accelerate_config_argument  # noqa: E402

from ..config import TBRMConfig  # noqa: E402
from ..files import first_line  # noqa: E402
from ..memory.estimate import MemoryEstimate, estimate_memory  # noqa: E402
from .parsing import Parser, Refused, leave, sorted_words  # noqa: E402
from .train import DataArguments, init_kwargs, launcher_options, with_adapter_settled  # noqa: E402

PROG = "tbrm estimate"
_STAGE = 2  # DeepSpeed's under accelerate, if nothing says another
_OFFLOADED = ("optimizer", "param")


@dataclass
class Machine:
    """Where the training would run, and what no recipe holds."""

    model: str | None = field(default=None, metadata={"help": "Id or folder; else the recipe's model_name_or_path."})
    processes: int = field(
        default=0, metadata={"help": "Over all nodes, one device each. By default the launcher's number, or 1."}
    )
    zero_stage: int | None = field(
        default=None, metadata={"help": "DeepSpeed ZeRO: 1, 2 or 3. By default that of --accelerate_config."}
    )
    fsdp2: bool | None = field(
        default=None,
        metadata={"help": "FSDP2, everything sharded over all processes. By default that of --accelerate_config."},
    )
    prompt_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of the longest prompt. By default the recipe's max_prompt_length, or 512."},
    )
    device: str = field(default="cuda", metadata={"help": "Where the run computes.", "choices": ["cuda", "cpu"]})
    only_logs: bool = field(default=False, metadata={"help": "The training set holds logged rows alone."})


def estimate_of_run(config: TBRMConfig, model: ModelConfig, machine: Machine, data: DataArguments) -> MemoryEstimate:
    """The estimate for a run of `tbrm train`."""
    name = machine.model or model.model_name_or_path
    if name is None:
        raise ValueError("Which model? Give --model, or a recipe with `model_name_or_path`.")
    freed = config.reference == "previous" or (
        machine.only_logs and config.precompute_ref_log_probs is not False and not config.sync_ref_model
    )
    values = {"token": config.max_completion_length}.get(config.residual, 2 if config.truncation == "bootstrap" else 1)
    longest = (machine.prompt_length, config.max_prompt_length, 512)
    prompt_length = next(length for length in longest if length is not None)
    rows, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    generated = rows * config.steps_per_generation
    generates = not (config.use_vllm or machine.only_logs or config.followed_folder is not None)
    merges = config.draws_from_own_engine and get_peft_config(model) is not None
    if tokens := config.max_tokens_per_microbatch:
        held = min(rows, max(1, tokens // (prompt_length + config.max_completion_length)))
        rows, accumulation = held, math.ceil(rows / held)
    chosen = init_kwargs(config, model)
    return estimate_memory(
        name,
        rows=rows,
        prompt_length=prompt_length,
        completion_length=config.max_completion_length,
        generated_rows=generated if generates else 0,
        # For colocated vLLM TRL merges the adapter into the whole policy; all else gathers one parameter at a time.
        gathered_to_generate=generates or (merges and not machine.only_logs),
        evaluated_rows=data.eval_batch_size if data.eval_benchmarks else 0,
        evaluated_length=data.eval_max_new_tokens,
        accumulation=accumulation,
        dtype=chosen["dtype"],
        mixed_precision="bfloat16" if config.bf16 else "float16" if config.fp16 else None,
        attn_implementation=chosen["attn_implementation"],
        gradient_checkpointing=config.gradient_checkpointing,
        optimizer=str(getattr(config.optim, "value", config.optim)),
        peft_config=get_peft_config(model),
        quantization="4bit" if model.load_in_4bit else "8bit" if model.load_in_8bit else None,
        double_quantization=model.use_bnb_nested_quant,
        reference=not freed,
        values_per_row=values,
        processes=machine.processes,
        zero_stage=machine.zero_stage or 0,
        fsdp=machine.fsdp2 or False,
        device=machine.device,
        revision=chosen["revision"],
        trust_remote_code=config.trust_remote_code,
    )


def parser(processes: int = 1) -> Parser:
    """The command's parser. Batches are checked for the planned processes, not for the one that runs here."""

    class Planned(TBRMConfig):
        world_size = property(lambda self: max(1, processes))

    no_gpu = dict(use_cpu=not torch.cuda.is_available(), report_to="none")
    defaults = dict(output_dir=".", dataset_name="none", lora_dropout=0.0, **no_gpu)
    return Parser(Machine, Planned, ModelConfig, DataArguments, prog=PROG, description=__doc__ or "", **defaults)


def with_launcher(machine: Machine, words: Sequence[str]) -> Machine:
    """The machine, with what the launcher's options and file say of processes and sharding, where it says nothing."""
    if not words:
        return replace(machine, processes=machine.processes or 1)
    arguments = [*resolve_accelerate_config_argument(list(words)), "--module", PROG]
    try:
        options, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    except Exception as error:  # accelerate's own errors for a broken file are of many kinds
        raise ValueError(f"accelerate cannot read {' '.join(words)}: {error}") from error
    stage, offloads = 0, str(options.fsdp_offload_params).lower() == "true" and options.use_fsdp
    if options.use_deepspeed and options.deepspeed_config_file:
        try:
            zero = json.loads(Path(options.deepspeed_config_file).read_text()).get("zero_optimization") or {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{options.deepspeed_config_file} cannot be read: {first_line(error)}") from error
        stage = zero.get("stage", 0)
        devices = [(zero.get(f"offload_{what}") or {}).get("device") for what in _OFFLOADED]
        offloads = any(device not in (None, "none") for device in devices)
    elif options.use_deepspeed:
        stage = int(_STAGE if options.zero_stage is None else options.zero_stage)
        offloads = any(getattr(options, f"offload_{what}_device") not in (None, "none") for what in _OFFLOADED)
    if offloads:
        raise ValueError(
            f"{' '.join(words)}: this moves parameters or optimizer states to the host, which is not estimated. "
            "Estimate the same without it for an upper bound: --zero_stage 3, or --fsdp2 true."
        )
    said = machine.zero_stage is not None or machine.fsdp2 is not None
    return replace(
        machine,
        processes=machine.processes or options.num_processes or 1,
        zero_stage=machine.zero_stage if said else stage,
        fsdp2=machine.fsdp2 if said else bool(options.use_fsdp),
    )


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        words = with_adapter_settled(sorted_words(parser(), given, launcher_options()))
        # The processes come first, since the batches are checked for them.
        machine, *_ = Parser(Machine, prog=PROG, description="").parse_args_and_config(
            words.own, return_remaining_strings=True
        )
        if machine.processes < 0:
            raise ValueError(f"`processes={machine.processes}` must be at least 1.")
        machine = with_launcher(machine, words.launcher)
        _, config, model, data = parser(machine.processes).parse(words)
        if config.deepspeed or config.fsdp:
            raise ValueError(
                "`deepspeed` and `fsdp` among the options of training are not read here. Say --zero_stage or --fsdp2."
            )
        print(estimate_of_run(config, model, machine, data))
        if config.cast_lm_head_to_fp32:
            print("Not in it: the head's weights in float32 (cast_lm_head_to_fp32), and copies of them.")
    except ValueError as error:
        leave(PROG, Refused([str(error)]))
    except Refused as refused:
        leave(PROG, refused)
