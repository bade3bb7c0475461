from math import sqrt

from hypothesis import given
from hypothesis import strategies as st

from care_hf.evaluation import Rate, generate_answers


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_the_closed_form(counts):
    count, n = counts
    z, p = 1.959963984540054, count / n
    centre, spread = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = Rate(count, n).interval
    assert abs(low - max(0, (centre - spread) / (1 + z * z / n))) < 1e-9
    assert abs(high - min(1, (centre + spread) / (1 + z * z / n))) < 1e-9


def test_rates_pool():
    assert Rate(1, 4) + Rate(2, 6) == Rate(3, 10)


def test_batched_answers_are_the_single_answers(testbed, world):
    model, processor = testbed
    samples = [world.attack("icon", "test", 3)[2], world.plain("test", 2)[1], *world.benign("count", "test", 3)]
    batched = generate_answers(model, processor, samples, 12)
    assert batched == [generate_answers(model, processor, [s], 12)[0] for s in samples]
