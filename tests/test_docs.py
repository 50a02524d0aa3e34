"""The documents stay true: options, metrics and links are those of the code, and their programs run."""

import importlib.util
import re
import runpy
import sys
from collections import Counter
from dataclasses import fields, replace
from functools import cache
from html.parser import HTMLParser
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common.tiny import save
from helpers.runs import logged
from helpers.scripted import script, scripted_trainer
from markdown import Markdown
from markdown_it import MarkdownIt
from mkdocs.config import load_config
from trl import GRPOConfig, ModelConfig, TrlParser

from tbrm_trl import SoftValue, TBRMConfig, TBRMTrainer
from tbrm_trl.checks.trl_options import GIVEN_A_MEANING, KEPT, REFUSED
from tbrm_trl.cli.evaluate import EvaluationArguments
from tbrm_trl.cli.train import DataArguments
from tbrm_trl.options import TBRMOptions, option_texts
from tbrm_trl.report.charts import CHARTS

ROOT = Path(__file__).parent.parent

SPEC = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)


def test_what_is_generated_is_up_to_date():
    """Tables of options and lines of links: `python docs/generate.py` rewrites them."""
    assert not generate.outdated()


def test_every_option_of_trl_has_one_place():
    text = (ROOT / "docs/configuration.md").read_text()
    missing = [name for name in (*KEPT, *GIVEN_A_MEANING, *REFUSED) if f"`{name}`" not in text]
    assert not missing


def test_every_option_of_ours_is_documented_with_its_default():
    """The docstring of `TBRMOptions` is what `--help` and the table are made of."""
    inherited = {field.name for field in fields(GRPOConfig)}
    own = {field.name: field.default for field in fields(TBRMConfig) if field.name in vars(TBRMOptions)}
    texts = option_texts(TBRMOptions)
    assert {field.name for field in fields(TBRMConfig)} - inherited <= set(texts)
    assert set(texts) == set(own)
    own["truncation"] = "terminal"  # None until the older option `mask_truncated_completions` is read
    defaults = generate.option_defaults(TBRMOptions)
    assert {name: eval(default) for name, default in defaults.items()} == own


def test_defaults_of_trl_that_are_named(tmp_path):
    text = (ROOT / "docs/configuration.md").read_text()
    paragraph = next(part for part in text.split("\n\n") if part.startswith("TRL's own defaults"))
    named = {name: eval(value) for name, value in re.findall(r"`(\w+)=([\w.]+)`", paragraph)}
    config = TBRMConfig(str(tmp_path), use_cpu=True)
    assert len(named) >= 7
    assert named == {name: getattr(config, name) for name in named}


def test_help_says_what_the_docstring_says():
    """The comparison ignores whitespace, since argparse breaks lines."""
    shown = "".join(TrlParser((TBRMConfig,)).format_help().split())
    texts = option_texts(TBRMOptions)
    assert texts
    assert not [name for name, text in texts.items() if "".join(text.split()) not in shown]


def pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(page)):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        lines = re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor)
        if not target.exists():
            broken.append(link)
        elif lines:
            if not 1 <= int(lines[1]) <= int(lines[2] or lines[1]) <= len(target.read_text().splitlines()):
                broken.append(link)
        elif anchor and anchor not in anchors(target):
            broken.append(link)
    assert not broken


def test_every_file_that_is_named_exists():
    """These are paths from the repository's root in backticks."""
    named = [
        (page.name, path)
        for page in pages()
        for path in re.findall(r"`((?:src|tests|benchmarks|examples|docs)/[\w/.-]+)`", prose(page))
    ]
    assert len(named) > 10
    assert not [(page, path) for page, path in named if not (ROOT / path).exists()]


def test_the_details_that_matter_link_to_what_they_name():
    """Entries are numbered in order, and each link begins at the definition of the identifier that it shows."""
    page = ROOT / "docs/implementation-details.md"
    entries = re.findall(r"^(\d+)\. (.*(?:\n(?:   .*)?)*)", page.read_text(), flags=re.M)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    assert 20 <= len(entries) <= 40
    for number, text in entries:
        links = generate.CODE_LINK.findall(text)
        assert links, f"entry {number} links to no code"
        for name, file, first, last in links:
            lines = (page.parent / file).read_text().splitlines()[int(first) - 1 : int(last)]
            assert re.match(rf"\s*(def |class )?{name.split('.')[-1]}\b", lines[0]), (number, name)


