"""How cores are shared, and what a supervisor does with fronts that do not start."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.serve.errors import InputError
from trainkit.serve.http.listener import bound
from trainkit.serve.http.run import Plan
from trainkit.serve.http.supervisor import Supervisor, shares


@given(st.sets(st.integers(0, 255), min_size=1), st.integers(1, 64))
def test_every_worker_has_cores_and_none_is_left_over(cores, workers):
    found = shares(sorted(cores), workers)
    assert len(found) == workers
    assert {core for share in found for core in share} == (
        cores if workers <= len(cores) else {share[0] for share in found}
    )
    sizes = {len(share) for share in found}
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    if workers <= len(cores):  # none twice
        assert sum(map(len, found)) == len(cores)


@pytest.fixture
def supervisor(tmp_path):
    """Return a function that makes a supervisor of two fronts for these folders."""
    listener = bound("127.0.0.1", 0)

    def make(**folders):
        return Supervisor(Plan(folders=folders), listener, tmp_path, 2)

    yield make
    listener.close()


def test_fronts_that_refuse_to_start_give_their_sentence(supervisor, tmp_path):
    async def start():
        made = supervisor(questions=str(tmp_path / "nowhere"))
        with pytest.raises(InputError, match="nowhere"):
            await made.start()
        assert [front.process.returncode is not None for front in made.fronts] == [True, True]

    asyncio.run(start())
