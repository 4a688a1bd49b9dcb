"""The conformance vectors: right, reproducible, and traps caught by name."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import results
from bindings import slora_flwr as slora_flwr_binding
from fedlora_conformance import average, generate, run

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "conformance"
CASES = run.load()
TRAPS = {wrong["trap"] for case in CASES.values() for wrong in case["wrong"]}


class Reference:
    """A server in torch: updates instead of states, stacks instead of products.

    `fault` is the trap that it falls into.
    """

    def __init__(self, fault: str = "", dtype: torch.dtype = torch.float32) -> None:
        self.fault, self.dtype = fault, dtype

    def __call__(self, case: run.Case) -> run.Answer:
        self.aggregator = case["aggregator"]
        scaling = case["scaling"]["s"]
        if self.fault == "alpha / rank for alpha / sqrt(rank)":
            scaling = case["scaling"]["alpha"] / case["scaling"]["rank"]
        self.scaling = self.residual_scaling = scaling
        if self.fault.startswith("scaling"):
            wrong = 1.0 if "left out" in self.fault else scaling**2
            self.residual_scaling = wrong
            if "residual" not in self.fault:
                self.scaling = wrong
        start = case["start"]["layers"]
        self.first = {name: self.tensor(layer["W"]) for name, layer in start.items()}
        self.base = dict(self.first)
        self.a = {name: self.tensor(layer["A"]) for name, layer in start.items()}
        self.b = {name: self.tensor(layer["B"]) for name, layer in start.items()}
        self.head = self.tensor(case["start"]["head"])
        return [self.aggregate(current) for current in case["rounds"]]

    def tensor(self, value: Any) -> Tensor:
        return torch.tensor(value, dtype=self.dtype)

    def aggregate(self, current: dict[str, Any]) -> dict[str, Any]:
        clients = current["clients"]
        self.examples = [client["examples"] for client in clients]
        if self.fault == "unweighted mean":
            self.examples = [1 for _ in clients]
        counted = self.fault.startswith("unanswered clients")
        self.silent = sum(current["unanswered"]) if counted else 0
        trains = current["trains"]
        if self.fault == "the other factor's turn" and len(trains) == 1:
            trains = ["B" if trains == ["A"] else "A"]
        for name in self.base:
            self.aggregate_layer(name, [c["layers"][name] for c in clients], trains)
        heads = [self.tensor(client["head"]) for client in clients]
        self.head = self.mean(self.head, heads)
        return {
            "effective": {
                name: (base + self.scaling * self.b[name] @ self.a[name]).numpy()
                for name, base in self.base.items()
            },
            "head": self.head.numpy(),
        }

    def aggregate_layer(
        self, name: str, results: list[dict[str, Any]], trains: list[str]
    ) -> None:
        all_a = [self.tensor(result["A"]) for result in results]
        all_b = [self.tensor(result["B"]) for result in results]
        sent_a, sent_b = self.a[name], self.b[name]
        if self.fault == "each client's own rank in the scaling":
            all_b = [b * len(sent_a) / b.shape[1] for b in all_b]
        if "A" in trains:
            self.a[name] = self.mean(sent_a, all_a)
        if "B" in trains:
            self.b[name] = self.mean(sent_b.T, [b.T for b in all_b]).T
        if self.fault == "A and B averaged apart":
            return
        total = sum(self.examples) + self.silent
        left = [b * n / total for b, n in zip(all_b, self.examples, strict=True)]
        right = list(all_a)
        if self.fault == "unanswered clients counted as unchanged":
            left.append(sent_b * self.silent / total)
            right.append(sent_a)
        if self.aggregator == "exact":
            self.add_residual(name, left, right)
        if self.aggregator == "flexlora":
            self.b[name], self.a[name] = self.cut(left, right, len(sent_a))

    def add_residual(self, name: str, left: list[Tensor], right: list[Tensor]) -> None:
        stack = torch.cat([*left, -self.b[name]], 1)
        residual = stack @ torch.cat([*right, self.a[name]])
        if self.fault == "residual transposed" and len(residual) == residual.shape[1]:
            residual = residual.T
        forgets = self.fault == "residual forgotten in the next round"
        under = self.first if forgets else self.base
        self.base[name] = under[name] + self.residual_scaling * residual

    def cut(
        self, left: list[Tensor], right: list[Tensor], rank: int
    ) -> tuple[Tensor, Tensor]:
        q_b, r_b = torch.linalg.qr(torch.cat(left, 1))
        q_a, r_a = torch.linalg.qr(torch.cat(right).T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        if self.fault == "a square root of the singular values lost":
            s = s.sqrt()
        kept = min(rank, len(s))
        return q_b @ u[:, :kept] * s[:kept], v[:kept] @ q_a.T

    def mean(self, sent: Tensor, values: list[Tensor]) -> Tensor:
        """Add each row's mean update over those who have it."""
        update = torch.zeros_like(sent)
        total = torch.full((len(sent), 1), self.silent, dtype=self.dtype)
        if self.fault == "unanswered clients counted as zero":
            update -= self.silent * sent
        for value, n in zip(values, self.examples, strict=True):
            rank = len(value)
            update[:rank] += n * (value - sent[:rank])
            total[:rank] += n
            if self.fault == "zero padding divided by all clients":
                update[rank:] -= n * sent[rank:]
                total[rank:] += n
        return sent + update / total.clamp(min=1)


