"""Work shared over the cores of this process: in order, not too far ahead, and over when nobody takes it."""

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
def test_results_come_in_order_each_from_a_thread_whose_operations_stay_with_it() -> None:
    with one_thread_per_core() as cores:
        made = list(cores.map(lambda i: (i, torch.get_num_threads()), range(20)))
    assert made == [(i, 1) for i in range(20)]
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_cores")
def test_no_more_is_begun_than_one_beyond_the_cores() -> None:
    begun: list[int] = []
    with one_thread_per_core() as cores:
        results = cores.map(begun.append, range(20))
        next(results)
        assert len(begun) <= 4
        results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 4


def test_what_goes_wrong_in_a_thread_is_raised_here_and_no_work_is_left() -> None:
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
def test_cores_are_parted_for_work_on_the_cpu_alone() -> None:
    for device, count in (("cpu", 3), ("cuda", 1)):
        with on_each_core_or_here(torch.device(device)) as cores:
            assert cores.count == count
            assert list(cores.map(lambda i: i + 1, range(4))) == [1, 2, 3, 4]
        assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_cores")
def test_fewer_threads_than_cores_have_several_each() -> None:
    for most, threads in ((0, 3), (1, 3), (2, 1), (3, 1), (9, 1)):
        with on_each_core_or_here(torch.device("cpu"), most) as cores:
            assert cores.count == max(1, min(most, 3))
            assert list(cores.map(lambda _: torch.get_num_threads(), range(4))) == [threads] * 4
        assert torch.get_num_threads() == 3
