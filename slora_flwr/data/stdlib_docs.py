"""The embedded data set: the standard library's docstrings, labelled by chapter.

Real English about real subjects that comes with every Python. Each docstring (of a
module, class, method or function) is one example. Its label is the chapter of the
library reference (docs.python.org/3/library) that describes its module. Small chapters
are merged with a neighbour, and superseded modules keep their former chapter. Nothing
is imported or downloaded: source files are parsed with `ast`.

The texts are those of the running Python, so results are comparable between runs on the
same minor version. A distribution that omits modules (often `tkinter`, `idlelib`) has
fewer examples.
"""

from __future__ import annotations

import ast
import gc
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Chapter -> the modules and packages it describes. Private modules are listed with the
# public one they serve, the REPL with the interpreters.
CHAPTERS: dict[str, str] = {
    # Text Processing, Binary Data, Cryptographic Services, Internationalization
    "text-and-binary": """
        codecs difflib encodings gettext hashlib hmac locale re readline rlcompleter
        secrets sre_compile sre_constants sre_parse string stringprep struct textwrap
    """,
    # Data Types, Functional Programming Modules
    "data-types": """
        _collections_abc _pydatetime _weakrefset array bisect calendar collections copy
        datetime enum functools graphlib heapq operator pprint reprlib types weakref
        zoneinfo
    """,
    # Numeric and Mathematical Modules
    "numeric": """
        _pydecimal _pylong decimal fractions numbers random statistics
    """,
    # File and Directory Access, Data Persistence, Data Compression and Archiving,
    # File Formats, Multimedia Services
    "files": """
        _compat_pickle _compression aifc bz2 chunk colorsys compression configparser
        copyreg csv dbm filecmp fileinput fnmatch genericpath glob gzip imghdr linecache
        lzma netrc ntpath pathlib pickle plistlib posixpath shelve shutil sndhdr sqlite3
        stat sunau tarfile tempfile tomllib wave xdrlib zipfile
    """,
    # Generic Operating System Services, Command-line Interface Libraries,
    # Unix-specific Services
    "operating-system": """
        _pyio _strptime argparse cmd crypt ctypes curses getopt getpass io logging
        optparse os pipes platform pty shlex tty
    """,
    # Concurrent Execution
    "concurrency": """
        _bootsubprocess _threading_local concurrent contextvars multiprocessing queue
        sched subprocess threading
    """,
    # Networking and Interprocess Communication
    "networking": """
        asynchat asyncio asyncore selectors signal socket ssl
    """,
    # Internet Data Handling, Structured Markup Processing Tools
    "internet-data": """
        _markupbase base64 email html json mailbox mailcap mimetypes quopri uu xml
    """,
    # Internet Protocols and Support
    "internet-protocols": """
        cgi cgitb ftplib http imaplib ipaddress nntplib nturl2path poplib smtpd smtplib
        socketserver telnetlib urllib uuid webbrowser wsgiref xmlrpc
    """,
    # Graphical User Interfaces with Tk
    "gui": """
        idlelib tkinter turtle turtledemo
    """,
    # Development Tools, Debugging and Profiling, Software Packaging and Distribution
    "development": """
        bdb cProfile distutils doctest ensurepip lib2to3 pdb profile pstats pydoc timeit
        trace tracemalloc typing unittest venv zipapp
    """,
    # Python Runtime Services, Custom Python Interpreters, Importing Modules,
    # Python Language Services
    "runtime": """
        __future__ _aix_support _android_support _apple_support _colorize _ios_support
        _osx_support _py_abc _pyrepl _sitebuiltins abc ast atexit code codeop compileall
        contextlib dataclasses dis imp importlib inspect keyword modulefinder opcode
        pickletools pkgutil py_compile pyclbr runpy site symtable sysconfig tabnanny
        token tokenize traceback warnings zipimport
    """,
}

# Shorter docstrings ("Return the name.") do not reveal their subject.
MIN_WORDS = 8

_CHAPTER_OF = {name: c for c, names in CHAPTERS.items() for name in names.split()}
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def root() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load() -> dict[str, list[str]]:
    """Read the data set from the running Python's standard library.

    Returns
    -------
    dict
        `text`: distinct docstrings, sorted by module path, then by position in the
        file. `chapter`: that of each, one of the keys of `CHAPTERS`.
    """
    # A docstring repeated in a second module belongs to the first.
    chapter_of_text: dict[str, str] = {}
    # Syntax trees are many small objects without cycles: garbage collection while they
    # are built only costs time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for path, chapter in modules(root()):
            for text in docstrings(path):
                if len(text.split()) >= MIN_WORDS:
                    chapter_of_text.setdefault(text, chapter)
    finally:
        if collecting:
            gc.enable()
    return {"text": [*chapter_of_text], "chapter": [*chapter_of_text.values()]}


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one source file in the order of its lines.

    Parameters
    ----------
    path : Path
        A Python source file. One that does not parse yields nothing.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
        # Definitions occur only among statements; most of a tree is expressions.
        children = ast.iter_child_nodes(node)
        pending += [c for c in children if not isinstance(c, ast.expr)][::-1]


def modules(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the source files below a folder that have a chapter, sorted by path."""
    tops = (p for p in folder.iterdir() if p.name.removesuffix(".py") in _CHAPTER_OF)
    for top in sorted(tops, key=lambda p: p.name):
        chapter = _CHAPTER_OF[top.name.removesuffix(".py")]
        files = top.rglob("*.py") if top.is_dir() else [top]
        for path in sorted(files):
            if _SKIPPED.isdisjoint(path.relative_to(folder).parts):
                yield path, chapter