def with_tolerance(case: run.Case, tolerance: float) -> run.Case:
    return {**case, "tolerance": tolerance}


def test_the_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    generate.write(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in run.VECTORS.iterdir()}
    assert kept == written
    assert sum(map(len, kept.values())) < 300_000


def test_the_generator_needs_nothing_but_numpy() -> None:
    code = "import sys; from fedlora_conformance import generate, run\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SUITE,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"slora_flwr", "torch", "scipy"} & set(done.stdout.split())


@pytest.mark.parametrize("name", CASES)
def test_a_float32_server_agrees(name: str) -> None:
    for part in run.check(CASES[name], Reference()(CASES[name])):
        assert part.passes, part


@pytest.mark.parametrize("name", CASES)
def test_a_float64_server_agrees_to_its_last_digits(name: str) -> None:
    case = with_tolerance(CASES[name], 1e-12)
    for part in run.check(case, Reference(dtype=torch.float64)(case)):
        assert part.passes, part


def one(value: float) -> generate.Matrix:
    return np.array([[value]])


def aggregate_scalars(aggregator: str) -> generate.State:
    """Aggregate b·a = 2·3 of 1 client's example and 4·1 of another's 3; s is 2."""
    server = generate.Server(aggregator, 2.0, 2.0, 2.0)
    start = generate.State(
        {"w": one(10.0)}, {"w": generate.Factors(one(5.0), one(7.0))}, one(0.0)
    )
    clients = [
        generate.Client(1, {"w": generate.Factors(one(3.0), one(2.0))}, one(8.0)),
        generate.Client(3, {"w": generate.Factors(one(1.0), one(4.0))}, one(4.0)),
    ]
    [state] = generate.aggregate_all(
        server, start, [generate.Round(clients, [100], "AB")]
    )
    return state


@pytest.mark.parametrize(
    ("aggregator", "base", "weight"),
    [
        # a = (3 + 3·1) / 4 = 1.5 and b = (2 + 3·4) / 4 = 3.5: 10 + 2·5.25
        ("fedavg", 10.0, 20.5),
        # (6 + 3·4) / 4 = 4.5: 10 + 2·4.5, of which 2·(4.5 - 5.25) is in the base
        ("exact", 8.5, 19.0),
        ("flexlora", 10.0, 19.0),
    ],
)
def test_formulas_by_hand(aggregator: str, base: float, weight: float) -> None:
    state = aggregate_scalars(aggregator)
    assert state.base["w"].item() == base
    assert generate.effective(state, 2.0)["w"].item() == weight
    assert state.head.item() == 5.0


def test_a_mean_of_rows_by_hand() -> None:
    sent = np.array([[1.0], [2.0], [3.0]])
    values = [np.array([[4.0], [6.0]]), np.array([[8.0]])]
    # (4 + 3·8) / 4; the second row is one client's, the third nobody's.
    mean = generate.mean_of_rows(sent, values, [1, 3])
    assert mean.tolist() == [[7.0], [6.0], [3.0]]


