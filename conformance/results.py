"""Run the bindings, each in a virtual environment of its own, and write the results.

python conformance/results.py [NAME ...]

Named bindings are run, by default all; the others' results are kept. The environments
are made in conformance/build/ and stay there, for the next run. A binding's script
metadata (PEP 723) says what is installed, and its table `tool.fedlora-conformance`:

package : the distribution whose version is reported; absent if it binds a formula
name : what it is called, if not by the package
source : where the implementation is found
binds : which of its functions or classes are run
differs : why cases fail, if some do
without-dependencies : requirements that are installed alone, after the others
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BINDINGS = HERE / "bindings"
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs" / "conformance-results.md"
LINK = "https://github.com/slora-flwr/slora-flwr/blob/main/conformance/bindings"
METADATA = re.compile(r"^# /// script\n((?:#.*\n)*?)# ///$", re.MULTILINE)

# Run in the environment: what it is, and what was installed.
DESCRIBE = """
import json, platform, sys
from importlib.metadata import distributions
packages = {d.name.lower(): d.version for d in distributions()}
json.dump({"python": platform.python_version(), "packages": packages}, sys.stdout)
"""

Entry = dict[str, Any]


def read_metadata(binding: Path) -> dict[str, Any]:
    """Return a binding's script metadata."""
    found = METADATA.search(binding.read_text())
    if found is None:
        raise SystemExit(f"{binding} has no script metadata")
    lines = found[1].splitlines()
    return tomllib.loads("\n".join(line.removeprefix("#")[1:] for line in lines))


def list_bindings() -> dict[str, Path]:
    """Return the bindings by name."""
    return {path.stem: path for path in sorted(BINDINGS.glob("*.py"))}


def run_binding(name: str, suite: Path) -> Entry:
    """Install what a binding needs and the suite's wheel, and run it on all cases."""
    metadata = read_metadata(BINDINGS / f"{name}.py")
    about = metadata["tool"]["fedlora-conformance"]
    python = make_environment(name, metadata, suite)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        runner = [
            str(python),
            "-m",
            "fedlora_conformance",
            f"bindings.{name}:aggregate",
        ]
        done = subprocess.run([*runner, "--json", str(report)], cwd=HERE)
        if done.returncode not in (0, 1):
            raise SystemExit(f"the runner failed for {name}")
        cases = json.loads(report.read_text())
    described = subprocess.run(
        [python, "-c", DESCRIBE], capture_output=True, text=True, check=True
    )
    found = json.loads(described.stdout)
    packages = found["packages"]
    shown = ("fedlora-conformance", "numpy", "torch")
    package = about.get("package")
    return {
        "name": about.get("name", package),
        "version": packages[package] if package else "",
        "source": about["source"],
        "binds": about["binds"],
        "differs": about.get("differs", ""),
        "without_dependencies": "without-dependencies" in about,
        "date": datetime.now(UTC).date().isoformat(),
        "python": found["python"],
        "packages": {key: packages[key] for key in shown if key in packages},
        "cases": cases,
    }


def make_environment(name: str, metadata: dict[str, Any], suite: Path) -> Path:
    """Make a binding's environment, unless it is there, and return its Python."""
    folder = HERE / "build" / name
    python = folder / "bin" / "python"
    wanted = json.dumps(metadata, sort_keys=True)
    installed = folder / "installed.json"
    if not installed.exists() or installed.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        install(python, *metadata["dependencies"])
        about = metadata["tool"]["fedlora-conformance"]
        if "without-dependencies" in about:
            install(python, "--no-deps", *about["without-dependencies"])
        installed.write_text(wanted)
    install(python, "--no-deps", "--force-reinstall", str(suite))
    return python


def install(python: Path, *requirements: str) -> None:
    """Run `pip install`; paths are relative to the bindings."""
    command = [str(python), "-m", "pip", "install", "--quiet", *requirements]
    subprocess.run(command, cwd=BINDINGS, check=True)


