"""Memory and time of a gradient through all tokens, through a scattered half, and through those before a random cut.

    python benchmarks/token_subset.py        # writes docs/benchmarks/token_subset.{json,md}; ten minutes on one core

SmolLM2-135M's shapes with fewer layers, random weights and a long completion. Everything runs in one process, the
variants in turn within each round. It needs Linux, whose kernel reports the peak of resident memory; the peak is reset
before each gradient.
"""

import argparse
import functools
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common.report import bullets, listed, parse, ratios, table, versions, write
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from tbrm_trl import SoftValue, TBRMConfig
from tbrm_trl.batch import Batch, collate
from tbrm_trl.loss import trajectory_loss
from tbrm_trl.loss.residual import mean_over_counted
from tbrm_trl.loss.terms import random_prefix
from tbrm_trl.loss.trajectory_loss import TrajectoryLoss
from tbrm_trl.model.head import add_trajectory_head
from tbrm_trl.model.scoring import score
from tbrm_trl.trajectory import End, Trajectory, UpdateRow

VOCABULARY, HIDDEN, LAYERS, PROMPT, COMPLETION = 49152, 576, 6, 32, 1024
VARIANTS: dict[str, dict[str, Any]] = {
    "all tokens": {"token_fraction": 1.0},
    "0.5, scatter": {"token_fraction": 0.5, "token_selection": "scatter"},
    "0.5, cut": {"token_fraction": 0.5, "token_selection": "cut"},
}
# TRL's head computes the logits of this many tokens at a time. TRL's tile holds all tokens here, few of a real batch.
TILE, SMALL_TILE = chunked_logprob.TOKEN_CHUNK_SIZE, 128
SETTINGS = {
    f"Head in tiles of {TILE} tokens (TRL's), activations kept": (TILE, False),
    f"Head in tiles of {SMALL_TILE} tokens, activations kept": (SMALL_TILE, False),
    f"Head in tiles of {SMALL_TILE} tokens, `gradient_checkpointing=True` (TRL's default)": (SMALL_TILE, True),
}
MEASURED = ("peak_mib", "forward_s", "backward_s", "total_s")
# Every tensor gets its own pages, which are returned when it is freed, so that resident memory is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def smollm2(layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # as TRL does
    add_trajectory_head(model, temperature=1.0)
    return model


def trajectory(completion: int) -> Trajectory:
    generator = torch.Generator().manual_seed(0)
    return Trajectory(
        prompt_ids=torch.randint(VOCABULARY, (PROMPT,), generator=generator),
        completion_ids=torch.randint(VOCABULARY, (completion,), generator=generator),
        loss_mask=torch.ones(completion, dtype=torch.bool),
        reward=1.0,
        end=End.EOS,
        ref_log_probs=torch.full((completion,), -10.0),
        ref_soft_value=10.0,
    )


def resident_mib(name: str) -> float:
    """`VmRSS`, what is resident now, or `VmHWM`, its peak since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**10


def gradient(model: PreTrainedModel, rows: list[UpdateRow], batch: Batch, options: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of loss and gradient of a trajectory, and their peak memory besides weights and gradients (MiB)."""
    args = TBRMConfig(tempfile.gettempdir(), bf16=False, use_cpu=True, report_to="none", **options)
    loss_of = TrajectoryLoss(args, SoftValue.registry["policy"](args))
    loss_of.mark_left_out(rows)

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident_mib("VmRSS"), time.process_time()
    output = loss_of(rows, batch, functools.partial(score, model), in_part=args.token_fraction < 1)
    loss = mean_over_counted(output.loss, output.inputs.counted, len(rows))
    middle = time.process_time()
    loss.backward()
    end = time.process_time()
    measured = (resident_mib("VmHWM") - before, middle - start, end - middle, end - start)
    return dict(zip(MEASURED, measured, strict=True))


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[dict[str, float]]]]:
    """The measurements of all rounds, by setting and variant."""
    model = smollm2(arguments.layers).train()
    row = trajectory(arguments.completion)
    rows, batch = [UpdateRow(row, "fresh")], collate([row], pad_token_id=0)
    gradient(model, rows, batch, {})  # allocates the gradients, among other things
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for setting, (tile, checkpointing) in SETTINGS.items():
        chunked_logprob.TOKEN_CHUNK_SIZE = tile
        if checkpointing:
            model.gradient_checkpointing_enable()
        results[setting] = {name: [] for name in VARIANTS}
        for number in range(arguments.rounds):
            # The cuts of the rounds are spread evenly over the possible ones.
            trajectory_loss.random_prefix = functools.partial(random_prefix, draw=(number + 0.5) / arguments.rounds)
            for name, options in VARIANTS.items():
                model.zero_grad(set_to_none=False)
                results[setting][name].append(gradient(model, rows, batch, options))
                print(f"{setting}; {name}: {results[setting][name][-1]}", file=sys.stderr)
    return results


