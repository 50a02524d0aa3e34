"""Run the benchmarks of `tbrm eval` at each evaluation of the Trainer."""

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..processes import failing_together
from .benchmarks import Benchmark, require_distinct_names
from .results import append, file_of, metric_names, open_result
from .run import Judge, ModelPolicy, Settings, drawn, header, require_positions


class EvaluationCallback(TrainerCallback):
    """Evaluates the policy on benchmarks, and adds `eval_{benchmark}/{metric}` to the Trainer's metrics.

    For example, `metric_for_best_model="eval_math500/avg@1"` chooses the best checkpoint by such a metric. Processes
    share the work. `output_dir/evaluations/step-N` keeps every completion. The run needs no evaluation set.

    Args:
        benchmarks: the benchmarks to evaluate on.
        settings: how problems are asked and completions drawn. If its `chat_template_kwargs` is None, the run's are
            used.
        batch_size: completions generated at once on each process.
        time_limit: seconds that a reward in workers may take for one completion.

    Raises:
        ValueError: in one line, if benchmarks share a name, or a reward is unknown or needs a package that is not
            installed. Once it is in a trainer: if a completion could exceed the model's number of positions, or the
            weights are sharded.
    """

    evaluates = True  # lets the Trainer evaluate without an evaluation set

    def __init__(
        self, benchmarks: Sequence[Benchmark], settings: Settings, batch_size: int = 64, time_limit: float = 5.0
    ) -> None:
        require_distinct_names(benchmarks)
        self.benchmarks = list(benchmarks)
        self.settings = settings
        self.batch_size = batch_size
        self.judges = {one.name: Judge(one, time_limit) for one in benchmarks}
        self._found: tuple[Any, dict[str, float]] = (None, {})  # ((step, digest of weights), metrics)

    @property
    def metric_names(self) -> list[str]:
        """The names of the metrics that it adds to the Trainer's."""
        names = metric_names(self.settings.samples)
        return [f"eval_{one.name}/{metric}" for one in self.benchmarks for metric in names]

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_train_begin(args, state, control, **kwargs)  # as early as possible; it may also be added later

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Either may be set in the arguments or by the launcher. The launcher sets FSDP only in the environment. For
        # DeepSpeed, transformers turns the launcher's settings into a plugin.
        fsdp = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        deepspeed = {} if args.deepspeed_plugin is None else args.deepspeed_plugin.deepspeed_config
        zero = deepspeed.get("zero_optimization") or {}  # a configuration file may hold null
        if fsdp or zero.get("stage") == 3:
            raise ValueError(
                "Benchmarks in the course of training need whole weights on each process: ZeRO-3 and FSDP shard them. "
                "Leave --eval_benchmarks out, and run `tbrm eval` on the checkpoints."
            )
        policy = self._policy(args.output_dir, args, **kwargs)
        for benchmark in self.benchmarks:
            require_positions(policy, benchmark, self._settings_of(args))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = f"{args.output_dir}, step {state.global_step}"
        policy = self._policy(name, args, **kwargs)
        folder = Path(args.output_dir) / "evaluations" / f"step-{state.global_step}"
        settings = self._settings_of(args)
        which = (state.global_step, policy.weights())  # computed once, since it reads all weights
        if which != self._found[0]:  # with several evaluation sets, the Trainer calls once for each
            metrics: dict[str, float] = {}
            for benchmark in self.benchmarks:
                values = self._evaluated(policy, which[1], benchmark, settings, folder, args)
                metrics |= {f"eval_{benchmark.name}/{metric}": value for metric, value in values.items()}
            self._found = (which, metrics)
        kwargs["metrics"].update(self._found[1])

    def _policy(self, name: str, args: Any, model: Any, processing_class: Any, **kwargs: Any) -> ModelPolicy:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer is not processing_class and not tokenizer.chat_template:  # a processor, which has the template
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = processing_class.chat_template
        # As in training: DeepSpeed casts the weights themselves, and accelerate's autocast does not reach the model
        # inside an adapter.
        mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        autocast = mixed if args.deepspeed_plugin is None else None
        return ModelPolicy(name, model, tokenizer, self.batch_size, autocast=autocast)

    def _settings_of(self, args: Any) -> Settings:
        if self.settings.chat_template_kwargs is not None:
            return self.settings
        return replace(self.settings, chat_template_kwargs=args.chat_template_kwargs)

    def _evaluated(
        self, policy: ModelPolicy, weights: str, benchmark: Benchmark, settings: Settings, folder: Path, args: Any
    ) -> dict[str, float]:
        """The metrics of one benchmark, the same on every process."""
        process, processes = args.process_index, args.world_size
        places = [(p, s) for p in range(len(benchmark)) for s in range(settings.samples)]
        mine = places[process::processes]
        rows, judge = [], self.judges[benchmark.name]
        silent = args.disable_tqdm or process != 0
        with tqdm(total=len(mine), desc=benchmark.name, unit="completion", disable=silent, leave=False) as bar:
            for some in drawn(policy, benchmark, settings, mine, judge):
                rows += some
                bar.update(len(some))
        everywhere = gather_object(rows)
        path = folder / file_of(benchmark.name)
        values: list[Any] = [None]
        with failing_together():
            if args.should_save:
                path.unlink(missing_ok=True)  # written at the same step before a resume
                result = open_result(path, header(policy, benchmark, settings, weights, judge))
                append(result, everywhere)
                values = [result.metrics()]
        return next(one for one in gather_object(values) if one is not None)
