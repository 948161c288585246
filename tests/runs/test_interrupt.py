import os
import signal
import threading

import pytest

from alignlab.runs.interrupt import Interrupt, catch_interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    with catch_interrupts() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested and interrupt.signal == number.name


def test_a_second_ctrl_c_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), catch_interrupts() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_a_first_ctrl_c_after_sigterm_does_not() -> None:
    with catch_interrupts() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested


def test_former_handlers_are_back_afterwards() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(ZeroDivisionError), catch_interrupts():
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
        1 / 0  # noqa: B018
    assert {number: signal.getsignal(number) for number in before} == before


def test_in_another_thread_nothing_is_caught() -> None:
    seen: list[Interrupt] = []
    handler = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with catch_interrupts() as interrupt:
            assert signal.getsignal(signal.SIGTERM) is handler
            seen.append(interrupt)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(seen) == 1 and not seen[0].requested