def test_every_estimator_is_in_the_theory():
    text = (ROOT / "docs/theory.md").read_text()
    shipped = [name for name, one in SoftValue.registry.items() if one.__module__.startswith("tbrm_trl.")]
    assert len(shipped) == 11
    for name in shipped:
        assert re.search(rf"^\| `{name}` \|", text, flags=re.M) and f"**`{name}`.**" in text, name


def test_every_metric_of_ours_is_documented(tmp_path):
    trainer = scripted_trainer(save(tmp_path / "model"), script(), tmp_path)
    trainer.train()
    text = (ROOT / "docs/metrics.md").read_text()
    entry = trainer.state.log_history[0]
    ours = [name for name in entry if not name.startswith(("completions/", "rewards/"))]
    assert {"residual/mean", "residual/rms", "soft_value", "log_ratio", "kl", "entropy", "pad_fraction"} <= set(ours)
    trainers_own = {"epoch", "step"}
    assert not [name for name in ours if f"`{name}`" not in text and name not in trainers_own]


def test_troubleshooting_names_what_exists():
    """In backticks: options, with or without a value, metrics, and files of a run. In italics: charts of the report."""
    page = prose(ROOT / "docs/troubleshooting.md")
    options = {
        field.name for one in (TBRMConfig, ModelConfig, DataArguments, EvaluationArguments) for field in fields(one)
    }
    metrics = set(re.findall(r"`([\w/]+)`", (ROOT / "docs/metrics.md").read_text())) - options
    metrics |= {f"residual/{name}" for name in ("ahead_rms", "reused_rms", "replayed_rms", "logged_rms")}
    metrics |= {f"completions/{name}" for name in ("clipped_ratio", "mean_terminated_length")}  # TRL's
    files = {"skipped_updates/", "zero3_offload.yaml", "log.jsonl", "tbrm.yaml"}
    others = files | {"reference_model", "generation_config", "model", "async def"}
    named = [one for one in re.findall(r"`([^`]+)`", page) if re.match(r"(--)?[a-z][\w/.]*(=|$)", one)]
    named = [one.removeprefix("--").partition("=")[0] for one in named]
    assert len(named) > 80
    assert not set(named) - options - metrics - others
    assert {"reference_model"} <= set(signature(TBRMTrainer.__init__).parameters)

    charts = {title for title, *_ in CHARTS} | {"Time", "Distribution of the residual", "Calibration of the soft value"}
    report = "".join(file.read_text() for file in (ROOT / "src/tbrm_trl/report").glob("*.*"))
    assert not [title for title in charts if title not in report]
    italics = set(" ".join(one.split()) for one in re.findall(r"(?<!\*)\*(?!\*)([^*]+)\*(?!\*)", page))
    assert italics - {"italics", "below"} <= charts


