"""Parse arguments with TRL's parser. All problems are reported at once, one line each, before anything is loaded."""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, get_type_hints

import yaml
from trl import ModelConfig, TrlParser, get_quantization_config

from ..field_types import fits, in_words

# Numbers that PyYAML takes for text, since YAML 1.1 wants a point in them. YAML 1.2 has them as numbers.
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
# Names that other commands and other versions of TRL have for an option, and its name here.
_ELSEWHERE = {
    "model": "model_name_or_path",
    "model_name_or_path": "model",
    "torch_dtype": "dtype",
    "eval_dataset": "eval_benchmarks",
}


class Refused(Exception):
    """The problems of a command, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [" ".join(one.split()) for one in problems]
        super().__init__("\n".join(self.problems))


def leave(prog: str, refused: Refused) -> NoReturn:
    """Print the problems and exit with code 2.

    One process of each machine prints them, since a file may be missing on one machine only.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for problem in refused.problems:
            print(f"{prog}: {problem}", file=sys.stderr)
    sys.exit(2)


def with_line_breaks(template: str | None) -> str | None:
    """A template, with each `\\n` made a line break if it is on one line: a shell passes a backslash and an n."""
    return template if template is None or "\n" in template else template.replace("\\n", "\n")


def unused_beside_template(names: Iterable[str]) -> list[str]:
    """The problems of options that were given beside `--prompt_template`."""
    return [
        f"--{name} changes nothing beside --prompt_template, which says all that is asked: leave it out."
        for name in names
    ]


def quantization_of(model: ModelConfig) -> Any:
    """TRL's quantization configuration.

    TRL computes in the model's dtype and does not know "auto", so bfloat16 stands in for it.
    """
    return get_quantization_config(replace(model, dtype="bfloat16") if model.dtype == "auto" else model)