def build_suite(folder: Path) -> Path:
    """Build the suite's wheel."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(HERE)], check=True)
    [wheel] = folder.glob("fedlora_conformance-*.whl")
    return wheel


def write_page(results: dict[str, Entry]) -> str:
    """Return the page of results as Markdown."""
    return "\n".join([*_write_summary(results), *_write_failures(results), SUBMIT])


INTRODUCTION = (
    "# Conformance results\n\n"
    "What public implementations answer to the [conformance vectors](conformance.md). "
    "Each was run in a virtual environment of its own, by the binding linked in its "
    "row; versions and dates are those of the run. A case is one small problem with a "
    "known answer; a case that an implementation does not promise to solve is not "
    "offered to it.\n\n"
    "A failed case is no verdict on a project. It says that an answer differs from the "
    "suite's formulas, and often that the project means something else by the same "
    "word.\n"
)

SUBMIT = (
    "## Submit yours\n\n"
    "1. Write a binding: a file such as `conformance/bindings/yours.py` with a "
    "function `aggregate(case)`, as [described](conformance.md). Begin with the one "
    "that is nearest to yours. Use the implementation as its documentation says; "
    "where it "
    "leaves a choice, choose what makes it right.\n"
    "2. Name in its script metadata what to install, at which versions, and where the "
    "implementation is found. A repository that does not install can be bound by its "
    "formula: link the file at its commit, and say in words what it computes.\n"
    "3. Run it: `python conformance/results.py yours`. This makes the virtual "
    "environment and adds your results to `conformance/results.json` and to this page. "
    "If cases fail, say why in `differs`, and check that: with the cause removed, the "
    "cases should pass.\n"
    "4. Open a pull request with the binding and both files.\n\n"
    "Is a project of yours listed, and the binding wrong or the version out of date? "
    "[Open an issue](https://github.com/slora-flwr/slora-flwr/issues) or a pull "
    "request; a corrected binding replaces the old row.\n"
)

NOTHING = "\N{EN DASH}"


def _write_summary(results: dict[str, Entry]) -> Iterator[str]:
    yield INTRODUCTION
    heads = "implementation", "version", "binding", "offered", "passed", "failed"
    yield _row(*heads, "run on", "Python")
    yield "|---|---|---|--:|--:|--:|---|---|"
    for name, entry in results.items():
        verdicts = Counter(case["verdict"] for case in entry["cases"])
        offered = verdicts["ok"] + verdicts["FAILED"]
        version = entry["version"] or "by formula"
        yield _row(
            f"[{entry['name']}]({entry['source']})",
            version + ("\\*" if entry["without_dependencies"] else ""),
            f"[`{name}`]({LINK}/{name}.py)",
            offered,
            verdicts["ok"],
            verdicts["FAILED"],
            entry["date"],
            entry["python"],
        )
    yield "\n\\* Installed without its dependencies, beside what the binding needs.\n"
    yield "| binding | what is run | aggregators |"
    yield "|---|---|---|"
    for name, entry in results.items():
        offers = sorted(
            {c["aggregator"] for c in entry["cases"] if c["verdict"] != "not offered"}
        )
        named = ", ".join(f"`{aggregator}`" for aggregator in offers)
        yield _row(f"`{name}`", entry["binds"], named)
    yield ""


def _write_failures(results: dict[str, Entry]) -> Iterator[str]:
    yield "## What differs\n"
    yield (
        "The error is the largest one of a matrix's entries, relative to the right "
        "matrix's largest entry. The last column names the "
        "[trap](conformance.md#the-traps) that yields the same answer, if one does.\n"
    )
    for entry in results.values():
        failed = [case for case in entry["cases"] if case["verdict"] == "FAILED"]
        if not failed:
            continue
        yield f"### {entry['name']} {entry['version']}".rstrip() + "\n"
        yield f"{entry['differs']}\n"
        yield "| case | in | error | known as |"
        yield "|---|---|--:|---|"
        for case in failed:
            for part in case["parts"]:
                if not part["passes"]:
                    known = part["trap"] or NOTHING
                    yield _row(case["case"], part["name"], _show(part["error"]), known)
            if case["problem"]:
                yield _row(case["case"], case["problem"], "", "")
        yield ""


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _show(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def main() -> None:
    """Run bindings, and write the results and their page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help="bindings to run")
    names = parser.parse_args().names or list_bindings()
    unknown = set(names) - set(list_bindings())
    if unknown:
        parser.error(f"no such binding: {unknown}; choose from {[*list_bindings()]}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        suite = build_suite(Path(folder))
        for name in names:
            print(name, flush=True)
            results[name] = run_binding(name, suite)
            kept = {name: results[name] for name in list_bindings() if name in results}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
            PAGE.write_text(write_page(kept))


if __name__ == "__main__":
    main()
