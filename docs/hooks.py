"""What the documentation site needs beside mkdocs.yml, done whenever it is built.

Pages may link to any file of the repository, as they can where the repository is read without the site: those files
are copied to the site, README and its like become pages. The page of commands is made from the commands themselves.
The formulas of docstrings stay as they are, where Markdown would take underscores for emphasis and shapes for links.
"""

from __future__ import annotations

import inspect
import os
import posixpath
import re
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import SimpleTextInlineProcessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from san.cli import COMMANDS, Command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROJECT_PAGES = {
    "README.md": "project/readme.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changes.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


class PlainFormulas(Extension):
    """Markdown whose emphasis is written with asterisks only, and whose links have nothing between their brackets."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Take for text what Markdown would look at later: links have the priority 170, emphasis 60."""
        md.inlinePatterns.register(SimpleTextInlineProcessor(r"(\] )(?=\[)"), "neighbouring_brackets", 175)
        md.inlinePatterns.register(SimpleTextInlineProcessor("(_+)"), "underscores", 65)


def on_config(config: MkDocsConfig) -> None:
    """Add to what mkdocs.yml configures."""
    config.markdown_extensions.append(PlainFormulas())


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages and files from outside docs/."""
    for name, uri in PROJECT_PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for page in files.documentation_pages():
        for _, link, _ in LINK.findall(page.content_string):
            path = _path(link, page)
            uri = _uri(path) if path.is_file() and path.is_relative_to(ROOT) else ""
            if uri.startswith("repository/") and uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where their targets are on the site, and write the page of commands."""
    if page.file.src_uri == "commands.md":
        markdown = "\n".join([markdown, *(_command(name, command) for name, command in COMMANDS.items())])
    return LINK.sub(lambda found: _on_site(found, page.file), markdown)


def _path(link: str, page: File) -> Path:
    """What a link of a page names on disk."""
    return Path(os.path.normpath(Path(str(page.abs_src_path)).parent / link))


def _uri(path: Path) -> str:
    """Where a file of the repository is on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    return PROJECT_PAGES.get(name, f"repository/{name}")


def _on_site(found: re.Match[str], page: File) -> str:
    """A link of Markdown as the site needs it; a folder has no page, so only the words remain."""
    words, link, anchor = found[1], found[2], found[3] or ""
    path = _path(link, page)
    if "://" in link or not path.exists() or not path.is_relative_to(ROOT):
        return found[0]
    if path.is_dir():
        return words
    return f"[{words}]({posixpath.relpath(_uri(path), posixpath.dirname(page.src_uri) or '.')}{anchor})"


def _command(name: str, command: Command) -> str:
    """The help of a command, from the same signature, docstring and examples that `san NAME --help` prints."""
    module, _, attribute = command.home.partition(":")
    function = getattr(import_module(module), attribute)
    docs = docstring_parser.parse(inspect.getdoc(function) or "")
    texts = {parameter.arg_name.lstrip("*"): parameter.description or "" for parameter in docs.params}
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    entries = [_parameter(parameter, hints[parameter.name], texts[parameter.name]) for parameter in parameters]
    examples = f"```sh\n{inspect.cleandoc(command.examples)}\n```"
    return "\n\n".join([f"## san {name}", docs.description or "", examples, *entries, ""])


def _parameter(parameter: inspect.Parameter, hint: Any, text: str) -> str:
    """One argument or option of a command as an entry of a definition list."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"`{parameter.name} …`\n:   {_one_line(text)}"
    if parameter.default is parameter.empty:
        return f"`{parameter.name}`\n:   {_one_line(text)}"
    option = f"--{parameter.name.replace('_', '-')}"
    if hint is bool:
        return (
            f"`{option}`, `--no-{option[2:]}`\n:   {_one_line(text)} Default: {'on' if parameter.default else 'off'}."
        )
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    more = [f"One of {', '.join(f'`{choice}`' for choice in choices)}."] if choices else []
    more += [] if parameter.default is None else [f"Default: `{parameter.default}`."]
    return f"`{option}`\n:   {' '.join([_one_line(text), *more])}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
