"""What the commands refuse before they load anything, and in whole sentences."""

import pytest

from tbrm_trl.cli import main, train
from tbrm_trl.cli.parsing import sorted_words
from tbrm_trl.evaluation.sampling import Sampling
from tbrm_trl.rewards import reward_function

MODEL = ("--model_name_or_path", "m")
BENCHMARK = ("--eval_benchmarks", "gym:chain_sum(size=4)")


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["--compare", "a"], ["--compare takes two results, not 1"]),
        (["--compare", "a", "b", "--benchmarks", "x"], ["--compare compares what was evaluated: leave --benchmarks"]),
        (["--compare", "a", "b", "--limit", "3", "--samples", "2"], ["leave --limit, --samples out"]),
        ([], ["--model_name_or_path is missing", "--benchmarks is missing"]),
        ([*MODEL, "--suite", "paper"], ["there is no suite 'paper'. Names: tbrm-paper"]),
        ([*MODEL, "--suite", "tbrm-paper", "--samples", "2"], ["--suite sets samples and temperature"]),
        ([*MODEL, "--suite", "tbrm-paper", "--temperature", "0.5"], ["--suite sets samples and temperature"]),
        ([*MODEL, "--suite", "tbrm-paper", "--temperature", "1.0"], ["--suite sets samples and temperature"]),
        ([*MODEL, "--benchmarks", "math500", "--limit", "0"], ["--limit 0 must be at least 1"]),
        (
            [*MODEL, "--benchmarks", "x", "--limit", "0", "--temperature", "nan", "--top_p", "7", "--top_k", "-1"],
            ["--limit 0", "--temperature=nan must be 0", "--top_p=7.0 must be in", "--top_k=-1 must be 0"],
        ),
    ],
)
def test_evaluations(words, problems, capsys):
    """Every problem at once, a line each."""
    with pytest.raises(SystemExit) as ended:
        main(["eval", *words])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tbrm eval: ")]
    assert ended.value.code == 2 and len(said) == len(problems)
    assert all(problem in line for problem, line in zip(problems, said, strict=True))


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ("reward_weights: [1e-1, null]", "reward_weights takes a list of float or null, not ['1e-1', None]"),
        ("reward_weights: [1.0, high]", "reward_weights takes float, not 'high'"),
        ("eval_samples: 2.0", "eval_samples takes int, not 2.0"),
        ("max_steps: 1.5", "max_steps takes int, not 1.5"),
        ("max_steps: true", "max_steps takes int, not True"),
        ("adam_beta1: [0.9]", "adam_beta1 takes float, not [0.9]"),
        ("reward_funcs: null", "reward_funcs takes a list of str or a mapping, not None"),
        ("eval_temperature: null", "eval_temperature takes float, not None"),
        ("run_name: 5", "run_name takes str or null, not 5"),
        ("save_strategy: no", "save_strategy takes str, not False. YAML reads yes, no, on and off as true or false"),
        ("bf16: 1", "bf16 takes true or false or null, not 1"),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs takes a mapping or str or null, not [1]"),
        ("beta: null", "beta takes float, not None"),
        ("optim: [adamw_torch]", "optim takes"),
        ("generation_kwargs: '{min_new_tokens: 2}'", "generation_kwargs takes a JSON object, such as"),
        ("soft_value_beta: [1]", "soft_value_beta takes float or null, not [1]"),
        ("num_processes: four", "num_processes takes int, not 'four'"),
        ("num_processes: [2, 3]", "num_processes takes one value, not '2 3'"),
    ],
)
def test_fields_of_a_recipe_of_another_type(recipe, problem, tmp_path, capsys):
    """Before any field of the configuration is used, and all of them at once."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{recipe}\nlearning_rate: fast\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(path), "--dataset_name", "d"])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 2
    assert said[0].startswith(f"tbrm train: {path}: {problem}") and "learning_rate takes float, not 'fast'" in said[1]


def test_numbers_and_lists_of_a_recipe(tmp_path):
    """YAML 1.1 has 1e-6 as text. A list may be one value, a reward function may have its weight, β may be whole."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "dataset_name: d\noutput_dir: o\nuse_cpu: true\nreward_weights: [1e-1, 2]\nreward_funcs: {math: 1, format: 0.5}"
        "\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6, name: a1e}\nlearning_rate: 1e-6"
        "\nbeta: 1\nreport_to: none\nreward_on_error: -1\nlora_target_modules: all-linear\nuse_peft: true\noptim: sgd\n"
    )
    data, config, model = train.parse(["--config", str(path)])
    assert config.reward_weights == [0.1, 2] and data.reward_funcs == {"math": 1, "format": 0.5}
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6, "name": "a1e"} and config.learning_rate == 1e-6
    assert (config.beta, config.reward_of_failure, model.lora_target_modules) == (1, -1.0, "all-linear")