class Parser(TrlParser):
    """TRL's parser for dataclasses and a YAML file that the command line overrides. It raises instead of exiting."""

    def __init__(self, *types: type, prog: str, description: str, **defaults: Any) -> None:
        super().__init__(
            types,
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.set_defaults(**defaults)
        for action in self._actions:
            action.required &= action.dest not in defaults
        self.options = {option: action for action in self._actions for option in action.option_strings}
        self.fields = {action.dest: action for action in self._actions if action.dest != "help"}
        self.types: dict[str, Any] = {}
        for one in types:
            self.types |= get_type_hints(one) | getattr(one, "wider_types", {})
        # argparse takes -1e-3 for an option.
        self._negative_number_matcher = re.compile(r"-(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        raise Refused([message])

    def set_defaults_with_config(self, **fields: Any) -> list[str]:
        """Take defaults from a YAML file."""
        read = {name: self.from_yaml(name, value) if name in self.fields else value for name, value in fields.items()}
        return super().set_defaults_with_config(**read)

    def from_yaml(self, name: str, value: Any) -> Any:
        """A field's value, with the texts inside it converted. A field that takes a list may hold a single value.

        Text that is the whole value stays, since argparse converts it.
        """
        action = self.fields[name]
        if action.nargs in ("+", "*") and isinstance(value, (str, int, float)):
            value = [value]
        if isinstance(value, list) and callable(action.type):
            return [action.type(one) if isinstance(one, str) else one for one in value]
        return _with_numbers(value) if isinstance(value, dict) else value

    def parse(self, words: "Words") -> tuple[Any, ...]:
        """Make the dataclasses from checked words. Raises `Refused` with all problems that a dataclass finds."""
        try:
            return self.parse_args_and_config(words.own, fail_with_unknown_args=False)
        except (ValueError, TypeError) as error:
            raise Refused(_lines_of(error)) from error


def _with_numbers(value: Any) -> Any:
    """A mapping of a YAML file, with numbers such as 1e-6 as numbers."""
    if isinstance(value, dict):
        return {name: _with_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_numbers(one) for one in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


@dataclass
class Words:
    """The words of a command line, sorted by which program reads them.

    Attributes:
        own: words for the command, `--config` included.
        launcher: words for accelerate's launcher, from the command line and the YAML file.
        given: names of the command's fields that either of the two gives.
    """

    own: list[str] = field(default_factory=list)
    launcher: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)


def sorted_words(
    parser: Parser, arguments: Sequence[str], launcher: Mapping[str, argparse.Action] = MappingProxyType({})
) -> Words:
    """Sort words by which program reads them. Raises `Refused` with all their problems.

    Args:
        parser: the command's parser.
        arguments: the command's arguments.
        launcher: accelerate's options.
    """
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        sys.exit()
    words, problems = Words(), list[str]()
    of_file, of_line = dict[str, list[str]](), dict[str, list[str]]()  # words for the launcher, by option
    names = [*(option for option in parser.options if option != "-h"), "--config", *launcher]
    for option, values in _by_option(arguments):
        name = option.partition("=")[0]
        whole = [option, *values]
        values = option.split("=", 1)[1:] + values
        if name == "--config" and "--config" in words.own:
            problems.append("--config is given twice. A recipe is one file.")
        elif name == "--config":
            words.own += ["--config", *values]
            problems += _check_config(parser, values, launcher, words.given, of_file)
        elif name in parser.options:
            words.own += whole
            words.given.add(parser.options[name].dest)
            problems += _check_values(name, parser.options[name], values)
        elif name in launcher:
            problems += _add_for_launcher(of_line, name, launcher[name], values)
        elif name.startswith("-"):
            problems.append(f"there is no option {name}.{_meant(name, names)}")
        else:
            problems.append(f"{' '.join(whole)!r} belongs to no option.")
    problems += [
        f"{action.option_strings[0]} is missing: {action.help}"
        for action in parser.fields.values()
        if action.required and action.dest not in words.given
    ]
    if problems:
        raise Refused(problems)
    words.launcher = [word for chosen in (of_file | of_line).values() for word in chosen]
    return words


def _by_option(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option with the words that follow it. The first word opens a group even if it is no option."""
    found: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--") or not found:
            found.append((word, []))
        else:
            found[-1][1].append(word)
    return found


def _add_for_launcher(
    words: dict[str, list[str]], name: str, action: argparse.Action, values: Sequence[str]
) -> list[str]:
    """Set the words of a launcher option, and return its problems. A switch takes no word: if false, it has none."""
    if action.nargs != 0:
        words[action.dest] = [action.option_strings[0], *values]
        return _check_values(name, action, values)
    said = " ".join(values).lower()
    if said not in ("", "true", "false"):
        return [f"{name} takes true or false, not {' '.join(values)!r}."]
    words[action.dest] = [action.option_strings[0]] if said != "false" else []
    return []


def _check_config(
    parser: Parser,
    values: list[str],
    launcher: Mapping[str, argparse.Action],
    given: set[str],
    of_launcher: dict[str, list[str]],
) -> list[str]:
    """The problems of a YAML file. Names of its fields are added to `given`, words for the launcher to the last."""
    if len(values) != 1:
        return ["--config takes one YAML file."]
    (path,) = values
    try:
        text = Path(path).read_text()
        content, twice = yaml.safe_load(text), _given_twice(text)
    except (OSError, UnicodeDecodeError) as error:
        return [f"--config {path} cannot be read ({getattr(error, 'strerror', None) or error})."]
    except yaml.YAMLError as error:
        return [f"--config {path} is not YAML ({error})."]
    if not isinstance(content, dict):
        return [f"--config {path} must hold fields, `name: value`."]
    problems = [f"{path}: {name} is given twice. Leave one of the two out." for name in twice]
    for name, value in content.items():
        said = f"{path}: {name}"
        if name in parser.fields:
            given.add(name)
            texts = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
            problems += _check_values(said, parser.fields[name], texts, whole=False) or _check_type(
                said, parser.types[name], value, parser.from_yaml(name, value)
            )
        elif name == "env":  # TRL's, variables of the environment; accelerate's option of this name is for TPUs
            continue
        elif f"--{name}" in launcher and value is not None:
            words = [str(one) for one in (value if isinstance(value, list) else [value])]
            problems += _add_for_launcher(of_launcher, said, launcher[f"--{name}"], words)
        elif f"--{name}" in launcher:
            continue  # as if it were not there
        else:
            problems.append(f"{path}: there is no field {name}.{_meant(str(name), parser.fields)}")
    return problems


def _given_twice(text: str) -> list[str]:
    """The fields that a YAML text has more than once. PyYAML takes the last of them."""
    mapping = yaml.compose(text, yaml.SafeLoader)
    names = [key.value for key, _ in mapping.value] if isinstance(mapping, yaml.MappingNode) else []
    return [str(name) for name in dict.fromkeys(names) if names.count(name) > 1]


def _check_type(name: str, declared: Any, given: Any, read: Any) -> list[str]:
    """The problem of a YAML value that is not of its field's type. Whole texts are argparse's to read."""
    if isinstance(given, str) or fits(read, declared):
        return []
    unquoted = isinstance(given, bool)
    quote = " YAML reads yes, no, on and off as true or false: put the word in quotes." if unquoted else ""
    return [f"{name} takes {in_words(declared, none='null')}, not {given!r}.{quote}"]


def _check_values(name: str, action: argparse.Action, values: Sequence[str], whole: bool = True) -> list[str]:
    if whole and not values and action.nargs not in ("?", "*", 0):
        return [f"{name} needs a value."]
    if whole and len(values) > 1 and action.nargs in (None, "?"):
        return [f"{name} takes one value, not {' '.join(values)!r}."]
    problems = []
    for value in values:
        try:
            converted: Any = action.type(value) if callable(action.type) else value
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = getattr(action.type, "__name__", "value").replace("string_to_bool", "true or false")
            problems.append(f"{name} takes {kind}, not {value!r}.")
            continue
        if action.choices is not None and converted not in action.choices:
            choices = [str(one) for one in action.choices]
            problems.append(f"{name} takes {', '.join(choices)}, not {value!r}.{_meant(value, choices)}")
        elif name.endswith("_kwargs") and not _is_json_object(value):
            problems.append(f"{name} takes a JSON object, such as '{{\"name\": 1}}', not {value!r}.")
    return problems


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _meant(name: str, names: Iterable[str]) -> str:
    known = {one.lstrip("-"): one for one in names}
    here = known.get(_ELSEWHERE.get(name.lstrip("-"), ""))
    close = [here] if here else difflib.get_close_matches(name, list(known.values()), 1)
    return f" Did you mean {close[0]}?" if close else ""


def _lines_of(error: Exception) -> list[str]:
    """The single problems in a configuration's error, which may list several."""
    first, *others = str(error).split("\n- ")
    return others if others and first.endswith("are refused:") else [str(error)]
