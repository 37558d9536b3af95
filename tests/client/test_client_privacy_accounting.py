"""What steps spend, what noise a budget asks for, and that the budget is kept before the step."""

import json
import math
import sys
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("opacus")

from opacus.accountants import PRVAccountant, RDPAccountant

from inft.client.privacy import prv
from inft.client.privacy.accountant import Accountant, TooLittleNoise, spent_epsilon
from inft.client.privacy.calibrate import BudgetExhausted, calibrate_noise, check_budget
from inft.client.privacy.rdp import ORDERS
from params.errors import UserError

DELTA = 1e-5
TABLE = [  # σ, q, steps, ε by RDP, ε by PRV
    (1, 1, 1, 4.73, 4.39),
    (1, 0.01, 1000, 2.10, 1.84),
    (0.6, 0.01, 1000, 8.67, 7.44),
    (2, 0.05, 500, 2.77, 2.54),
]


@dataclass(frozen=True, kw_only=True)
class Settings:
    noise_multiplier: float = 1.0
    sample_rate: float = 0.01
    delta: float = DELTA
    target_epsilon: float = 2.0


def spent(noise: float, rate: float, steps: int, accountant: str = "rdp", delta: float = DELTA) -> float:
    return spent_epsilon(noise_multiplier=noise, sample_rate=rate, steps=steps, delta=delta, accountant=accountant)


@pytest.mark.parametrize(("noise", "rate", "steps", "rdp", "prv"), TABLE)
def test_epsilon_is_the_golden_table(noise, rate, steps, rdp, prv):
    assert spent(noise, rate, steps, "rdp") == pytest.approx(rdp, abs=0.01)
    assert spent(noise, rate, steps, "prv") == pytest.approx(prv, abs=0.01)


@given(noise=st.floats(0.5, 5), rate=st.floats(0.001, 0.3), steps=st.integers(1, 400))
@settings(max_examples=15, deadline=None)
def test_rdp_is_that_of_opacus_own_accountant(noise, rate, steps):
    own = RDPAccountant()
    own.history = [(noise, rate, steps)]
    assert spent(noise, rate, steps) == pytest.approx(own.get_epsilon(DELTA, alphas=ORDERS), rel=1e-12)


@pytest.mark.parametrize(
    "runs", [[(1.0, 0.02, 1)], [(0.8, 0.01, 65)], [(2.0, 0.05, 300)], [(1, 0.01, 70), (2, 0.1, 9)]]
)
def test_prv_is_that_of_opacus_own_accountant_on_a_grid_for_more_steps(runs):
    own, accountant = PRVAccountant(), Accountant()
    own.history = runs
    accountant.load_state_dict({"mechanism": "prv", "history": [list(run) for run in runs]})
    assert accountant.epsilon(DELTA) == pytest.approx(own.get_epsilon(DELTA), abs=2e-3)


def test_an_epsilon_after_each_step_lays_few_grids():
    accountant = Accountant()
    before = prv._discrete.cache_info().misses
    for _ in range(200):
        accountant.step(1.3, 0.013)
        accountant.epsilon(DELTA)
    assert prv._discrete.cache_info().misses - before == 3  # for 64, 128 and 256 steps


def test_a_delta_below_what_floating_point_resolves_is_refused():
    with pytest.raises(TooLittleNoise, match="larger δ"):
        spent(1.0, 0.01, 10, "prv", delta=1e-17)


@given(noise=st.floats(0.3, 50), steps=st.integers(1, 5000), delta=st.floats(1e-9, 1e-2))
@settings(max_examples=40, deadline=None)
def test_rdp_of_the_plain_gaussian_is_its_closed_form(noise, steps, delta):
    closed = (
        a * steps / (2 * noise**2) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in ORDERS
    )
    assert spent(noise, 1.0, steps, delta=delta) == pytest.approx(max(min(closed), 0), rel=1e-9, abs=1e-12)


def test_prv_of_the_plain_gaussian_bounds_the_exact_epsilon_from_above_and_closely():
    def normal_cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def exact_delta(epsilon: float, noise: float) -> float:  # Balle and Wang 2018, theorem 8
        left, right = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
        return normal_cdf(left) - math.exp(epsilon) * normal_cdf(right)

    for noise, steps in ((1.0, 1), (2.0, 3), (5.0, 40)):
        epsilon = spent(noise, 1.0, steps, "prv")
        alone = noise / math.sqrt(steps)  # n Gaussians are one with σ/√n
        assert exact_delta(epsilon, alone) <= DELTA
        assert exact_delta(epsilon - 0.03, alone) > DELTA


