from collections.abc import Iterator, Sequence

import pytest
import torch

from alignlab import cpu_threads
from alignlab.cpu_threads import CpuThreads, CpuUsage, available_cores, follow_free_cores, read_cpu_usage

WINDOW = cpu_threads.WINDOW_S


class Machine:
    """Cores whose use by this process and by others is set by the test."""

    def __init__(self) -> None:
        self.usage = CpuUsage(0.0, 0.0, 0.0)
        self.num_reads = 0

    def run(self, seconds: float, *, process: float, others: float) -> None:
        before = self.usage
        self.usage = CpuUsage(
            wall_s=before.wall_s + seconds,
            busy_s=before.busy_s + (process + others) * seconds,
            process_s=before.process_s + process * seconds,
        )

    def read(self) -> CpuUsage:
        self.num_reads += 1
        return self.usage

    def clock(self) -> float:
        return self.usage.wall_s


def numbers(limit: int, cores: float, windows: Sequence[tuple[float, float]]) -> list[int]:
    """The number of threads after each window of (this process's use, others' use), in cores."""
    machine = Machine()
    threads = CpuThreads(limit, cores, machine.read, machine.clock)
    chosen = []
    for process, others in windows:
        machine.run(WINDOW, process=process, others=others)
        chosen.append(threads.update())
    return chosen


def test_all_threads_compute_on_idle_cores():
    assert numbers(2, 2, [(2.0, 0.0), (1.4, 0.1), (0.3, 0.0), (2.0, 0.4)]) == [2, 2, 2, 2]


def test_a_busy_neighbour_costs_its_cores_from_the_second_window_on_and_gives_them_back():
    windows = [(1.4, 0.6), (1.4, 0.6), (1.0, 1.0), (1.0, 0.0), (1.0, 0.0)]
    assert numbers(2, 2, windows) == [2, 1, 1, 1, 2]


def test_one_thread_is_left_beside_more_neighbours_than_cores():
    assert numbers(2, 2, [(0.5, 1.5)] * 3) == [2, 1, 1]


def test_a_large_machine_loses_as_many_threads_as_its_neighbours_use():
    assert numbers(16, 16, [(13.0, 3.0)] * 2 + [(13.0, 3.4)] * 2 + [(13.0, 3.5)] * 2) == [16, 13, 13, 13, 13, 12]


def test_a_short_burst_changes_nothing():
    assert numbers(2, 2, [(1.0, 1.0), (2.0, 0.0), (1.0, 1.0), (2.0, 0.0)]) == [2, 2, 2, 2]


def test_two_windows_that_ask_for_different_numbers_change_nothing():
    assert numbers(4, 4, [(3.0, 1.0), (2.0, 2.0), (2.0, 2.0)]) == [4, 4, 2]


def test_nothing_is_measured_within_a_window():
    machine = Machine()
    threads = CpuThreads(2, 2, machine.read, machine.clock)
    machine.run(WINDOW * 0.9, process=0.0, others=2.0)
    assert threads.update() == 2
    assert machine.num_reads == 1


def test_fewer_threads_are_said_once_with_the_way_to_equal_bits(caplog):
    numbers(2, 2, [(1.0, 1.0)] * 2 + [(2.0, 0.0)] * 2 + [(1.0, 1.0)] * 2)
    (record,) = caplog.records
    assert "other processes use 1.0 of 2 cores" in record.getMessage()
    assert "1 thread(s) instead of 2" in record.getMessage()
    assert "OMP_NUM_THREADS" in record.getMessage()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Torch with two threads on a machine of the test's."""
    monkeypatch.setattr(torch, "set_num_threads", torch._C.set_num_threads)  # of which vLLM may have made another
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    machine = Machine()
    monkeypatch.setattr(cpu_threads, "_is_settable", True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_threads, "_initial_threads", 2)
    monkeypatch.setattr(cpu_threads, "_threads", CpuThreads(2, 2, machine.read, machine.clock))
    yield machine
    torch.set_num_threads(before)


def after_windows(machine: Machine, others: float) -> int:
    for _ in range(cpu_threads.CONFIRMATIONS):
        machine.run(WINDOW, process=1.0, others=others)
        follow_free_cores()
    return torch.get_num_threads()


def test_torch_computes_with_the_free_cores(machine):
    assert after_windows(machine, 1.0) == 1
    assert after_windows(machine, 0.0) == 2


def test_the_environments_number_of_threads_stays(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert after_windows(machine, 2.0) == 2


def test_a_number_that_the_user_gives_to_torch_is_the_new_limit(machine):
    assert after_windows(machine, 0.0) == 2
    torch.set_num_threads(3)
    assert after_windows(machine, 0.0) == 2  # of two cores
    torch.set_num_threads(1)
    assert after_windows(machine, 0.0) == 1


def test_a_number_that_cannot_be_set_stays_and_is_not_tried_again(machine, monkeypatch):
    tries = []
    monkeypatch.setattr(torch, "set_num_threads", tries.append)
    assert after_windows(machine, 1.0) == 2
    assert after_windows(machine, 1.0) == 2
    assert tries == [1]


def test_the_use_of_this_machine_grows_and_holds_what_this_process_used():
    first = read_cpu_usage()
    while (second := read_cpu_usage()).process_s - first.process_s < 0.05:
        torch.ones(100).sum()
    assert second.wall_s > first.wall_s
    assert second.busy_s - first.busy_s > 0.02  # counted in hundredths of a second


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 3.0), ("150000 100000", 1.5), ("50000 100000", 1.0)])
def test_a_containers_share_of_time_limits_the_cores(tmp_path, monkeypatch, quota, cores):
    file = tmp_path / "cpu.max"
    file.write_text(f"{quota}\n")
    monkeypatch.setattr(cpu_threads, "_QUOTA_FILE", file)
    monkeypatch.setattr(cpu_threads, "_allowed_cores", lambda: {0, 2, 5})
    assert available_cores() == cores
