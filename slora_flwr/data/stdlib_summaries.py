"""The embedded instructions: signatures of the standard library, to be summarised.

Each function, method and class of the library with a docstring is one dialogue. Its
prompt is the module's name and the signature, its response is the docstring's first
sentence. As with `stdlib_docs`, the texts are those of the running Python.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from slora_flwr.data.stdlib_docs import modules, root

# Shorter sentences ("Return the name.") do not depend on the signature; longer ones
# are rare, and often no sentences.
MIN_WORDS, MAX_WORDS = 4, 30
_MOST_OF_SIGNATURE = 120

_END = re.compile(r"(?<!e\.g)(?<!i\.e)[.!?](?=\s|$)")


class Summary(NamedTuple):
    """A signature and what it does, with its chapter of the library's reference."""

    chapter: str
    module: str
    prompt: str
    response: str


def load() -> dict[str, list[str]]:
    """Return the data set's columns, by module path, then by position in the file.

    A sentence that comes again belongs to the first signature.
    """
    folder = root()
    found: dict[str, Summary] = {}
    for path, chapter in modules(folder):
        module = _module_name(path.relative_to(folder))
        for signature, docstring in signatures(path):
            sentence = first_sentence(docstring)
            if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
                prompt = f"{module}: {signature}"
                summary = Summary(chapter, module.split(".")[0], prompt, sentence)
                found.setdefault(sentence, summary)
    columns = map(list, zip(*found.values(), strict=True))
    return dict(zip(Summary._fields, columns, strict=True))


def signatures(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the signatures of a source file that have docstrings, with those.

    Parameters
    ----------
    path : Path
        A Python source file. One that does not parse yields nothing.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    yield from _within(tree, "")


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring, in one line.

    It ends where its paragraph does.
    """
    paragraph = " ".join(docstring.strip().split("\n\n", 1)[0].split())
    end = _END.search(paragraph)
    return paragraph[: end.end()] if end else paragraph


def _within(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            if docstring := ast.get_docstring(child):
                yield _signature(child, name)[:_MOST_OF_SIGNATURE], docstring
            inner = f"{name}."
        if not isinstance(child, ast.expr):
            yield from _within(child, inner)


def _signature(
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"def {name}({ast.unparse(node.args)})"


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