def middle(rounds: list[dict[str, float]], what: str) -> float:
    return statistics.median(one[what] for one in rounds)


def percent(by_variant: dict[str, list[dict[str, float]]], name: str, what: str) -> str:
    """The ratio to `all tokens` within a round, the median of all rounds, in percent."""
    mine, all_tokens = ([one[what] for one in by_variant[variant]] for variant in (name, "all tokens"))
    return f"{100 * statistics.median(ratios(mine, all_tokens)):.0f}%"


def block(by_variant: dict[str, list[dict[str, float]]]) -> str:
    header = "back-propagated|peak, MiB|of all tokens'|largest|forward, s|backward, s|together, s|of all".split("|")
    rows = [
        [
            name,
            f"{middle(rounds, 'peak_mib'):.0f}",
            percent(by_variant, name, "peak_mib"),
            f"{max(one['peak_mib'] for one in rounds):.0f}",
            *(f"{middle(rounds, what):.2f}" for what in ("forward_s", "backward_s", "total_s")),
            percent(by_variant, name, "total_s"),
        ]
        for name, rounds in by_variant.items()
    ]
    return table(header, rows)


def report(results: dict[str, Any]) -> str:
    as_it_is, small, checkpointed = results["settings"].values()
    blocks = "\n\n".join(f"{setting}:\n\n{block(of)}" for setting, of in results["settings"].items())
    findings = (
        f"`scatter` takes {percent(small, '0.5, scatter', 'peak_mib')} of the memory where the head's tiles are small "
        "beside the batch. A token's gradient goes through the activations of all tokens before it, so the layers "
        "keep theirs, and TRL's head keeps no logits that could be saved. Only a micro-batch that is smaller than one "
        f"tile gets a smaller tile, and with it {percent(as_it_is, '0.5, scatter', 'peak_mib')}.",
        f"`cut` takes {percent(small, '0.5, cut', 'peak_mib')} of the memory in the median, or "
        f"{percent(checkpointed, '0.5, cut', 'peak_mib')} with checkpointing, where little is kept to begin with; of "
        f"what is left, {VOCABULARY * HIDDEN * 4 / 2**20:.0f} MiB are the head's own gradient before it is added. But "
        "the cut is random, and the largest peak is near that of all tokens: it lowers the average, not what must fit.",
        "Both pay for a cheaper backward with a second forward. Together `scatter` takes "
        f"{percent(small, '0.5, scatter', 'total_s')} of the time, `cut` {percent(small, '0.5, cut', 'total_s')}.",
        "What the noise of the subset costs in learning is not measured here.",
    )
    return f"""# Back-propagating through part of the tokens: memory and time

Written by `python benchmarks/token_subset.py`. {results["hardware"]}; {listed(results["versions"])}.
Raw numbers: [token_subset.json](token_subset.json).

Loss and gradient of one trajectory of {PROMPT} + {results["completion"]} tokens; SmolLM2-135M's shapes with
{results["layers"]} of its 30 layers, random weights, float32. Memory is the peak of what is resident beside weights and
gradients; time is CPU time. Medians of {results["rounds"]} rounds, in each of which the variants run in turn; the cuts
are spread evenly over all that may be drawn.

{blocks}

What it says:

{bullets(findings)}
"""


def main() -> None:
    sizes = dict(rounds=7, layers=LAYERS, completion=COMPLETION)
    options: dict[str, Any] = {name: dict(type=int, default=size) for name, size in sizes.items()}
    arguments = parse(__doc__, **options)
    if not os.environ.keys() >= MALLOC.keys():  # malloc reads them when the process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    torch.set_num_threads(1)
    results = {
        **{name: getattr(arguments, name) for name in ("layers", "completion", "rounds")},
        "hardware": f"{platform.machine()}, one thread",
        "versions": versions("torch", "transformers", "trl"),
        "settings": measure(arguments),
    }
    write(arguments.output, "token_subset", report(results), results)


if __name__ == "__main__":
    main()
