"""Benchmarks in the course of training: the evaluation of `tbrm eval`, at each evaluation of the Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..processes import failing_together
from .benchmarks import Benchmark, require_distinct_names
from .results import append, open_result
from .run import Judge, ModelPolicy, Settings, drawn, header


class EvaluationCallback(TrainerCallback):
    """Evaluates the policy on benchmarks, and adds `eval_{benchmark}/{metric}` to the Trainer's metrics.

    `metric_for_best_model="eval_math500/avg@1"` then chooses the best checkpoint by it. Processes share the work.
    Every completion is kept, in `output_dir/evaluations/step-N`. A run needs no evaluation set beside it.

    Args:
        benchmarks: what to evaluate on.
        settings: how the problems are asked, and completions drawn.
        batch_size: completions generated at once, on each process.

    Raises:
        ValueError: in one line, for benchmarks of one name, or a judge that needs what is not installed.
    """

    evaluates = True  # without an evaluation set too

    def __init__(self, benchmarks: Sequence[Benchmark], settings: Settings, batch_size: int = 64) -> None:
        require_distinct_names(benchmarks)
        self.benchmarks = list(benchmarks)
        self.settings = settings
        self.batch_size = batch_size
        self.judges = {one.name: Judge(one) for one in benchmarks}
        self._found: tuple[Any, dict[str, float]] = (None, {})  # of which weights at which step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sharded = getattr(args, "fsdp_plugin_args", None) or getattr(args, "fsdp", None)
        zero = getattr(getattr(args, "hf_deepspeed_config", None), "is_zero3", lambda: False)()
        if sharded or zero:
            raise ValueError(
                "Benchmarks in the course of training need whole weights on each process: ZeRO-3 and FSDP shard them. "
                "Leave --eval_benchmarks out, and run `tbrm eval` on the checkpoints."
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = f"{args.output_dir}, step {state.global_step}"
        policy = ModelPolicy(name, kwargs["model"], kwargs["processing_class"], self.batch_size)
        folder = Path(args.output_dir) / "evaluations" / f"step-{state.global_step}"
        which = (state.global_step, policy.weights())  # once: it reads all of them
        if which != self._found[0]:  # the Trainer calls once for each of several evaluation sets
            metrics: dict[str, float] = {}
            for benchmark in self.benchmarks:
                values = self._evaluated(policy, which[1], benchmark, folder, args)
                metrics |= {f"eval_{benchmark.name}/{metric}": value for metric, value in values.items()}
            self._found = (which, metrics)
        kwargs["metrics"].update(self._found[1])

    def _evaluated(
        self, policy: ModelPolicy, weights: str, benchmark: Benchmark, folder: Path, args: Any
    ) -> dict[str, float]:
        """The metrics of one benchmark, the same on every process."""
        process, processes = args.process_index, args.world_size
        places = [(p, s) for p in range(len(benchmark)) for s in range(self.settings.samples)]
        mine = places[process::processes]
        rows, judge = [], self.judges[benchmark.name]
        silent = args.disable_tqdm or process != 0
        with tqdm(total=len(mine), desc=benchmark.name, unit="completion", disable=silent, leave=False) as bar:
            for some in drawn(policy, benchmark, self.settings, mine, judge):
                rows += some
                bar.update(len(some))
        everywhere = gather_object(rows)
        path = folder / f"{benchmark.name}.jsonl"
        values: list[Any] = [None]
        with failing_together():
            if args.should_save:
                path.unlink(missing_ok=True)  # of the same step, before a resume
                result = open_result(path, header(policy, benchmark, self.settings, weights, judge))
                append(result, everywhere)
                values = [result.metrics()]
        return next(one for one in gather_object(values) if one is not None)
