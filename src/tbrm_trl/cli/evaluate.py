"""tbrm eval: evaluate a model on benchmarks, or compare two results.

    tbrm eval --model_name_or_path out --benchmarks math500 gsm8k --temperature 0
    tbrm eval --model_name_or_path out --benchmarks problems.jsonl "gym:chain_sum(size=200, min_terms=2)"
    tbrm eval --model_name_or_path out --suite tbrm-paper --backend vllm
    tbrm eval --compare evaluations/before evaluations/after

Benchmarks: aime24, aime25, amc23 (40 problems), math500, minerva, olympiadbench, gsm8k; NAME=FILE for a local copy of
one; gym:TASK for a reasoning-gym task; a .json, .jsonl, .parquet or .csv file. --output_dir keeps every completion. Run
the same command again to finish an interrupted evaluation.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .quiet import silence

silence()

from trl import ModelConfig  # noqa: E402

from tbrm_trl.evaluation.benchmarks import (  # noqa: E402
    BENCHMARKS,
    BOXED,
    SUITES,
    Benchmark,
    Setting,
    load_benchmark,
    require_distinct_names,
)
from tbrm_trl.evaluation.results import (  # noqa: E402
    differing_settings,
    file_of,
    name_of,
    paired_results,
    require_same,
    unpaired,
)
from tbrm_trl.evaluation.run import (  # noqa: E402
    Judge,
    ModelPolicy,
    Policy,
    Settings,
    evaluate,
    header,
    require_positions,
)
from tbrm_trl.evaluation.sampling import Sampling  # noqa: E402
from tbrm_trl.evaluation.statistics import compare  # noqa: E402
from tbrm_trl.evaluation.vllm import VllmPolicy  # noqa: E402
from tbrm_trl.files import first_line, require_writable  # noqa: E402
from tbrm_trl.rewards import RewardError  # noqa: E402

from .parsing import (  # noqa: E402
    Parser,
    Refused,
    leave,
    quantization_of,
    sorted_words,
    unused_beside_template,
    with_line_breaks,
)

PROG = "tbrm eval"


@dataclass
class EvaluationArguments:
    """What to evaluate on, and how."""

    benchmarks: list[str] = field(
        default_factory=list, metadata={"help": "Names, NAME=FILE, gym:TASK, or files of your own."}
    )
    suite: str | None = field(
        default=None,
        metadata={"help": f"A protocol by name: {', '.join(SUITES)}. It sets benchmarks, samples and temperature."},
    )
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Two results, files or folders, to compare problem by problem."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the results. By default evaluations/ and the model's name."}
    )
    samples: int | None = field(
        default=None,
        metadata={"help": "Completions of each problem, n of avg@n. By default 32 on AIME and AMC, 4 on the other "
                  "benchmarks, 1 elsewhere. Greedy completions are all the same, so 1 if --temperature is 0."},
    )  # fmt: skip
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability that is drawn from."})
    top_k: int = field(default=0, metadata={"help": "Number of likeliest tokens that are drawn from; 0 for all."})
    max_new_tokens: int = field(default=2048, metadata={"help": "Length limit of a completion."})
    seed: int = field(default=0, metadata={"help": "Each completion's own seed follows from it."})
    system_prompt: str = field(default=BOXED, metadata={"help": "Put before questions that are text."})
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text with {question} in it, asked as it is: for models without a chat template. In a text "
            "on one line, \\n is a line break."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Variables of the chat template, as a JSON object such as '{\"enable_thinking\": false}'."},
    )
    reward_funcs: str | None = field(
        default=None, metadata={"help": "What judges, by name or dotted path, in place of the benchmark's own reward."}
    )
    reward_time_limit: float = field(default=5.0, metadata={"help": "Seconds that it may take for one completion."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the answers, of a file."})
    limit: int | None = field(default=None, metadata={"help": "Evaluate on the first so many problems alone."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Completions generated at once, by default 64. vLLM chooses it itself."}
    )
    backend: str = field(
        default="transformers", metadata={"help": "What generates.", "choices": ["transformers", "vllm"]}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Generate on the CPU, even if there is a GPU."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, str):  # the parser has checked it
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)


def problems_of(arguments: EvaluationArguments, model: ModelConfig, chosen: Collection[str]) -> list[str]:
    """The arguments that are wrong or do not go together, one line each. `chosen` are the names of those given."""
    a, problems = arguments, []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return [
            "an evaluation is one process, which writes its result: start `tbrm eval` without a launcher. With several "
            "GPUs, start it once on each (CUDA_VISIBLE_DEVICES), with other benchmarks and the same --output_dir."
        ]
    if a.compare:
        if len(a.compare) != 2:
            problems.append(f"--compare takes two results, not {len(a.compare)}.")
        if others := [f"--{name}" for name in sorted(chosen) if name != "compare"]:
            problems.append(f"--compare compares what was evaluated: leave {', '.join(others)} out.")
        return problems
    if model.model_name_or_path is None:
        problems.append("--model_name_or_path is missing: the id of a model on the Hub, or a folder.")
    if a.suite is not None and a.suite not in SUITES:
        problems.append(f"there is no suite {a.suite!r}. Names: {', '.join(SUITES)}.")
    elif a.suite:
        problems += _beside_suite(a.suite, a.benchmarks)
    if a.suite and {"samples", "temperature"} & set(chosen):
        problems.append("--suite sets samples and temperature: leave --samples and --temperature out.")
    if not (a.benchmarks or a.suite):
        problems.append(f"--benchmarks is missing: {', '.join(BENCHMARKS)}, gym:TASK, or a file.")
    for name in ("limit", "samples", "batch_size"):
        if (value := getattr(a, name)) is not None and value < 1:
            problems.append(f"--{name} {value} must be at least 1.")
    try:
        Sampling(a.temperature, a.top_p, a.top_k, a.max_new_tokens)
    except ValueError as error:
        problems += [f"--{line}" for line in str(error).split("\n")]
    if a.prompt_template is not None:
        given = {"system_prompt": a.system_prompt != BOXED, "chat_template_kwargs": bool(a.chat_template_kwargs)}
        problems += unused_beside_template(name for name, one in given.items() if one)
    if a.answer_column is not None and a.reward_funcs not in (None, "math"):
        problems.append("--answer_column is for math, and other rewards are given all columns: leave it out.")
    elif a.answer_column is not None and (a.benchmarks or a.suite) and all(map(_has_answers, a.benchmarks)):
        problems.append("--answer_column is for files of your own, and these benchmarks have answers: leave it out.")
    problems += _without_effect(model)
    if a.backend == "vllm":
        given = {
            "load_in_4bit": model.load_in_4bit,
            "load_in_8bit": model.load_in_8bit,
            "attn_implementation": model.attn_implementation is not None,
            "use_cpu": a.use_cpu,
            "batch_size": a.batch_size is not None,
        }
        problems += [f"--{name} is for --backend transformers: leave it out." for name, one in given.items() if one]
    elif a.use_cpu and (model.load_in_4bit or model.load_in_8bit):
        bits = "4bit" if model.load_in_4bit else "8bit"
        problems.append(f"--use_cpu does not go with --load_in_{bits}, which goes to the GPU if there is one.")
    return problems


def _has_answers(benchmark: str) -> bool:
    """Whether a benchmark defines where its answers are. Only the user's own files do not."""
    return benchmark.startswith("gym:") or benchmark.partition("=")[0] in BENCHMARKS


