"""Threads over the cores: results in order, few items started ahead, none after the consumer stops."""

import threading
from collections.abc import Iterator

import pytest
import torch

from qlinear.runtime.threads import on_each_core_or_here, one_thread_per_core


@pytest.fixture
def three_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_cores")
def test_results_come_in_order_from_single_threaded_workers() -> None:
    with one_thread_per_core() as cores:
        results = list(cores.map(lambda i: (i, torch.get_num_threads()), range(20)))
    assert results == [(i, 1) for i in range(20)]
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_cores")
def test_at_most_one_more_item_than_cores_is_started() -> None:
    started: list[int] = []
    with one_thread_per_core() as cores:
        results = cores.map(started.append, range(20))
        next(results)
        assert len(started) <= 4
        results.close()  # type: ignore[attr-defined]
    assert len(started) <= 4


def test_an_error_in_a_thread_is_raised_and_the_pool_stays_usable() -> None:
    finished = threading.Event()

    def work(i: int) -> int:
        if i == 0:
            raise ValueError("zero")
        finished.set()
        return i

    with one_thread_per_core() as cores:
        with pytest.raises(ValueError, match="zero"):
            list(cores.map(work, range(3)))
        assert list(cores.map(work, [1, 2])) == [1, 2]
    assert finished.is_set()


@pytest.mark.usefixtures("three_cores")
def test_threads_are_used_on_the_cpu_only() -> None:
    for device, count in (("cpu", 3), ("cuda", 1)):
        with on_each_core_or_here(torch.device(device)) as cores:
            assert cores.count == count
            assert list(cores.map(lambda i: i + 1, range(4))) == [1, 2, 3, 4]
        assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_cores")
def test_fewer_threads_share_the_cores() -> None:
    for max_threads, threads in ((0, 3), (1, 3), (2, 1), (3, 1), (9, 1)):
        with on_each_core_or_here(torch.device("cpu"), max_threads) as cores:
            assert cores.count == max(1, min(max_threads, 3))
            assert list(cores.map(lambda _: torch.get_num_threads(), range(4))) == [threads] * 4
        assert torch.get_num_threads() == 3