@pytest.mark.parametrize("shape", [(4, 7), (7, 3), (5, 5), (1, 3)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_singular_factors_are_numpys(shape: tuple[int, int], rank: int) -> None:
    random = np.random.default_rng(rank)
    b, a = random.normal(size=(shape[0], rank)), random.normal(size=(rank, shape[1]))
    matrix = b @ a
    left, right, values = generate.singular_factors(matrix)
    u, s, v = np.linalg.svd(matrix)
    kept = min(*shape, rank)
    np.testing.assert_allclose(values[:kept], s[:kept], rtol=1e-12)
    np.testing.assert_allclose(values[kept:], 0, atol=1e-12)
    np.testing.assert_allclose(right.T @ right, np.eye(shape[1]), atol=1e-13)
    for cut in range(1, kept + 1):
        best = u[:, :cut] * s[:cut] @ v[:cut]
        np.testing.assert_allclose(left[:, :cut] @ right[:, :cut].T, best, atol=1e-12)


def products(case: run.Case, current: dict[str, Any], name: str) -> list[Any]:
    return [
        client["layers"][name]["B"] @ client["layers"][name]["A"]
        for client in current["clients"]
    ]


def test_flexlora_cuts_at_a_clear_gap() -> None:
    for case in CASES.values():
        if case["aggregator"] != "flexlora":
            continue
        rank = case["scaling"]["rank"]
        for current in case["rounds"]:
            examples = [client["examples"] for client in current["clients"]]
            for name in case["start"]["layers"]:
                mean = np.average(products(case, current, name), 0, examples)
                values = [*np.linalg.svd(mean, compute_uv=False), 0.0]
                nothing_to_cut = values[rank] < 1e-12 * values[0]
                assert nothing_to_cut or values[rank] < 0.7 * values[rank - 1]


def test_means_and_residuals_add_up() -> None:
    for case in CASES.values():
        s = case["scaling"]["s"]
        base = {name: layer["W"] for name, layer in case["start"]["layers"].items()}
        for current, found in zip(case["rounds"], case["expected"], strict=True):
            examples = [client["examples"] for client in current["clients"]]
            for name, mean in found.get("mean", {}).items():
                if case["aggregator"] == "exact":
                    residual = found["residual"][name]
                    whole = np.average(products(case, current, name), 0, examples)
                    right = base[name] + s * whole
                    np.testing.assert_allclose(found["effective"][name], right)
                    base[name] = base[name] + s * residual
                weight = base[name] + s * mean["B"] @ mean["A"]
                np.testing.assert_allclose(found["effective"][name], weight)


@pytest.mark.parametrize("name", ["exact-one-client", "exact-identical-clients"])
def test_without_disagreement_there_is_no_residual(name: str) -> None:
    [found] = CASES[name]["expected"]
    assert not found["residual"]["query" if "one" in name else "output"].any()


def test_scalings_follow_their_rule() -> None:
    for case in CASES.values():
        scaling = case["scaling"]
        roots = {"alpha / rank": scaling["rank"]}
        roots["alpha / sqrt(rank)"] = math.sqrt(scaling["rank"])
        assert scaling["s"] == scaling["alpha"] / roots[scaling["rule"]]
        # Else leaving it out, or applying it twice, would not show.
        assert not 0.8 < scaling["s"] < 1.25


def test_untrained_factors_are_as_they_were_sent() -> None:
    for case in CASES.values():
        sent = case["start"]["layers"]
        for current, found in zip(case["rounds"], case["expected"], strict=True):
            for factor in {"A", "B"} - set(current["trains"]):
                for client in current["clients"]:
                    for name, layer in client["layers"].items():
                        assert np.array_equal(layer[factor], sent[name][factor])
            sent = found.get("mean")


def test_every_aggregator_meets_every_circumstance() -> None:
    for aggregator in generate.AGGREGATORS:
        cases = [c for c in CASES.values() if c["aggregator"] == aggregator]
        layers = [layer for c in cases for layer in c["start"]["layers"].values()]
        shapes = [layer["W"].shape for layer in layers]
        assert any(m > n for m, n in shapes)
        assert any(m < n for m, n in shapes)
        rounds = [current for case in cases for current in case["rounds"]]
        assert any(current["unanswered"] for current in rounds)
        assert len(rounds) > len(cases)
        assert len({case["scaling"]["rule"] for case in cases}) == 2
        assert any(len(current["clients"]) > 2 for current in rounds)


def test_every_trap_is_in_the_readme() -> None:
    assert set(generate.TRAPS) == TRAPS
    listed = re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", readme(), flags=re.M)
    assert set(listed) >= TRAPS
    assert set(generate.AGGREGATORS) <= {name.strip("`") for name in listed}


@pytest.mark.parametrize("trap", sorted(TRAPS))
def test_a_trap_is_caught_and_named(trap: str) -> None:
    for case in CASES.values():
        listed = {w["trap"]: w for w in case["wrong"]}
        parts = {p.name: p for p in run.check(case, Reference(trap)(case))}
        for name, key in (("layers", "effective"), ("head", "head")):
            caught = key in listed.get(trap, {})
            assert parts[name].passes == (not caught), case["name"]
            assert parts[name].trap == (trap if caught else ""), case["name"]


def test_a_head_alone_can_fail() -> None:
    case = CASES["exact-unequal-weights"]
    answer = Reference()(case)
    answer[0]["head"] = Reference("unweighted mean")(case)[0]["head"]
    layers, head = run.check(case, answer)
    assert layers.passes
    assert (head.passes, head.trap) == (False, "unweighted mean")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    case = CASES["fedavg-several-layers"]
    answer = Reference()(case)
    answer[0]["effective"]["key"][1, 2] = value
    layers, head = run.check(case, answer)
    assert (layers.passes, layers.trap, head.passes) == (False, "", True)


def unchanged(case: run.Case) -> run.Answer:
    layers = case["start"]["layers"].items()
    effective = {name: layer["W"] for name, layer in layers}
    return [{"effective": effective, "head": case["start"]["head"]}] * len(
        case["rounds"]
    )


def test_answers_that_do_not_compare_are_refused() -> None:
    case = CASES["fedavg-partial-cohort"]
    with pytest.raises(run.AnswerError, match="1 rounds in the answer, not 2"):
        run.check(case, unchanged(case)[:1])
    weight = case["start"]["layers"]["query"]["W"]
    answer = {"effective": {"query": weight.T}, "head": case["start"]["head"]}
    with pytest.raises(
        run.AnswerError, match=r"round 1, query: shape \(7, 4\), not \(4, 7\)"
    ):
        run.check(case, [answer, answer])
    answer = {"effective": {"output": weight}, "head": case["start"]["head"]}
    with pytest.raises(
        run.AnswerError, match="round 1, query: the answer has no 'query'"
    ):
        run.check(case, [answer, answer])


def offer(monkeypatch: pytest.MonkeyPatch, implementation: Any) -> str:
    """Make an implementation importable."""
    module = type(sys)("offered")
    monkeypatch.setitem(sys.modules, "offered", module)
    monkeypatch.setattr(module, "aggregate", implementation, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return "offered:aggregate"


def test_the_runner_prints_a_line_for_each_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, apart = Reference(), Reference("A and B averaged apart")

    def implementation(case: run.Case) -> run.Answer:
        assert not {"expected", "wrong"} & set(case)
        if case["aggregator"] == "alternate":
            raise NotImplementedError
        if case["name"] == "ffa-zero-b":
            raise RuntimeError("no such factor")
        return (apart if case["aggregator"] == "exact" else right)(case)

    assert run.main([offer(monkeypatch, implementation)]) == 1
    out = capsys.readouterr().out
    lines = {line[13:].split()[0]: line for line in out.splitlines()[:-2]}
    assert set(lines) == set(CASES)
    for name, line in lines.items():
        aggregator = CASES[name]["aggregator"]
        if aggregator == "alternate":
            assert line == f"not offered  {name}"
        elif name == "ffa-zero-b":
            assert line.split() == f"FAILED {name} RuntimeError: no such factor".split()
        elif aggregator == "exact" and "one" not in name and "identical" not in name:
            assert re.match(r"FAILED .* layers off by .*: A and B averaged apart", line)
        else:
            assert line.startswith(f"ok           {name} ")
    failed = sum(line.startswith("FAILED") for line in lines.values())
    assert f"{len(CASES) - failed - 4} ok, {failed} FAILED, 4 not offered\n" in out
    assert out.endswith("\nnot offered: alternate\n")


def test_the_runner_passes_a_right_implementation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = offer(monkeypatch, Reference())
    assert run.main([text]) == 0
    assert f"{len(CASES)} ok, 0 FAILED" in capsys.readouterr().out
    assert run.main([text, "--only", "exact-square"]) == 0
    assert "1 ok, 0 FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:f"], "'nowhere:f' is not MODULE:FUNCTION: No module named"),
        (["json:nothing"], "module 'json' has no attribute 'nothing'"),
        (["json:dumps", "--only", "fedavg-none"], "choose from alternate-a, "),
    ],
)
def test_the_runner_names_what_it_cannot_use(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert message in capsys.readouterr().err.replace("'alternate-a'", "alternate-a")


def readme() -> str:
    return (ROOT / "conformance/README.md").read_text()


def test_the_readmes_example_is_right(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", readme(), flags=re.S)
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "fedlora_conformance", "mine:aggregate"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SUITE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 ok, 0 FAILED" in done.stdout


def test_the_app_bundle_leaves_the_suite_out(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    (tmp_path / "app.fab").write_bytes(build_fab_from_disk(ROOT))
    with zipfile.ZipFile(tmp_path / "app.fab") as bundle:
        assert not any("conformance" in name for name in bundle.namelist())


@pytest.mark.parametrize("name", CASES)
def test_slora_flwr_passes(name: str) -> None:
    result = run.judge(slora_flwr_binding.aggregate, CASES[name])
    assert result.verdict == "ok", result.note


def test_the_wheel_holds_the_suite_alone(tmp_path: Path) -> None:
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*wheel, "--wheel-dir", tmp_path, SUITE], check=True)
    [path] = tmp_path.glob("fedlora_conformance-*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        archive.extractall(tmp_path / "unpacked")
    package = SUITE / "fedlora_conformance"
    files = (f for f in package.rglob("*") if f.is_file() and f.suffix != ".pyc")
    assert names == {file.relative_to(SUITE).as_posix() for file in files}
    done = subprocess.run(
        [sys.executable, "-m", "fedlora_conformance", "json:dumps"],
        cwd=tmp_path / "unpacked",
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert f"0 ok, {len(CASES)} FAILED, 0 not offered" in done.stdout


def test_results_are_written_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def implementation(case: run.Case) -> run.Answer:
        if case["aggregator"] != "exact":
            raise NotImplementedError
        if case["name"] == "exact-square":
            raise RuntimeError("no such layer")
        return Reference("A and B averaged apart")(case)

    path = tmp_path / "results.json"
    assert run.main([offer(monkeypatch, implementation), "--json", str(path)]) == 1
    found = {case.pop("case"): case for case in json.loads(path.read_text())}
    assert set(found) == set(CASES)
    assert found["ffa-zero-b"] == {
        "aggregator": "ffa",
        "verdict": "not offered",
        "parts": [],
        "problem": "",
    }
    assert found["exact-square"]["problem"] == "RuntimeError: no such layer"
    layers, head = found["exact-unequal-weights"]["parts"]
    assert layers["trap"] == "A and B averaged apart"
    assert (layers["passes"], head["passes"]) == (False, True)


def test_arrays_are_averaged_without_knowledge_of_lora() -> None:
    def mean(sent: Any, results: list[Any], examples: list[int]) -> Any:
        return {n: np.average([r[n] for r in results], 0, examples) for n in sent}

    for case in CASES.values():
        result = run.judge(lambda given: average(given, mean), case)
        offered = case["aggregator"] in ("fedavg", "ffa", "alternate")
        assert result.verdict == ("ok" if offered else "not offered"), result.note


RESULTS = json.loads((SUITE / "results.json").read_text())


def test_the_page_of_results_is_of_these_results() -> None:
    page = (ROOT / "docs" / "conformance-results.md").read_text()
    assert page == results.write_page(RESULTS)
    public = [e for e in RESULTS.values() if e["name"] != "slora-flwr"]
    assert len([e for e in public if e["version"]]) >= 5


def test_every_binding_has_results_of_all_cases() -> None:
    assert [*RESULTS] == [*results.list_bindings()]
    for entry in RESULTS.values():
        assert [case["case"] for case in entry["cases"]] == [*CASES]
        failed = any(case["verdict"] == "FAILED" for case in entry["cases"])
        assert failed == bool(entry["differs"]), entry["name"]


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_a_binding_answers_as_in_the_results(name: str) -> None:
    try:
        binding = importlib.import_module(f"bindings.{name}")
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    packages = RESULTS[name]["packages"]
    for case in RESULTS[name]["cases"]:
        found = run.judge(binding.aggregate, CASES[case["case"]])
        assert found.verdict == case["verdict"], (case, packages)
