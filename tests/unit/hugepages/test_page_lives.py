"""No page promised twice, none lost, the administrator's pool untouched: whatever happens."""

from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from page_lives import Life, live


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 1 << 32))
@example(seed=368)  # a guest that waits counts on what was made for one that was forgotten
def test_whatever_happens(seed):
    live(seed, 40)


def test_lives_are_eventful():
    """They come to every event with an effect, or the property says nothing."""
    seen = set()
    for seed in range(30):
        life = Life(seed)
        for _ in range(40):
            life.step()
            runs = [g for g in life.books.holdings if life._runs(g)]
            seen |= {"runs"} if runs else set()
            seen |= {"waits"} if len(runs) < len(life.books.holdings) else set()
            made = [p.made for h in life.books.holdings.values() for p in h.pages]
            seen |= {"made"} if any(made) else set()
            seen |= {"found"} if made and not all(made) else set()
            strange = {g for k in life.admin for g in life.snapshot().pools.pools[k].made}
            seen |= {"stray"} if strange - life.books.holdings.keys() else set()
            seen |= {"robbed"} if life.robbed else set()
        life.finish()
    assert seen == {"runs", "waits", "made", "found", "stray", "robbed"}
