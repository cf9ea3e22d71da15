"""`python -m bench.sim` on a small synthetic folder: its JSON, its budgets, folders without answers, bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import bench.sim.__main__ as command
from bench.profiles import fit, read
from bench.sim import arrivals
from bench.sim.__main__ import unkept
from bench.sim.budget import RUNGS, SPARE, Allowance, Budgeted
from bench.sim.data import Trace, load_outcomes
from bench.sim.policies import Spending
from services.simulator.fleet import build, load_fleet
from shared.errors import DataInvalid

MODELS = {"tiny": (1.0, True), "other": (2.0, True), "large": (40.0, False)}
KEYS = {
    "accuracy", "energy_j_mean", "energy_ratio", "latency_s_mean", "latency_s_p95", "latency_ratio",
    "residency_hit_rate", "swaps",
}  # fmt: skip


def _folder(path: Path, seed: int, *, answers: bool, rambles: bool = False) -> Path:
    """120 queries of two kinds, each of which one of the small models answers well; the large one answers both.
    `rambles`: a sixth of all answers are of 20,000 characters and wrong, and small models are right in half at best."""
    rng = np.random.default_rng(seed)
    path.mkdir()
    with (path / "queries.jsonl").open("w") as file:
        for i in range(120):
            kind = i % 2
            file.write(
                json.dumps({"id": i, "category": "ab"[kind], "prompt": f"{'sum' if kind else 'law'} {i}"}) + "\n"
            )
    with (path / "outcomes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query_id", "model", *(["answer"] if answers else []), "correct", "output_chars"])
        for i in range(120):
            for name, good in (("tiny", 0.9 if i % 2 else 0.1), ("other", 0.1 if i % 2 else 0.9), ("large", 0.95)):
                good = min(good, 0.5) if rambles and name != "large" else good
                lost = rambles and rng.random() < 1 / 6
                right = not lost and rng.random() < good
                answer = ["A" if right else str(rng.choice(["B", ""]))] if answers else []
                writer.writerow([i, name, *answer, int(right), 20_000 if lost else int(rng.integers(100, 800))])
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two folders, a fleet file, and an embedder that knows the two kinds."""

    def embed(prompts: list[str]) -> np.ndarray:
        kind = np.array([p.startswith("sum") for p in prompts], np.float32)
        noise = np.random.default_rng(0).normal(0, 0.05, (len(prompts), 30))
        return np.hstack([kind[:, None], 1 - kind[:, None], noise]).astype(np.float32)

    monkeypatch.setattr(command, "embed", embed)
    fleet = tmp_path / "fleet.toml"
    sections = "".join(
        f'[[models]]\nname = "{name}"\nparameters_b = {size}\nmemory = "4 GB"\nsmall = {str(small).lower()}\n'
        f"gpus = {1 if small else 2}\n"
        for name, (size, small) in MODELS.items()
    )
    fleet.write_text(
        '[fleet]\nname = "f"\nprofile = "h100"\nenergy_sequences = 32\n'
        '[[workers]]\nname = "s"\nmemory = "10 GB"\n[[workers]]\nname = "l"\ngpus = 2\nmemory = "10 GB"\n' + sections
    )
    return {
        "learn": _folder(tmp_path / "learn", 1, answers=True), "judge": _folder(tmp_path / "judge", 2, answers=True),
        "plain_learn": _folder(tmp_path / "pl", 1, answers=False), "plain": _folder(tmp_path / "p", 2, answers=False),
        "fleet": fleet, "json": tmp_path / "out.json",
    }  # fmt: skip


def _run(files: dict[str, Path], *more: str, learn: str = "learn", judge: str = "judge") -> dict[str, dict[str, float]]:
    command.main([
        "--learn", str(files[learn]), "--judge", str(files[judge]), "--fleet", str(files["fleet"]), "--seeds", "2",
        "--json", str(files["json"]), *more,
    ])  # fmt: skip
    policies: dict[str, dict[str, float]] = json.loads(files["json"].read_text())["policies"]
    return policies


