import threading
import warnings

from detrkit.common.quiet import no_warnings


def test_overlapping_blocks_leave_the_filters_as_they_were():
    before = list(warnings.filters)
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def first():
        with no_warnings():
            first_is_in.set()
            second_is_in.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(10)
    with no_warnings("some"):  # ends after the first, which began before it
        second_is_in.set()
        thread.join()
        warnings.warn("something", stacklevel=1)
    assert list(warnings.filters) == before
