import logging
import threading
import warnings

from detrkit.common.quiet import no_warnings, quiet


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


def test_filters_survive_a_library_that_catches_warnings_meanwhile():
    before = list(warnings.filters)
    of_a_library = warnings.catch_warnings()
    with no_warnings():
        of_a_library.__enter__()
    of_a_library.__exit__(None, None, None)  # in another thread, it may end after our block
    assert list(warnings.filters) == before


def test_a_filter_of_the_caller_that_equals_ours_stays():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = list(warnings.filters)
        with no_warnings():
            assert len(warnings.filters) == len(before) + 1
        assert list(warnings.filters) == before


def test_loggers_get_their_level_back_when_the_last_block_ends():
    logger = logging.getLogger("some.library")
    logger.setLevel(logging.INFO)
    first, second = quiet("some.library"), quiet("some.library")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # before the second, which began after it
    assert logger.level == logging.ERROR
    second.__exit__(None, None, None)
    assert logger.level == logging.INFO