class Shown(HTMLParser):
    """What a page of HTML shows: its text without blanks, and the counts of its formatting elements."""

    FORM = frozenset(("a", "code", "em", "h1", "h2", "h3", "img", "li", "strong", "table", "td", "th"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.form: Counter[str] = Counter()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.form.update({tag} & self.FORM)
        self.form.update(f"numbered from {value}" for name, value in attrs if name == "start")

    def handle_data(self, data):
        self.text += "".join(data.split())


@cache
def site_markdown() -> Markdown:
    """The Markdown of `mkdocs.yml`, without links to headings and colours."""
    config = load_config(str(ROOT / "mkdocs.yml"))
    extensions = [one for one in config.markdown_extensions if one not in ("toc", "pymdownx.highlight")]
    return Markdown(extensions=extensions, extension_configs=config.mdx_configs)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_site_shows_what_the_repository_shows(page):
    """MkDocs reads a Markdown that differs from CommonMark, for example in nested lists and stars."""
    site = Shown(site_markdown().reset().convert(page.read_text()))
    repository = Shown(MarkdownIt("commonmark").enable("table").render(page.read_text()))
    assert site.form == repository.form
    assert site.text == repository.text


def programs_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


def test_the_example_of_an_estimator_is_the_documents_and_runs(tmp_path, monkeypatch):
    """Word for word and under 60 lines; its value is V_θ(s_1) without gradient."""
    example = ROOT / "examples/frozen_soft_value.py"
    program = example.read_text()
    assert programs_of("docs/extending.md")[0] == program
    assert len(program.splitlines()) < 60
    assert program.startswith("# python examples/frozen_soft_value.py")

    monkeypatch.setattr(SoftValue, "registry", dict(SoftValue.registry))  # removes the name after this test
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", save(tmp_path / "model"), "--output_dir", "out", "--max_steps", "2", "--use_cpu"]
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    trained = []
    train = TBRMTrainer.train
    monkeypatch.setattr(TBRMTrainer, "train", lambda self: (train(self), trained.append(self)))
    frozen = runpy.run_path(str(example), run_name="__main__")["FrozenValue"]
    (trainer,) = trained
    assert trainer.state.global_step == 2
    assert type(trainer._soft_value) is frozen

    rows = SimpleNamespace(policy_value=torch.tensor([20.0, 30.0], requires_grad=True))
    value = trainer._soft_value(rows)
    assert value.tolist() == [20.0, 30.0] and not value.requires_grad


def test_the_documents_estimator_with_trained_parameters_learns_and_resumes(tmp_path, monkeypatch):
    """Rewards of one prompt are all 1, so V_φ rises from 0 towards 1; a resumed run ends with the same head."""
    monkeypatch.setattr(SoftValue, "registry", dict(SoftValue.registry))
    model = save(tmp_path / "model")
    scope: dict = {}
    exec(programs_of("docs/extending.md")[1].replace("Qwen/Qwen2.5-0.5B", model), scope)
    rows = [replace(row, reward=1.0) for row in script(8)]

    def trainer(folder: str, **options):
        options = {"soft_value": "linear", "max_steps": 4, "learning_rate": 1e-5, "save_steps": 2, **options}
        return scripted_trainer(model, rows, tmp_path / folder, save_strategy="steps", **options)

    whole = trainer("out")
    head = whole._soft_value.head
    assert isinstance(whole._soft_value, scope["LinearValue"]) and not head.weight.any()
    whole.train()
    values = [entry["soft_value"] for entry in whole.state.log_history if "soft_value" in entry]
    assert len(values) == 4 and values[0] == 0 and values == sorted(values) and values[-1] > 0

    resumed = trainer("out")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert torch.equal(resumed._soft_value.head.weight, head.weight)


def test_the_documents_estimator_with_state_remembers_each_prompt(tmp_path, monkeypatch):
    """A prompt's value is 0 in its first window and its (deterministic) reward from the second on."""
    monkeypatch.setattr(SoftValue, "registry", dict(SoftValue.registry))
    exec(programs_of("docs/extending.md")[2], scope := {})
    rows, model = script(8, unscored=(3,)), save(tmp_path / "model")

    def trainer(**options):
        options = {"soft_value": "mean_so_far", "max_steps": 3, "save_steps": 2, "save_strategy": "steps", **options}
        return scripted_trainer(model, rows, tmp_path / "out", **options)

    whole = trainer()
    whole.train()
    assert isinstance(whole._soft_value, scope["TrackedValue"])
    first, *later = whole.windows
    assert [t.value for t in first] == [0.0] * len(rows)
    for window in later:
        assert [t.value for t in window] == pytest.approx([row.reward or 0.0 for row in rows])
    tracked = dict(whole._soft_value.tracked)
    assert len(tracked) == 7 and {count for count, _ in tracked.values()} == {3}

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert resumed._soft_value.tracked == tracked

    whole.evaluate(whole.train_dataset)
    assert whole._soft_value.tracked == tracked


def test_the_theorys_beta_falls(tmp_path):
    """Each update has its own β, in the residual and in its metrics. V is constant at learning rate 0.

    β V is logged, so its values are proportional to 0.012 · 3^(−t/3) at t = 0, 1, 2. δ's mean is β V − R̄.
    """
    names = {}
    exec(next(text for text in programs_of("docs/theory.md") if "FallingBeta" in text), names)
    rows = script()
    trainer = scripted_trainer(save(tmp_path / "model"), rows, tmp_path / "out", max_steps=3)
    trainer.add_callback(names["FallingBeta"]())
    trainer.train()
    betas = [0.012 * 3 ** (-t / 3) for t in range(3)]
    values, residuals = logged(trainer, "soft_value"), logged(trainer, "residual/mean")
    assert [v / b for v, b in zip(values, betas, strict=True)] == pytest.approx([values[0] / 0.012] * 3, rel=1e-5)
    mean = sum(row.reward for row in rows) / len(rows)
    assert residuals == pytest.approx([value - mean for value in values], abs=1e-6)


def test_the_house_has_every_room_and_module():
    """Kinds with many files, such as estimators and answers, have one line."""
    house = (ROOT / "docs/internals.md").read_text()
    many = {"soft_value", "rewards", "kinds", "cli", "report", "memory"}
    modules = [file for file in (ROOT / "src/tbrm_trl").rglob("*.py") if not file.name.startswith("__")]
    assert {one.name for one in modules if one.parent.name not in many and one.name not in house} == set()
    assert {one.parent.name for one in modules if f"{one.parent.name}/" not in house} == set()
