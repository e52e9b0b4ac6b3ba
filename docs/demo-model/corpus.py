"""Collects the training text: the sources of the Python standard library on this machine.

Every file comes from the folders given (one per Python version, newest first), under the PSF
licence. A file of an older version is taken only where most of it is not in a newer one. The
modules named in HELD_OUT and VALID, with their tests, never reach the training split.
"""

from __future__ import annotations

import ast
import json
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "valid", "held-out"]
Kind = Literal["module", "test", "prose"]

# Families of modules: `statistics` covers statistics.py, _statistics.py, test_statistics.py
# and everything under folders of these names. HELD_OUT is only ever measured at the end;
# VALID is looked at while training.
HELD_OUT = frozenset(
    {
        *("bisect", "calendar", "cmd", "colorsys", "configparser", "difflib", "filecmp"),
        *("fractions", "graphlib", "sched", "shlex", "statistics", "textwrap", "tomllib"),
        *("wsgiref", "zipapp"),
    }
)
VALID = frozenset({"getopt", "netrc", "quopri", "reprlib", "shelve", "timeit", "trace", "xmlrpc"})

# Broken or Python 2 sources that tests read; what the build of one machine wrote.
_SKIPPED_PATHS = ("lib2to3/tests/data/", "test/test_lib2to3/data/", "_sysconfigdata", "config-")
_SKIPPED_PARTS = frozenset({"__pycache__", "site-packages", "dist-packages"})
# Lines in a row that make one shingle, the unit in which overlap is measured.
_SHINGLE_LINES = 5
# An older file is taken when at least this share of its shingles is new.
_MIN_NOVELTY = 0.5
# Generated tables (code pages, Unicode data) hold this share of digits or of escapes.
_TABLE_DIGITS = 0.15
_TABLE_ESCAPES = 0.10
_MAX_SNIPPET_CHARS = 4000
_MIN_SNIPPET_CHARS = 60

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text: a source file, or a chapter of the language reference (kind prose)."""

    path: str
    split: Split
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snippet:
    """One function or class, dedented, with what chat samples need to ask for it."""

    split: Split
    kind: Kind
    name: str
    # The line(s) from `def` or `class` to the colon.
    header: str
    # First line of the docstring; empty where there is none.
    summary: str
    source: str
    # No method: it also trains plain completion.
    stands_alone: bool


def collect_documents(stdlib_dirs: Iterable[Path]) -> list[Document]:
    """Returns the texts of all folders without repeats; newest version first.

    Raises:
        FileNotFoundError: a folder holds no standard library.
    """
    documents: list[Document] = []
    seen: set[int] = set()
    for n_newer, stdlib in enumerate(stdlib_dirs):
        if not (stdlib / "os.py").is_file():
            raise FileNotFoundError(f"{stdlib} holds no os.py: not a standard library")
        for document in _read_stdlib(stdlib):
            if n_newer and document.split != "train":
                continue  # measured on the newest version alone
            if _novelty(document.text, seen) >= _MIN_NOVELTY:
                documents.append(document)
                seen |= _shingles(document.text)
    return _without_leaks(documents)


def collect_snippets(documents: Iterable[Document]) -> list[Snippet]:
    """Returns the functions and classes of moderate length in the sources, nested ones too."""
    return [
        snippet
        for document in documents
        if document.kind != "prose"
        for snippet in _snippets_of(document)
    ]


def save_jsonl(path: Path, records: Iterable[Document | Snippet]) -> None:
    """Writes one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def load_documents(path: Path) -> list[Document]:
    """Reads what save_jsonl wrote."""
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def load_snippets(path: Path) -> list[Snippet]:
    """Reads what save_jsonl wrote."""
    with path.open(encoding="utf-8") as file:
        return [Snippet(**json.loads(line)) for line in file]


def _read_stdlib(stdlib: Path) -> Iterator[Document]:
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        name = relative.as_posix()
        if _SKIPPED_PARTS & set(relative.parts) or name.startswith(_SKIPPED_PATHS):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a test file in another encoding
        if not text.strip() or _is_table(text):
            continue
        if name == "pydoc_data/topics.py":
            yield from _topics(name, text)
            continue
        yield Document(path=name, split=_split_of(relative), kind=_kind_of(relative), text=text)


