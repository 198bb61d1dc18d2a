"""From a typed function to a command: its signature gives the options, its docstring the help, a mistake one sentence.

jsonargparse checks the values, reads `--config` files and lets the command line override them; here are the names with
dashes, the switches without a value, and the sentences that say what would be right.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

from san.errors import UserError

__all__ = ["call"]

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Types and defaults beside the options; the description and the examples as they are written."""


def call(name: str, function: Callable[..., Any], words: list[str], examples: str) -> Any:
    """Call `function` with the arguments that a command line gives.

    Parameters without a default and `*parameters` become positional, the others options, of which a `list[str]` may be
    given several times; `--config FILE` reads arguments from YAML, and what stands on the line overrides the file.

    Args:
        name: What the user typed in front, such as "san train".
        function: Typed, its docstring in Google's style.
        words: The command line behind `name`.
        examples: The end of the help.

    Raises:
        UserError: An unknown option or key, a missing argument, a value of the wrong type.
    """
    parser, lists = _parser(name, function, examples), _lists(function)
    try:
        namespace = parser.parse_args([_dashed(word, lists) for word in _config_first(words)])
        values = vars(parser.instantiate(namespace))
    except ArgumentError as error:
        raise UserError(_sentence(str(error), parser, function)) from None
    parameters = inspect.signature(function).parameters.values()
    positional = [values.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    rest = [word for p in parameters if p.kind is p.VAR_POSITIONAL for word in values.pop(p.name, None) or []]
    del values["config"]
    return function(*positional, *rest, **values)


def _parser(name: str, function: Callable[..., Any], examples: str) -> ArgumentParser:
    docs = docstring_parser.parse(inspect.getdoc(function) or "")
    helps = {parameter.arg_name.lstrip("*"): parameter.description for parameter in docs.params}
    hints = typing.get_type_hints(function)
    parser = ArgumentParser(
        prog=name,
        description=docs.description,
        epilog=f"examples:\n{examples}",
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-config",
    )
    parser.add_argument("--config", action="config", help="Read options from this YAML file.")
    for parameter in inspect.signature(function).parameters.values():
        _add(parser, parameter, hints[parameter.name], helps.get(parameter.name))
    return parser


def _add(parser: ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str | None) -> None:
    option = "--" + parameter.name.replace("_", "-")
    if parameter.kind is parameter.VAR_POSITIONAL:
        parser.add_argument(parameter.name, nargs="*", type=hint, default=SUPPRESS, help=text)
    elif parameter.default is parameter.empty:
        parser.add_argument(parameter.name, type=hint, help=text)
    elif hint is bool:
        parser.add_argument(option, action=ActionYesNo(no_prefix="no-"), default=parameter.default, help=text)
    else:
        parser.add_argument(option, type=hint, default=parameter.default, help=text)


def _lists(function: Callable[..., Any]) -> set[str]:
    """The options that hold a list; each time that one is given adds to it."""
    hints = typing.get_type_hints(function).items()
    lists = [name for name, hint in hints if any(each == list[str] for each in (hint, *typing.get_args(hint)))]
    return {"--" + name.replace("_", "-") for name in lists}


def _config_first(words: list[str]) -> list[str]:
    """The words with `--config FILE` in front, because jsonargparse lets whatever comes later win."""
    first: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            rest += [word, *left]
        elif word == "--config":
            file = list(islice(left, 1))
            (first if file else rest).extend([word, *file])
        else:
            (first if word.startswith("--config=") else rest).append(word)
    return first + rest


def _dashed(word: str, lists: set[str]) -> str:
    option, equals, value = word.partition("=")
    if not option.startswith("--"):
        return word
    option = option.replace("_", "-")
    # jsonargparse's own sign for adding to a list.
    return option + "+" * (option in lists) + equals + value


def _sentence(message: str, parser: ArgumentParser, function: Callable[..., Any]) -> str:
    """jsonargparse's message, as one sentence of ours where we can say what would be right."""
    names = list(inspect.signature(function).parameters)
    more = f"; `{parser.prog} --help` shows all"
    if found := re.match(r"unrecognized arguments: --([^\s=]+)", message):
        near = _closest(found[1].replace("-", "_"), names).replace("_", "-")
        return f"unknown option --{found[1]}{f', did you mean --{near}?' if near else more}"
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        switch = found[1].lower() in ("true", "false", "yes", "no")
        return f"unknown argument {found[1]}{': a switch has no value, write --NAME or --no-NAME' if switch else more}"
    if found := re.match(r"Option '(\S+)' is not accepted", message):
        near = _closest(found[1].replace("-", "_"), names)
        return f"unknown key {found[1]} in the configuration{f', did you mean {near}?' if near else more}"
    if found := re.match(r"the following arguments are required: ([^,]+)", message):
        return f"{found[1].upper()} is missing{more}"
    if "does not support item assignment" in message:
        return "the configuration needs a list, such as [a, b], where the line takes several words"
    if found := re.match(r"argument (\S+): expected one argument", message):
        return f"{found[1]} needs a value{more}"
    if found := re.match(r'Parser key "config": File does not exist: (.*)', message):
        return f"there is no configuration file {found[1]}"
    if found := re.match(r'Parser key "(\S+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL):
        kind = _describe(_hint(function, found[1].split(".")))
        return f"--{found[1].replace('_', '-')} must be {kind}, not {found[2]}"
    return " ".join(message.replace("Problems parsing config", "the configuration is not valid YAML").split())


def _closest(word: str, choices: list[str]) -> str:
    return next(iter(difflib.get_close_matches(word, choices, n=1)), "")


def _hint(function: Any, path: list[str]) -> Any:
    hint = typing.get_type_hints(function)[path[0]]
    return _hint(hint, path[1:]) if len(path) > 1 and typing.get_type_hints(hint) else hint


def _describe(hint: Any) -> str:
    """A type in words: `int | str` is "a whole number or text"; None only stands for a default, so it is not named."""
    origin = typing.get_origin(hint)
    arguments = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, tuple):
        return f"a list of {len(arguments) if origin is tuple else ''} values, each {_describe(arguments[0])}"
    return _KINDS.get(origin or hint, str(hint))