def test_the_json_has_what_is_promised_and_ours_is_better_than_any_single_small_model(files: dict[str, Path]) -> None:
    """`calm` finds the good model for each kind; ratios are against the reference, which is 1 to itself; the plot is
    a PNG."""
    picture = files["json"].with_suffix(".png")
    found = _run(
        files, "--policy", "calm,best-single,random,category-best", "--reference", "large", "--plot", str(picture)
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    for figures in found.values():
        assert set(figures) >= KEYS
    assert found["single:large"]["energy_ratio"] == 1.0
    assert found["calm"]["accuracy"] > found["best-single"]["accuracy"] + 0.2
    assert found["calm"]["energy_ratio"] < 0.5
    assert found["calm"]["residency_hit_rate"] == 1.0
    assert found["category-best"]["accuracy"] > found["random"]["accuracy"]


def test_an_energy_budget_is_kept_and_more_of_it_buys_quality(files: dict[str, Path]) -> None:
    """Escalation stays near its budget; a folder without answers works too."""
    found = _run(
        files, "--policy", "calm-escalate@0.15,calm-escalate@0.6", "--reference", "large",
        learn="plain_learn", judge="plain",
    )  # fmt: skip
    low, high = found["calm-escalate@0.15"], found["calm-escalate@0.6"]
    assert low["energy_ratio"] < 0.25
    assert low["energy_ratio"] < high["energy_ratio"] < 0.75
    assert high["accuracy"] >= low["accuracy"] - 0.02


def test_what_rambles_is_cut_off_and_the_budget_buys_more(files: dict[str, Path], tmp_path: Path) -> None:
    """The budget is a share of what the reference takes when it is let ramble."""
    files |= {n: _folder(tmp_path / f"r{n}", i, answers=True, rambles=True) for i, n in enumerate(("long", "lost"))}
    own = ("--policy", "calm-escalate@0.3", "--reference", "large")
    patient = _run(files, *own, learn="long", judge="lost")["calm-escalate@0.3"]
    endless = _run(files, *own, "--ablate", "patience", learn="long", judge="lost")["calm-escalate@0.3"]
    assert patient["energy_ratio"] <= 0.33
    assert patient["accuracy"] > endless["accuracy"] + 0.05
    assert patient["latency_s_mean"] < endless["latency_s_mean"]


class _Priced:
    """A router whose queries cost what it says."""

    def __init__(self, model: int) -> None:
        self.model = model
        self.observed: list[int] = []

    def route(self, i: int, now: float, fleet: object) -> tuple[int, int]:
        return self.model, -1

    def after(self, i: int, model: int, attempt: int, now: float, fleet: object) -> int:
        return -1

    def observe(self, i: int, model: int, latency_s: float, energy_j: float, now: float) -> None:
        self.observed.append(i)


def _lengths(rng: np.random.Generator, n: int, factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted and real tokens [n, 2] of a small model and the reference, off by a common factor of each query, and
    whether the reference is asked: of longer queries rather."""
    predicted = rng.uniform(80.0, 120.0, (n, 2))
    common = factor * rng.lognormal(-0.08, 0.4, n)
    real = predicted * common[:, None] * rng.lognormal(-0.005, 0.1, (n, 2))
    asked = np.stack([np.ones(n, bool), rng.random(n) < np.clip(0.3 * common, 0.0, 1.0)], 1)
    return predicted, real, asked


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.15])
def test_what_the_reference_would_have_taken_is_told_by_what_is_heard(factor: float) -> None:
    """Answers longer or shorter than in the folder learned from: half of the shift and more is noticed although the
    reference is asked seldom and rather of long queries."""
    rng, n = np.random.default_rng(1), 4000
    own, real, asked = _lengths(rng, n, 1.0)
    predicted, written, then = _lengths(rng, n, factor)
    allowance = Allowance.fit(
        own[:, 1], real[:, 1], own, real, asked, 1, token_j=2.0, alone=predicted[:, 1], predicted=predicted, count=n
    )
    told = np.mean([allowance.after(i, np.flatnonzero(then[i]).tolist(), written[i]) for i in range(n)])
    before = np.mean([allowance.before(i) for i in range(n)])
    truth = 2.0 * written[:, 1].mean()
    assert abs(told - truth) < 0.4 * abs(before - truth) + 0.015 * truth
    assert 0.0 < allowance.error < 0.02


@pytest.mark.parametrize("off", [0.8, 1.0, 1.15])
def test_a_budget_is_kept_though_prices_are_off(off: float) -> None:
    """Rungs that really spend 0.8 to 1.15 of what is expected, eight queries in flight: the joules come to the budget
    less what is spared, never above it, and every query ends where it began."""
    rng, n = np.random.default_rng(0), 3000
    rungs = [_Priced(r) for r in range(len(RUNGS))]
    flat = Allowance(1.0, np.full((n, 1), 100.0), -1, np.full(n, 100.0), 0.0, np.zeros(2), 0.0)
    budgeted = Budgeted(rungs, RUNGS, flat, 0.5, n)
    spent, flying = 0.0, []
    for i in range(n + 8):
        if i < n:
            flying.append((i, budgeted.route(i, 0.0, None)[0]))  # type: ignore[arg-type]
        if len(flying) > 8 or i >= n:
            ended, chosen = flying.pop(0)
            joules = 50.0 * RUNGS[chosen] * off * rng.exponential()
            spent += joules
            budgeted.observe(ended, chosen, 1.0, joules, 0.0)
            assert rungs[chosen].observed[-1] == ended
    assert 50.0 * (1.0 - SPARE) * 0.98 < spent / n < 50.0


def test_the_least_price_that_keeps_a_budget_is_found_between_those_tried() -> None:
    spent = Spending(np.array([0.1, 1.0, 10.0]), np.array([0.9, 0.5, 0.1]))
    assert spent.weight(0.5) == pytest.approx(1.0)
    assert 1.0 < spent.weight(0.3) < 10.0
    assert spent.weight(2.0) == pytest.approx(0.1), "more than is ever spent costs nothing more"
    assert spent.weight(0.01) == pytest.approx(10.0)


def test_a_budget_that_nothing_keeps_becomes_about_the_least_that_can_be_spent() -> None:
    spent = Spending(np.array([0.1, 1.0, 10.0]), np.array([0.9, 0.5, 0.1]))
    assert spent.nearest(0.3) == 0.3
    assert 0.1 < spent.nearest(0.01) < 0.11


def test_budgets_that_were_not_kept_are_told() -> None:
    kept = {"energy_ratio": 0.19, "energy_budget": 0.19, "aimed_at": 0.19}
    result = {
        "knn": {"energy_ratio": 3.0},
        "a": kept,
        "b": {**kept, "aimed_at": 0.5},
        "c": {**kept, "energy_ratio": 0.3},
    }
    found = unkept(result)
    assert [line.split(":")[0] for line in found] == ["b", "c"]
    assert "0.50" in found[0]
    assert "0.30" in found[1]


def test_what_cannot_be_used_is_said(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown policy, reference or model ends with status 2 and a remedy."""
    for more, words in (
        (["--policy", "magic"], "no policy 'magic'"),
        (["--reference", "absent"], "no model 'absent'"),
        (["--policy", "calm-escalate@x"], "no share"),
    ):
        with pytest.raises(SystemExit) as error:
            _run(files, *more)
        assert error.value.code == 2
        assert words in capsys.readouterr().err
    files["fleet"].write_text(files["fleet"].read_text().replace('name = "other"', 'name = "unknown"'))
    with pytest.raises(SystemExit):
        _run(files)
    assert "does not have: other" in capsys.readouterr().err


def test_arrivals_keep_the_rate_and_a_trace_s_bursts(files: dict[str, Path]) -> None:
    """Poisson and trace arrivals have the stated mean rate; a shifting mix changes with each window."""
    rng = np.random.default_rng(0)
    poisson = arrivals.poisson(4000, 2.0, rng)
    assert 4000 / poisson[-1] == pytest.approx(2.0, rel=0.1)
    bursty = Trace(np.array([0.0, 0.1, 0.2, 10.0, 10.1]), np.ones(5, np.float32), np.ones(5, np.float32))
    gaps = np.diff(arrivals.like_trace(bursty, 500, 2.0, rng))
    assert 500 / gaps.sum() == pytest.approx(2.0, rel=0.02)
    assert gaps.max() > 20 * np.median(gaps)
    judge = load_outcomes(files["judge"])
    rows, mixes = arrivals.shifting(judge, poisson, rng, every_s=500.0)
    kinds = np.array([judge.categories[r] == "a" for r in rows])
    for window, mix in enumerate(mixes):
        inside = (poisson // 500.0).astype(int) == window
        assert kinds[inside].mean() == pytest.approx(mix[0], abs=0.08)


def test_memory_for_n_models_is_memory_for_n_models() -> None:
    """A fleet built with memory for three holds the three largest and not four."""
    file, profile = load_fleet("mmlu_pro")
    names = [model.name for model in file.models if model.small]
    fleet = build(file, profile, names, memory_for=3, workers=1)
    assert fleet.budget_bytes[0] == sum(sorted(fleet.footprint_bytes)[-3:])
    with pytest.raises(DataInvalid, match="does not have"):
        build(file, profile, ["nobody"])


def test_the_shipped_profile_gives_the_measured_joules_and_times() -> None:
    """8 B: 0.165 J and about 9 ms a token at 32 sequences on one H100; 70 B: 1.21 J and about 20 ms on four."""
    file, profile = load_fleet("mmlu_pro")
    fleet = build(file, profile, ["llama-3.1-8b-instruct", "llama-3.1-70b-instruct"])
    small, large = fleet.unit[0][0], fleet.unit[1][-1]
    assert small.decode_j == pytest.approx(0.165, abs=0.001)
    assert large.decode_j == pytest.approx(1.21 * 70.6 / 70, rel=0.005)
    assert small.step_s(32) == pytest.approx(0.0095, rel=0.2)
    assert large.step_s(32) == pytest.approx(0.020, rel=0.15)


def test_a_fit_finds_the_coefficients_of_exact_data(tmp_path: Path) -> None:
    """On figures made by the formula itself, the fit gives the formula back."""
    path = tmp_path / "m.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "params_billions", "active_params_billions", "num_gpus", "max_num_seqs",
                         "median_itl_ms", "energy_per_output_token_j"])  # fmt: skip
        for p in (4.0, 8.0, 30.0, 70.0):
            for g in (1, 2):
                for b in (8, 32, 128):
                    step = 1.0 + 0.8 * p / g + (0.05 + 0.002 * p / g) * b
                    writer.writerow([f"m{p}", p, p, g, b, step, (0.4 * p + 0.03 * g) / b + 0.005 * p + 0.04])
    names, figures = read(path)
    assert len(names) == 24
    c, d = fit(figures)
    np.testing.assert_allclose(c, [1.0, 0.8, 0.05, 0.002], rtol=1e-6)
    np.testing.assert_allclose(d, [0.4, 0.005, 0.03, 0.04], rtol=1e-6)