def _topics(name: str, text: str) -> Iterator[Document]:
    """The language reference as pydoc shows it: a literal dict of chapters."""
    (value,) = (node.value for node in ast.parse(text).body if isinstance(node, ast.Assign))
    for topic, chapter in ast.literal_eval(value).items():
        yield Document(path=f"{name}:{topic}", split="train", kind="prose", text=chapter)


def _family(part: str) -> str:
    return part.removesuffix(".py").removeprefix("test_").lstrip("_")


def _split_of(relative: Path) -> Split:
    families = {_family(part) for part in relative.parts}
    if families & HELD_OUT:
        return "held-out"
    return "valid" if families & VALID else "train"


def _kind_of(relative: Path) -> Kind:
    parts = relative.parts
    is_test = any(p in {"test", "tests", "idle_test"} or p.startswith("test_") for p in parts)
    return "test" if is_test else "module"


def _is_table(text: str) -> bool:
    digits = sum(map(str.isdigit, text))
    escapes = sum(text.count(mark) for mark in ("\\x", "\\u", "0x")) * 4
    return digits > _TABLE_DIGITS * len(text) or escapes > _TABLE_ESCAPES * len(text)


def _shingles(text: str) -> set[int]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    n = min(_SHINGLE_LINES, len(lines))
    return {hash(tuple(lines[i : i + n])) for i in range(len(lines) - n + 1)}


def _novelty(text: str, seen: set[int]) -> float:
    shingles = _shingles(text)
    return len(shingles - seen) / max(1, len(shingles))


def _without_leaks(documents: list[Document]) -> list[Document]:
    """Drops training files that repeat held-out or validation text, and its older versions.

    A tenth of a file's shingles is the line: below it are licence headers and idioms.
    """
    kept_out = [d for d in documents if d.split != "train"]
    secret = set[int]().union(*(_shingles(d.text) for d in kept_out))
    max_repeats = 0.1
    return [
        d for d in documents if d.split != "train" or 1 - _novelty(d.text, secret) <= max_repeats
    ]


def _snippets_of(document: Document) -> Iterator[Snippet]:
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return  # newer syntax than this interpreter's, or broken on purpose
    lines = document.text.splitlines(keepends=True)
    for node, parent in _definitions(tree):
        if snippet := _snippet(node, parent, lines, document):
            yield snippet


def _definitions(parent: ast.AST) -> Iterator[tuple[_Definition, ast.AST]]:
    """Yields functions and outer classes with what they are defined in."""
    for node in ast.iter_child_nodes(parent):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function or (isinstance(node, ast.ClassDef) and isinstance(parent, ast.Module)):
            yield node, parent
        yield from _definitions(node)


def _snippet(
    node: _Definition, parent: ast.AST, lines: list[str], document: Document
) -> Snippet | None:
    docstring = (ast.get_docstring(node) or "").strip()
    stands_alone = not isinstance(parent, ast.ClassDef)
    # The decorators of a nested function mean something only where it is nested.
    decorators = node.decorator_list if isinstance(parent, ast.Module | ast.ClassDef) else []
    first = min([node.lineno, *(d.lineno for d in decorators)])
    source = textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip() + "\n"
    header = textwrap.dedent("".join(lines[node.lineno - 1 : node.body[0].lineno - 1])).rstrip()
    # `def f(): return 1` has no header of its own; a method with no words serves nothing.
    if not header.endswith(":") or not (docstring or stands_alone):
        return None
    if not _MIN_SNIPPET_CHARS <= len(source) <= _MAX_SNIPPET_CHARS:
        return None
    return Snippet(
        split=document.split,
        kind=document.kind,
        name=node.name,
        header=header,
        summary=docstring.split("\n\n")[0].replace("\n", " "),
        source=source,
        stands_alone=stands_alone,
    )