def _without_effect(model: ModelConfig) -> list[str]:
    """One line for each kind of model option that has no effect in an evaluation."""
    changed = [name for name, default in vars(ModelConfig()).items() if getattr(model, name) != default]
    problems = []
    if adapter := [f"--{n}" for n in changed if n.startswith("lora_") or n in ("use_peft", "use_rslora", "use_dora")]:
        problems.append(
            f"for training alone: {', '.join(adapter)}. Leave it out. To evaluate an adapter, give its folder as "
            "--model_name_or_path."
        )
    if not model.load_in_4bit and (bits := [f"--{name}" for name in changed if "bnb" in name]):
        problems.append(f"{', '.join(bits)} is for --load_in_4bit: leave it out.")
    return problems


def _beside_suite(suite: str, benchmarks: Sequence[str]) -> list[str]:
    """The problems of `--benchmarks` beside `--suite`, where they may only name local copies of the suite's own."""
    own = [line.benchmark for line in SUITES[suite]]
    names = Counter(one.partition("=")[0] for one in benchmarks)
    problems = [
        f"--benchmarks {one} is not of --suite {suite}, which has {', '.join(own)}. Evaluate on it without --suite."
        for one in benchmarks
        if one.partition("=")[0] not in own
    ]
    return problems + [f"--benchmarks names {name} {count} times." for name, count in names.items() if count > 1]