@given(
    noise=st.floats(0.4, 10),
    more=st.floats(1.05, 2),
    rate=st.floats(0.001, 0.5),
    steps=st.integers(1, 500),
)
@settings(max_examples=8, deadline=None)
def test_epsilon_falls_with_noise_and_grows_with_rate_and_steps(noise, more, rate, steps):
    base = spent(noise, rate, steps)
    assert spent(noise * more, rate, steps) <= base * (1 + 1e-9)
    assert spent(noise, min(rate * more, 1.0), steps) >= base * (1 - 1e-9)
    assert spent(noise, rate, steps + 1) >= base * (1 - 1e-9)


@given(noise=st.floats(0.8, 4), rate=st.floats(0.005, 0.1), steps=st.integers(10, 300))
@settings(max_examples=3, deadline=None)
def test_prv_grows_with_steps_and_stays_below_rdp_but_for_its_grid(noise, rate, steps):
    base = spent(noise, rate, steps, "prv")
    assert base <= spent(noise, rate, steps, "rdp") + 0.02
    assert spent(noise, rate, 2 * steps, "prv") >= base - 0.02
    assert spent(2 * noise, rate, steps, "prv") <= base + 0.02


def test_nothing_spends_nothing_and_no_noise_spends_everything():
    assert spent(1.0, 0.01, 0) == spent(1.0, 0.0, 10, "prv") == 0
    assert spent(0.0, 0.01, 1) == spent(0.0, 0.01, 1, "prv") == math.inf
    assert Accountant().epsilon(DELTA) == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"steps": -1}, "steps"),
        ({"delta": 0.0}, "delta"),
        ({"accountant": "gdp"}, "accountant"),
    ],
)
def test_values_outside_their_range_are_named(changed, named):
    values = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1, "delta": DELTA, "accountant": "rdp"}
    with pytest.raises(UserError, match=named):
        spent_epsilon(**{**values, **changed})


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.5, 0.5, 10000), (0.02, 1.0, 1)])
def test_prv_refuses_what_it_cannot_compute(noise, rate, steps):
    with pytest.raises(TooLittleNoise, match="rdp"):
        spent(noise, rate, steps, "prv")


def test_accountant_equals_the_formula_and_comes_back_from_json():
    accountant = Accountant("rdp")
    for _ in range(1000):
        accountant.step(0.6, 0.01)
    state = json.loads(json.dumps(accountant.state_dict()))
    assert state == {"mechanism": "rdp", "history": [[0.6, 0.01, 1000]]}
    back = Accountant()
    back.load_state_dict(state)
    assert back.steps == 1000
    assert back.epsilon(DELTA) == accountant.epsilon(DELTA) == spent(0.6, 0.01, 1000)
    after = back.epsilon_after(DELTA, noise_multiplier=0.6, sample_rate=0.01)
    back.step(0.6, 0.01)
    assert after == back.epsilon(DELTA) == spent(0.6, 0.01, 1001)


def test_epsilon_does_not_depend_on_the_order_of_the_steps():
    one, other = Accountant("rdp"), Accountant("rdp")
    for step in range(20):
        one.step(1.0 + step % 2, 0.1)
        other.step(1.0 + step // 10, 0.1)
    assert len(one.history) == 20
    assert len(other.history) == 2
    assert one.epsilon(DELTA) == pytest.approx(other.epsilon(DELTA), rel=1e-12)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"mechanism": "rdp", "history": [[1.0, 0.1]]},
        {"mechanism": "rdp", "history": [[1.0, 0.1, 0]]},
        {"mechanism": "rdp", "history": [[1.0, 2.0, 1]]},
        {"mechanism": "x", "history": []},
        {"mechanism": "rdp", "history": None},
        {"mechanism": "rdp", "history": {"0": [1.0, 0.1, 1]}},
    ],
)
def test_a_broken_state_changes_nothing(state):
    accountant = Accountant("rdp")
    accountant.step(1.0, 0.1)
    before = accountant.state_dict()
    with pytest.raises(UserError):
        accountant.load_state_dict(state)
    assert accountant.state_dict() == before


