from detrkit.engines.allocator import Excess, resident_bytes


class Memory:
    """What a process would hold, and how often it gave some back."""

    def __init__(self) -> None:
        self.held, self.given_back = 100, 0

    def give_back(self) -> None:
        self.held, self.given_back = 100, self.given_back + 1


def checks(memory: Memory, excess: Excess, *held: int) -> list[bool]:
    results = []
    for memory.held in held:
        results.append(excess.check())
    return results


def test_steady_work_keeps_its_memory() -> None:
    memory = Memory()
    excess = Excess(lambda: memory.held, memory.give_back)
    assert not any(checks(memory, excess, 100, 300, 350, 400, *[400] * 20, 499))
    assert memory.given_back == 0


def test_growth_beyond_what_the_work_takes_is_given_back_once() -> None:
    memory = Memory()
    excess = Excess(lambda: memory.held, memory.give_back)
    *early, last = checks(memory, excess, *[400] * Excess.WATCHED, 450, 501)
    assert last
    assert not any(early)
    assert memory.held == 100
    # What the work takes is learned anew.
    assert not any(checks(memory, excess, 300, *[600] * Excess.WATCHED, 700))
    assert memory.given_back == 1


def test_without_a_reading_nothing_happens() -> None:
    memory = Memory()
    assert not any(Excess(lambda: None, memory.give_back).check() for _ in range(50))


def test_the_process_itself_holds_something() -> None:
    held = resident_bytes()
    assert held is None or held > 10 * 2**20


def test_memory_is_given_back_after_so_many_new_sizes_however_much_was_kept_before() -> None:
    memory = Memory()
    memory.held = 1000
    excess = Excess(lambda: memory.held, memory.give_back)
    results = [excess.check((1, number)) for number in range(3 * (Excess.SIZES + 1))]
    assert memory.given_back == 3
    assert results[Excess.SIZES]
    assert not any(results[: Excess.SIZES])


def test_sizes_that_recur_are_not_new() -> None:
    memory = Memory()
    excess = Excess(lambda: memory.held, memory.give_back)
    for _ in range(20):
        for number in range(Excess.SIZES + 5):
            excess.check((1, number))
    assert memory.given_back == 1