def lines_of(arguments: EvaluationArguments) -> list[Setting]:
    """Benchmark, samples and temperature of each requested evaluation."""
    a = arguments
    if a.suite:  # --benchmarks may name local copies of its benchmarks
        named = {one.partition("=")[0]: one for one in a.benchmarks}
        return [
            Setting(named.get(one.benchmark, one.benchmark), one.samples, one.temperature) for one in SUITES[a.suite]
        ]
    return [Setting(one, 0 if a.samples is None else a.samples, a.temperature) for one in a.benchmarks]


def loaded(name: str, arguments: EvaluationArguments) -> Benchmark:
    benchmark = load_benchmark(name, reward=arguments.reward_funcs, answer_column=arguments.answer_column)
    return benchmark if arguments.limit is None else benchmark.first(arguments.limit)


def policy_of(arguments: EvaluationArguments, model: ModelConfig) -> Policy:
    """The policy to evaluate."""
    name: Any = model.model_name_or_path
    options: dict[str, Any] = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "trust_remote_code": arguments.trust_remote_code,
    }
    if arguments.backend == "vllm":
        return VllmPolicy.load(name, seed=arguments.seed, **options)
    if arguments.batch_size is not None:
        options["batch_size"] = arguments.batch_size
    try:
        quantization = quantization_of(model)
    except ImportError as error:  # bitsandbytes is not installed
        raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error
    return ModelPolicy.load(
        name,
        use_cpu=arguments.use_cpu,
        attn_implementation=model.attn_implementation,
        quantization_config=quantization,
        **options,
    )


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, without making it: it is made with the first result."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    try:
        require_writable(there, "--output_dir" if there == folder else "the folder of --output_dir")
    except OSError as error:
        raise ValueError(error.strerror) from error


def run(arguments: EvaluationArguments, model: ModelConfig) -> None:
    """Run all requested evaluations, after checking all of them."""
    a = arguments
    template = with_line_breaks(a.prompt_template)
    variables: Any = a.chat_template_kwargs  # `__post_init__` has parsed the text
    planned = []
    for line in lines_of(a):
        benchmark = loaded(line.benchmark, a)
        samples = line.samples or (1 if line.temperature == 0 else benchmark.samples)
        sampling = Sampling(line.temperature, a.top_p, a.top_k, a.max_new_tokens)
        settings = Settings(samples, sampling, a.seed, a.system_prompt, template, variables)
        planned.append((benchmark, settings, Judge(benchmark, a.reward_time_limit)))
    require_distinct_names([benchmark for benchmark, _, _ in planned])
    folder = Path(a.output_dir or Path("evaluations") / Path(str(model.model_name_or_path)).name)
    check_writable(folder)
    policy = policy_of(a, model)
    files = {
        benchmark.name: folder / file_of(name_of(benchmark.name, settings.samples, settings.sampling.temperature))
        for benchmark, settings, _ in planned
    }
    weights = policy.weights()
    for benchmark, settings, judge in planned:
        require_positions(policy, benchmark, settings)
        require_same(files[benchmark.name], header(policy, benchmark, settings, weights, judge))
    asks_in_text = any(isinstance(prompt, str) for benchmark, _, _ in planned for prompt in benchmark.prompts)
    if a.prompt_template is None and asks_in_text:
        print(f"System prompt: {a.system_prompt!r}")
    for benchmark, settings, judge in planned:
        result = evaluate(policy, benchmark, settings, files[benchmark.name], judge, weights)
        print(result, flush=True)
    print(f"Every completion: {folder}")


def show_comparison(first: str, second: str) -> None:
    pairs = paired_results(first, second)
    for name, (one, other) in pairs.items():
        print(f"{name}: {mean(one):.4f} → {mean(other):.4f}, {compare(one.scores, other.scores)}")
        if differing := differing_settings(one, other):
            print(f"  The two differ in {', '.join(differing)} besides the model.")
    for path in (first, second):
        if alone := unpaired(path, pairs):
            print(f"Not compared, since only {path} holds it: {', '.join(alone)}.")


def mean(result: Any) -> float:
    return result.metrics()[f"avg@{result.samples}"]


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        reader = Parser(EvaluationArguments, ModelConfig, prog=PROG, description=__doc__ or "", dtype="auto")
        words = sorted_words(reader, given)
        asked, model = reader.parse(words)
        if problems := problems_of(asked, model, words.given):
            raise Refused(problems)
        try:
            if asked.compare:
                show_comparison(*asked.compare)
            else:
                run(asked, model)
        except (ValueError, RewardError) as error:
            raise Refused([str(error)]) from error
    except Refused as refused:
        leave(PROG, refused)