@pytest.mark.parametrize(
    ("target", "rate", "steps", "accountant"),
    [(1.0, 0.01, 100, "prv"), (3.0, 0.01, 1000, "rdp"), (8.0, 0.05, 50, "rdp"), (50.0, 1.0, 3, "rdp")],
)
def test_calibrated_noise_spends_the_target_within_a_percent(target, rate, steps, accountant):
    noise = calibrate_noise(target_epsilon=target, delta=DELTA, sample_rate=rate, steps=steps, accountant=accountant)
    assert 0.99 * target <= spent(noise, rate, steps, accountant) <= target


@pytest.mark.parametrize(
    ("target", "steps", "accountant", "message"),
    [
        (0.001, 1, "prv", "out of reach"),
        (1e9, 1, "rdp", "Lower target_epsilon"),
        (0.0, 1, "rdp", "above 0"),
        (1.0, 0, "rdp", "0 steps"),
    ],
)
def test_targets_out_of_reach_are_refused(target, steps, accountant, message):
    with pytest.raises(UserError, match=message):
        calibrate_noise(target_epsilon=target, delta=DELTA, sample_rate=0.01, steps=steps, accountant=accountant)


def take_steps_until_refused(accountant: Accountant, params: Settings) -> BudgetExhausted:
    for _ in range(5000):
        try:
            check_budget(accountant, params)
        except BudgetExhausted as refused:
            return refused
        accountant.step(params.noise_multiplier, params.sample_rate)
    raise AssertionError("never refused")


@pytest.mark.parametrize(
    ("mechanism", "noise", "rate", "target"),
    [("rdp", 1.0, 0.05, 2.5), ("rdp", 2.0, 0.01, 0.6), ("prv", 1.0, 0.01, 0.5)],
)
def test_the_budget_refuses_the_first_step_that_would_exceed_it_and_records_nothing(mechanism, noise, rate, target):
    params = Settings(noise_multiplier=noise, sample_rate=rate, target_epsilon=target)
    accountant = Accountant(mechanism)
    refused = take_steps_until_refused(accountant, params)
    taken = accountant.steps
    assert taken > 1
    assert spent(noise, rate, taken, mechanism) <= target < spent(noise, rate, taken + 1, mechanism) == refused.after
    assert f"{refused.spent:.4f}" in str(refused)
    with pytest.raises(BudgetExhausted):
        check_budget(accountant, params)
    assert accountant.steps == taken


def test_a_budget_too_small_for_one_step_allows_none():
    accountant = Accountant("rdp")
    with pytest.raises(BudgetExhausted, match="after 0 steps"):
        check_budget(accountant, Settings(noise_multiplier=0.5, sample_rate=1.0))
    with pytest.raises(UserError, match="target_epsilon"):
        check_budget(accountant, Settings(target_epsilon=0.0))
    assert accountant.steps == 0


def test_what_was_allowed_ahead_ends_with_other_steps_a_smaller_target_and_another_state():
    params = Settings(noise_multiplier=2.0, sample_rate=0.05, target_epsilon=1.0)
    accountant = Accountant("rdp")
    check_budget(accountant, params)
    with pytest.raises(BudgetExhausted):
        check_budget(accountant, replace(params, target_epsilon=0.01))
    accountant.step(0.6, 0.05)  # spends more than the target by itself
    with pytest.raises(BudgetExhausted):
        check_budget(accountant, params)
    accountant = Accountant("rdp")
    check_budget(accountant, params)
    accountant.load_state_dict({"mechanism": "rdp", "history": [[0.6, 0.05, 1]]})
    with pytest.raises(BudgetExhausted):
        check_budget(accountant, params)


def test_epsilon_is_computed_for_few_of_many_steps(monkeypatch):
    asked = []
    accountant = Accountant("rdp")
    original = Accountant.epsilon_after
    monkeypatch.setattr(Accountant, "epsilon_after", lambda *a, **k: (asked.append(1), original(*a, **k))[1])
    take_steps_until_refused(accountant, Settings(noise_multiplier=1.0, sample_rate=0.01, target_epsilon=2.1))
    assert 990 < accountant.steps < 1000  # the golden table: 1000 steps spend 2.101
    assert len(asked) < 30


@pytest.mark.parametrize("mechanism", ["prv", "rdp"])
def test_without_opacus_the_remedy_is_named(monkeypatch, mechanism):
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("prv", "rdp"):
        monkeypatch.delitem(sys.modules, f"inft.client.privacy.{name}", raising=False)
    with pytest.raises(UserError, match=r"pip install 'inft\[client\]'"):
        spent(1.0, 0.1, 1, mechanism)
