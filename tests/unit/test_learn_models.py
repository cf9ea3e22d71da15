"""Learned quality and length: exact where they claim to be, right where the data are clear, the same after storing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.learn import hierarchy, linear
from shared.learn.features import FORM, form, forms
from shared.learn.length import LengthModel
from shared.learn.quality import QualityModel, Spread
from shared.learn.topics import clusters, supervised

MODELS = ("algebra", "prose", "weak")


def world(n: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str | None]]:
    """Two kinds of query; the first model is good at one, the second at the other, the third at nothing."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(2, size=n)
    middles = np.random.default_rng(7).normal(size=(2, 12))
    x = middles[kind] + 0.5 * rng.normal(size=(n, 12))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    chance = np.array([[0.8, 0.3, 0.1], [0.3, 0.7, 0.1]])[kind]
    return x, (rng.random((n, 3)) < chance).astype(float), [("sums", "letters")[k] for k in kind]


def brute(
    z: NDArray[np.float64], y: NDArray[np.float64], prior: hierarchy.Prior
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Mean [k, p], covariances [k, k, p, p] and evidence by writing all weights into one vector."""
    k, p = y.shape[1], z.shape[1]
    shared, own = prior.variances(p)
    rows, targets = [], []
    for i, j in np.argwhere(~np.isnan(y)):
        row = np.zeros((k + 1, p))
        row[0] = row[j + 1] = z[i]
        rows.append(row.ravel())
        targets.append(y[i, j])
    f, t, d = np.array(rows), np.array(targets), np.concatenate([shared, *[own] * k])
    gram = f * d @ f.T + prior.noise**2 * np.eye(len(t))
    evidence = -0.5 * (t @ np.linalg.solve(gram, t) + np.linalg.slogdet(gram)[1] + len(t) * np.log(2 * np.pi))
    cov = np.linalg.inv(f.T @ f / prior.noise**2 + np.diag(1 / d))
    mean = cov @ f.T @ t / prior.noise**2
    pick = [np.hstack([np.eye(p), *[np.eye(p) * (j == m) for j in range(k)]]) for m in range(k)]
    return np.stack([q @ mean for q in pick]), np.array([[a @ cov @ b.T for b in pick] for a in pick]), float(evidence)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), p=st.integers(1, 4), n=st.integers(1, 25))
def test_the_posterior_is_exact(seed: int, k: int, p: int, n: int) -> None:
    """Mean, covariance and evidence are those of the joint Gaussian written out in full, missing outcomes included."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, p))
    y = np.where(rng.random((n, k)) < 0.3, np.nan, rng.random((n, k)))
    y[0, 0] = 0.5
    sums, prior = hierarchy.Sums.empty(k, p), hierarchy.Prior()
    sums.add_all(z, y)
    found = hierarchy.solve(sums, prior)
    mean, cov, evidence = brute(z, y, prior)
    np.testing.assert_allclose(found.mean, mean, atol=1e-8)
    query = rng.normal(size=(3, p))
    np.testing.assert_allclose(
        found.predict(query)[1], np.sqrt(np.einsum("np,kkpq,nq->nk", query, cov, query)), atol=1e-8
    )
    assert found.evidence == pytest.approx(evidence, rel=1e-8, abs=1e-8)


def test_samples_have_the_posterior_s_spread() -> None:
    """Weights drawn for exploration deviate as the stated uncertainty says."""
    x, y, _ = world(60)
    z = clusters(x, 3).encode(x)
    sums = hierarchy.Sums.empty(3, z.shape[1])
    sums.add_all(z, y)
    found = hierarchy.solve(sums, hierarchy.Prior())
    own, shared = found.spread(z[0])
    np.testing.assert_allclose(own**2 + (shared**2).sum(1), found.predict(z[:1])[1][0] ** 2)
    values = Spread(own, shared).deviations(np.random.default_rng(0).standard_normal((20_000, 3 + z.shape[1])))
    np.testing.assert_allclose(values.mean(0), 0.0, atol=0.01)
    np.testing.assert_allclose(values.std(0), found.predict(z[:1])[1][0], rtol=0.05)
    together = np.einsum("p,klpq,q->kl", z[0], brute(z, y, hierarchy.Prior())[1], z[0])
    np.testing.assert_allclose(np.diag(own**2) + shared @ shared.T, together, atol=1e-8)


def test_one_by_one_is_the_same_as_all_at_once() -> None:
    """Sums do not care in what portions outcomes came."""
    x, y, _ = world(40)
    all_at_once, one_by_one = hierarchy.Sums.empty(3, 12), hierarchy.Sums.empty(3, 12)
    all_at_once.add_all(x, y)
    for row in range(len(x)):
        for model in range(3):
            one_by_one.add(x[row], model, y[row, model])
    for name in ("zz", "zy", "yy", "count"):
        np.testing.assert_allclose(getattr(all_at_once, name), getattr(one_by_one, name))


def test_ridge_leaves_one_out_exactly() -> None:
    """`own` is the prediction of a fit without that row, at the same penalty."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 2))
    penalty = np.array([3.0])
    found = linear.fit(x, y, penalty)
    for row in (0, 7, 29):
        rest = np.arange(30) != row
        alone = linear.fit(x[rest], y[rest], penalty)
        np.testing.assert_allclose(found.own[row], alone.predict(x[row : row + 1])[0], atol=1e-6)


def test_it_learns_who_is_good_at_what() -> None:
    """Fitted on recorded outcomes, the best model of each kind of query is chosen, with and without categories."""
    x, y, categories = world(600)
    wanted, _, kinds = world(200, seed=1)
    best = np.array([{"sums": 0, "letters": 1}[str(k)] for k in kinds])
    for names in (categories, None):
        model, own = QualityModel.fit(MODELS, x, y, names)
        assert (model.predict(wanted).mean.argmax(1) == best).mean() > 0.95
        assert own.shape == y.shape


def test_missing_outcomes_do_not_count_as_failures() -> None:
    """A model that was asked for half of the queries is judged by these."""
    x, y, categories = world(600)
    y[::2, 0] = np.nan
    model, _ = QualityModel.fit(MODELS, x, y, categories)
    wanted, _, kinds = world(100, seed=1)
    level = model.predict(wanted).mean[np.array(kinds) == "sums", 0].mean()
    assert level == pytest.approx(0.8, abs=0.08)


def test_before_any_outcome_the_cards_decide_and_outcomes_take_over() -> None:
    """The prior given with a query is the prediction at first; a hundred outcomes against it turn it round."""
    x, y, _ = world(300)
    model = QualityModel.start(MODELS, x, 4)
    promise = np.tile([0.2, 0.3, 0.9], (len(x), 1))
    np.testing.assert_allclose(model.predict(x, promise).mean, promise, atol=1e-9)
    before = model.predict(x[:1], promise[:1]).std[0, 2]
    for row in range(100):
        model.update(x[row], 2, y[row, 2], prior=0.9)
    assert model.predict(x, promise).mean[:, 2].mean() < 0.35
    assert model.predict(x[:1], promise[:1]).std[0, 2] < before


def test_forgetting_makes_uncertain_again() -> None:
    """A changed model keeps its expectation only as far as its past still counts."""
    x, y, categories = world(300)
    model, _ = QualityModel.fit(MODELS, x, y, categories)
    before = model.predict(x[:1])
    model.forget(0, 0.02)
    after = model.predict(x[:1])
    assert after.std[0, 0] > 2.0 * before.std[0, 0]
    assert after.std[0, 1] == pytest.approx(before.std[0, 1], rel=0.2)


def test_a_new_model_joins_with_what_all_share() -> None:
    """Knowledge of the others stays as it was, and the new one is more uncertain than they are."""
    x, y, categories = world(300)
    model, _ = QualityModel.fit(MODELS, x, y, categories)
    grown = model.with_models(("algebra", "new", "prose", "weak"))
    old, new = model.predict(x), grown.predict(x)
    np.testing.assert_allclose(new.mean[:, [0, 2, 3]], old.mean, atol=0.02)
    assert (new.std[:, 1] > new.std[:, 0]).all()


def test_it_survives_storing() -> None:
    """From its bytes comes a model that predicts and learns on exactly alike; other bytes are refused."""
    x, y, categories = world(200)
    for model in (QualityModel.fit(MODELS, x, y, categories)[0], QualityModel.start(MODELS, x)):
        again = QualityModel.from_bytes(model.to_bytes())
        model.update(x[0], 1, 1.0)
        again.update(x[0], 1, 1.0)
        np.testing.assert_allclose(model.predict(x).mean, again.predict(x).mean, rtol=1e-12)
    for data in (b"", b"\x81\xa1a\x01", LengthModel.start(MODELS, x).to_bytes()):
        with pytest.raises(ValueError, match="model"):
            QualityModel.from_bytes(data)


def test_the_same_input_gives_the_same_topics() -> None:
    """Clusters have no chance in them, and shares add up to one."""
    x, _, categories = world(100)
    first, second = clusters(x, 5), clusters(x, 5)
    np.testing.assert_array_equal(first.weights, second.weights)
    np.testing.assert_allclose(first.shares(x).sum(1), 1.0)
    topics, own = supervised(x, categories)
    assert topics.size == 3
    assert own.shape == (100, 3)


def test_topics_by_form_see_nothing_but_the_form() -> None:
    """Beside clusters of everything stands a partition by the last features alone; each adds up to one."""
    x, _, _ = world(200)
    form_of = np.random.default_rng(2).normal(size=(200, 3)) * 0.01 + np.array([[0.3], [-0.3]])[np.arange(200) % 2]
    both = np.hstack([x, form_of])
    topics = clusters(both, 4, form=3)
    assert topics.parts == (4, 2)
    np.testing.assert_allclose(topics.shares(both).sum(1), 2.0)
    moved = topics.shares(np.hstack([x[::-1], form_of]))
    np.testing.assert_allclose(moved[:, 4:], topics.shares(both)[:, 4:])
    by_form = topics.shares(both)[:, 4:].argmax(1)
    assert len(set(by_form[::2])) == len(set(by_form[1::2])) == 1
    assert by_form[0] != by_form[1]


def test_evidence_moves_the_prior_against_what_was_believed_of_it() -> None:
    """Where models differ far more than was believed, few outcomes move the scale a little and many a lot; and what was
    believed is kept with the model."""
    believed = hierarchy.Prior(own_level=0.03)
    rng = np.random.default_rng(4)
    reached = []
    for count in (20, 100):
        sums = hierarchy.Sums.empty(3, 2)
        sums.add_all(np.ones((count, 2)) * [1.0, 0.0], (rng.random((count, 3)) < [0.9, 0.5, 0.1]).astype(float))
        alone, held = hierarchy.choose_prior(sums, believed), hierarchy.choose_prior(sums, believed, believed)
        assert believed.own_level <= held.own_level <= alone.own_level
        reached.append(held.own_level)
    assert reached[1] > 2.0 * believed.own_level
    assert reached[0] <= reached[1]
    x, y, _ = world(120)
    model = QualityModel.start(MODELS, x, 4)
    for row in range(120):
        model.update(x[row], row % 3, y[row, row % 3])
    assert model.prior != model.believed
    for other in (
        QualityModel.from_bytes(model.to_bytes()),
        model.with_models(MODELS[:2]),
    ):
        assert (other.prior, other.believed) == (model.prior, model.believed)


def test_lengths_are_right_on_average_and_their_range_holds() -> None:
    """Expected tokens add up to what was written, for long tails too, and four of five answers lie in the range."""
    rng = np.random.default_rng(3)
    x, _, categories = world(800)
    long = np.array([c == "sums" for c in categories])
    tokens = np.exp(rng.normal(np.where(long, 5.5, 4.0)[:, None], [[0.3, 0.6, 1.0]], (800, 3)))
    model, own = LengthModel.fit(MODELS, x[:600], tokens[:600], categories[:600])
    np.testing.assert_allclose(own.sum(0), tokens[:600].sum(0), rtol=0.02)
    found = model.predict(x[600:])
    assert found.mean[long[600:], 0].mean() > 3.0 * found.mean[~long[600:], 0].mean()
    inside = (found.low <= tokens[600:]) & (tokens[600:] <= found.high)
    assert 0.7 < inside.mean() < 0.9
    np.testing.assert_allclose(found.mean, LengthModel.from_bytes(model.to_bytes()).predict(x[600:]).mean, rtol=1e-12)


def test_lengths_are_learned_one_by_one() -> None:
    """A model that always writes 900 tokens is expected to, after some answers."""
    x, _, _ = world(100)
    model = LengthModel.start(MODELS, x)
    for row in range(60):
        model.update(x[row], 1, 900.0)
    assert model.predict(x[60:]).mean[:, 1].mean() == pytest.approx(900.0, rel=0.25)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=300))
def test_any_text_has_features(text: str) -> None:
    """No prompt breaks the features, and none of them is out of all proportion."""
    found = form(text)
    assert found.shape == (len(FORM),)
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 20.0


def test_features_tell_a_calculation_from_prose() -> None:
    """Options are counted, and digits and formulas seen."""
    table = forms(["What is $3x + 4$ at x = 2?\nA. 10\nB. 12\nC. 14", "Who wrote this poem, and why?"])
    facts = [dict(zip(FORM, row, strict=True)) for row in table]
    assert facts[0]["options"] == pytest.approx(np.log(4.0))
    assert facts[0]["numeric_options"] == 1.0
    assert facts[0]["formula"] == 1.0
    assert facts[1]["options"] == facts[1]["digits"] == 0.0