def test_a_negative_number_with_an_exponent():
    _, config, _ = train.parse(
        ["--dataset_name", "d", "--output_dir", "o", "--use_cpu", "true", "--reward_weights", "-1e-1", "0.5"]
    )
    assert config.reward_weights == [-0.1, 0.5]


@pytest.mark.parametrize("first", [True, False])
def test_the_command_line_overrides_a_recipes_launcher_options(first, tmp_path):
    """In any order. A field that is null or false is as if it were not there."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "dataset_name: d\nnum_processes: 8\nmulti_gpu: true\naccelerate_config: zero3\nnum_machines: null\n"
    )
    recipe, line = (
        ["--config", str(path)],
        ["--num_processes", "4", "--multi_gpu", "false", "--accelerate_config", "zero2"],
    )
    words = sorted_words(train.parser(), recipe + line if first else line + recipe, train.launcher_options())
    assert sorted(words.launcher) == sorted(["--num_processes", "4", "--accelerate_config", "zero2"])


def test_variables_of_the_environment_in_a_recipe(tmp_path):
    """TRL's `env`. Accelerate's option of that name is for TPUs."""
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset_name: d\noutput_dir: o\nenv: {A_VARIABLE: b}\n")
    words = sorted_words(train.parser(), ["--config", str(path)], train.launcher_options())
    assert words.launcher == []


def test_a_field_that_stands_twice(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.02\nlearning_rate: 1e-5\nbeta: 0.2\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path), "--dataset_name", "d"])
    assert f"{path}: beta is given twice" in capsys.readouterr().err


def test_options_of_an_adapter_that_nothing_asks_for(capsys):
    words = ["--dataset_name", "d", "--output_dir", "o", "--use_cpu", "true", "--lora_r", "8"]
    for command in ("train", "estimate"):
        with pytest.raises(SystemExit):
            main([command, *words])
        assert f"tbrm {command}: --lora_r without --use_peft" in capsys.readouterr().err
    for said in ("true", "false"):  # a recipe's adapter may be switched off
        assert train.parse([*words, "--use_peft", said])[2].use_peft == (said == "true")


def test_one_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "a.yaml", "--config", "b.yaml", "--dataset_name", "d"])
    assert "--config is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--difficulty", "min_terms"], "--difficulty takes KEY=VALUE with JSON values, not 'min_terms'"),
        (["--difficulty", "min_terms=two"], "--difficulty takes KEY=VALUE with JSON values"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--rollouts-per-step", "9", "--train-problems", "8"], "must be at most --train-problems, 8"),
    ],
)
def test_demos(words, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", *words])
    assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_a_demo_with_fewer_problems_than_it_asks_for(tmp_path):
    """There are 9·9 sums of two digits and as many differences: no thousand."""
    with pytest.raises(SystemExit, match="Lower --train-problems or --eval-problems"):
        main(["demo", "--model", "m", "--train-problems", "1000", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "nonsense"], "^Dataset 'nonsense' not registered$"),
        (["--difficulty", "min_terms=5", "max_terms=2"], "^max_terms must be >= min_terms$"),
        (["--difficulty", "foo=1"], "unexpected keyword argument 'foo'"),
    ],
)
def test_a_demo_of_no_task(words, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        main(["demo", "--output", str(tmp_path), *words])
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip().count(".") == 2


def test_ways_to_sample():
    """All problems of one setting at once."""
    for good in (dict(temperature=0.0), dict(top_p=1.0, top_k=0, max_new_tokens=1), dict(top_p=0.1, top_k=5)):
        Sampling(**good)
    with pytest.raises(ValueError) as refused:
        Sampling(temperature=-0.1, top_p=0.0, top_k=-1, max_new_tokens=0)
    named = [line.partition("=")[0] for line in str(refused.value).splitlines()]
    assert named == ["temperature", "top_p", "top_k", "max_new_tokens"]
    with pytest.raises(ValueError, match=r"top_p=1.5 must be in \(0, 1\]"):
        Sampling(top_p=1.5)
    with pytest.raises(ValueError, match="2 greedy samples of a prompt are all the same"):
        Sampling(temperature=0.0).require_distinct(2)
    Sampling(temperature=0.0).require_distinct(1)
    Sampling(temperature=0.5).require_distinct(2)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--eval_samples", "4", "--eval_temperature", "1"], "--eval_samples, --eval_temperature without --eval_bench"),
        (["--prompt_template", "{question}", "--system_prompt", "S"], "--system_prompt changes nothing beside"),
        (["--generation_kwargs", "{min_new_tokens: 2}"], "--generation_kwargs takes a JSON object, such as"),
        (["--model_init_kwargs", "bf16"], "--model_init_kwargs takes a JSON object, such as"),
        (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs takes a JSON object, such as"),
        (["--model_init_kwargs", '{"torch_dtype": "bfloat16"}'], "with torch_dtype='bfloat16' is refused: TRL would"),
        (
            ["--reward_funcs", "length(limit='a')"],
            "length needs whole numbers 0 ≤ free < limit, not free=0 and limit='a'",
        ),
        (["--reward_funcs", "helpers.reward_functions.Touchy(x=1)"], "needs other arguments"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "nothing to evaluate on: name --eval_benchmarks"),
        ([*BENCHMARK, "--eval_samples", "2"], "--eval_samples 2 would all be the same: give an --eval_temperature"),
        ([*BENCHMARK, "--eval_samples", "0"], "--eval_samples 0 must be at least 1"),
        ([*BENCHMARK, "--eval_max_new_tokens", "0"], "--eval_max_new_tokens 0 must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "`gradient_accumulation_steps=0` is refused: it must be at least 1"),
        (["--model", "m"], "there is no option --model. Did you mean --model_name_or_path?"),
        (["--torch_dtype", "bfloat16"], "there is no option --torch_dtype. Did you mean --dtype?"),
        (["--eval_dataset", "d"], "there is no option --eval_dataset. Did you mean --eval_benchmarks?"),
    ],
)
def test_options_without_effect_or_meaning(words, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", *MODEL, "--dataset_name", "d", "--output_dir", "o", "--use_cpu", "true", *words])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and said.startswith("tbrm train: ") and problem in said


def test_a_reward_that_raises_when_it_is_made():
    with pytest.raises(
        ValueError, match=r"'helpers.reward_functions.Touchy\(limit=0\)' cannot be made: ZeroDivisionErr"
    ):
        reward_function("helpers.reward_functions.Touchy(limit=0)")


def test_a_reward_that_judges_benchmarks_alone():
    words = [*BENCHMARK, "--eval_reward", "format", "--eval_strategy", "steps", "--eval_steps", "1"]
    data, config, _ = train.parse(["--dataset_name", "d", "--output_dir", "o", "--use_cpu", "true", *words])
    (callback,) = train.evaluations(data, config)
    assert [judge.benchmark.reward for judge in callback.judges.values()] == ["format"]


def test_data_without_a_column_of_prompts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"promt": "1+1", "answer": "2"}\n')
    data, _, _ = train.parse(["--dataset_name", str(path), "--output_dir", "o", "--use_cpu", "true"])
    with pytest.raises(ValueError, match=r"columns, promt, answer.* is called prompt, problem or question\. Rename"):
        train.load(data)
    path.write_text('{"prompt": "1+1", "response": "2", "reward": 1.0}\n')
    with pytest.raises(ValueError, match=r"In a log, completions stand in the column `completion`"):
        train.load(data)


def test_options_of_the_hub_beside_a_file(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1", "answer": "2"}\n')
    data, _, _ = train.parse(
        ["--dataset_name", str(path), "--output_dir", "o", "--use_cpu", "true", "--dataset_config", "en"]
    )
    assert len(train.load(data)) == 1
    assert f"--dataset_config en is for data sets of the Hub: all 1 rows of {path} count." in capsys.readouterr().out
