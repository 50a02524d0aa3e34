"""The model card of a pushed model, and the list of the run's files that are not pushed."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .actor.plan import FOLDER as ACTOR
from .loss.soft_value.sampled import FOLDER as SAMPLES
from .model.publisher import FOLDER as POLICY
from .run_log import EVALUATED, LOG, SKIPPED, UPDATES

# Prompts, completions and numbers of the run, in its output directory. A push leaves out what `.gitignore` names.
AT_HOME = (
    "rollouts/", f"{UPDATES}/", "completions/", f"{SKIPPED}/", "reference_scores/", "runs/", "evaluations/", "records/",
    f"{ACTOR}/", f"{POLICY}/", f"{SAMPLES}/", LOG, "report.html",
)  # fmt: skip
_RECIPE = (
    """
    beta soft_value loss_units reference truncation reward_baseline num_generations temperature learning_rate
    lr_scheduler_type optim max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps
    steps_per_generation num_iterations replay_buffer_size max_completion_length sft_coef entropy_advantage_coef
    """
).split()
_POINTS = 10  # points of the training curve


@dataclass
class CardFacts:
    """The content of a model card.

    Attributes:
        name: name of the model.
        repo: the model's id on the hub; None before it has one.
        base_model: id of the model that was trained; None if it came from a folder.
        adapter: whether only an adapter was trained.
        vision: whether the model reads images.
        dataset: id of the training data on the hub, if it has one.
        rewards: names of the reward functions.
        updates: number of updates.
        settings: options of the run, without secrets.
        log: entries of the run's log, each with a `step`.
        versions: versions of libraries, by name.
        tags: tags of the model.
        method: title, arXiv id and citation of the paper.
    """

    name: str
    repo: str | None
    base_model: str | None
    adapter: bool
    vision: bool
    dataset: str | None
    rewards: Sequence[str]
    updates: int
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]
    tags: Sequence[str]
    method: Mapping[str, str]


def model_card(facts: CardFacts) -> ModelCard:
    """The card. Its `model-index` metadata has the results of the last evaluation."""
    data = ModelCardData(
        base_model=facts.base_model,
        datasets=_on_one_line(facts.dataset) if facts.dataset else None,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="image-text-to-text" if facts.vision else "text-generation",
        model_name=_on_one_line(facts.name),
        tags=["generated_from_trainer", *facts.tags],
        eval_results=_results(facts),
    )
    recipe = {name: facts.settings[name] for name in _RECIPE if facts.settings.get(name) is not None}
    evaluation = last_evaluation(facts.log)
    base = escaped(facts.base_model) if facts.base_model else "a model from a folder"
    trained_on = f" on {escaped(facts.dataset)}" if facts.dataset else ""
    parts = [
        f"# {escaped(facts.name)}",
        f"{'An adapter for' if facts.adapter else 'A fine-tuned version of'} {base}, trained{trained_on} by "
        f"{facts.updates} updates of Trajectory Bellman Residual Minimization (TBRM, "
        f"[arXiv {facts.method['id']}](https://arxiv.org/abs/{facts.method['id']})) with tbrm-trl. "
        f"Rewards: {', '.join(map(escaped, facts.rewards)) or 'those of the logged data'}.",
        "## Use",
        f"```python\n{snippet(facts.repo or facts.name, facts.adapter, facts.vision)}```",
    ]
    if evaluation:
        rows = [[f"{where or 'evaluation set'}", metric, f"{value:.4g}"] for where, metric, value in evaluation]
        parts += [
            "## Evaluation",
            "After the last update that was evaluated.",
            _table(["data", "metric", "value"], rows),
        ]
    if curve := _curve(facts.log):
        parts += ["## Training", curve]
    parts += [
        "## Recipe",
        _table(["option", "value"], [[name, str(getattr(value, "value", value))] for name, value in recipe.items()]),
        "## Versions",
        _table(["library", "version"], [list(row) for row in facts.versions.items()]),
        "## Citation",
        f"```bibtex\n{facts.method['citation']}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def snippet(repo: str, adapter: bool, vision: bool = False) -> str:
    """A program that loads the model and generates an answer."""
    if vision:  # this loader reads an adapter too, and PEFT has no loader for vision models
        return (
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f"name = {json.dumps(repo)}\nprocessor = AutoProcessor.from_pretrained(name)\n"
            "model = AutoModelForImageTextToText.from_pretrained(name)\n"
            'messages = [{"role": "user", "content": [{"type": "text", "text": "2 + 2 ="}]}]\n'
            "inputs = processor.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"\n)\n'
            "print(processor.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))\n"
        )
    module, loader = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    imports = sorted([f"from {module} import {loader}", "from transformers import AutoTokenizer"])
    return (
        "\n".join(imports) + f"\n\nname = {json.dumps(repo)}\ntokenizer = AutoTokenizer.from_pretrained(name)\n"
        f"model = {loader}.from_pretrained(name)\n"
        'inputs = tokenizer("2 + 2 =", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))\n"
    )


def last_evaluation(log: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """The last logged value of each metric, as data set's name ("" if it has none), metric and value."""
    found: dict[tuple[str, str], float] = {}
    for entry in log:
        for name, value in entry.items():
            match = EVALUATED.fullmatch(name)
            if match and isinstance(value, (int, float)):
                found[match["set"] or "", match["metric"]] = float(value)
    return [(where, metric, value) for (where, metric), value in found.items()]


def _results(facts: CardFacts) -> list[EvalResult] | None:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=_on_one_line(where) or "evaluation set",
            dataset_split=_on_one_line(where) or None,  # the client tells sets apart by the split
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for where, metric, value in last_evaluation(facts.log)
    ] or None


def _curve(log: Sequence[Mapping[str, Any]]) -> str | None:
    """Make a table of ten points of training, from the first logged update to the last."""
    entries = [entry for entry in log if isinstance(entry.get("residual/rms"), (int, float))]
    if not entries:
        return None
    places = dict.fromkeys(round(i * (len(entries) - 1) / (_POINTS - 1)) for i in range(_POINTS))
    names = ("reward", "residual/rms", "soft_value", "kl", "entropy")
    rows = [[str(entries[p]["step"]), *(_short(entries[p].get(name)) for name in names)] for p in places]
    return _table(["update", *names], rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Escape text for Markdown and HTML, on one line."""
    return html.escape(re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", _on_one_line(text)), quote=False)


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def keep_at_home(folder: Path) -> None:
    """Add the files that are not pushed to the folder's `.gitignore`. Its existing lines stay."""
    file = folder / ".gitignore"
    lines = file.read_text().splitlines() if file.exists() else []
    missing = [name for name in AT_HOME if name not in lines]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join([*lines, *missing]) + "\n")
