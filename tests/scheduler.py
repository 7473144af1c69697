"""Programs that run beside each other in the interpreter: one thread each, and a scheduler that says whose turn it is.

    with scheduled(order) as scheduler: ...

One program runs at a time, until its next access to memory that others may touch (an atomic, or a barrier); then the
order picks who goes on. A program that spins on a flag lets the others run, as on a GPU whose programs are all on the
device. `limit` turns without an end of the launch are a hang: all programs end with `Hang`.
"""

import contextlib
import random
import threading

import interpreter
from triton.runtime.interpreter import InterpreterError, interpreter_builder


class Hang(InterpreterError):
    """The programs of a launch wait for what never comes."""


def round_robin(ready, turn):
    """Each in its turn."""
    return ready[turn % len(ready)]


def reverse(ready, turn):
    """The last one goes as far as it gets, unless all before it wait: every eighth turn is another's."""
    return ready[-1] if turn % 8 else ready[turn // 8 % len(ready)]


def starving(number):
    """Program `number` (of how many there are) gets a turn in fifty, until it is alone."""

    def order(ready, turn):
        starved = number % (max(ready) + 1)
        others = [x for x in ready if x != starved] or ready
        return starved if turn % 50 == 49 and starved in ready else others[turn % len(others)]

    return order


def shuffled(seed):
    """Whoever chance picks."""
    chance = random.Random(seed)
    return lambda ready, turn: chance.choice(ready)


class Scheduler:
    """Runs the programs of each launch."""

    def __init__(self, order, limit, resident):
        self.order, self.limit, self.resident = order, limit, resident
        self.most = self.turns = 0

    def run(self, program, count):
        """In place of `interpreter.in_turn`."""
        if count == 1:
            return interpreter.in_turn(program, count)
        self.most = max(self.most, count)
        resident = min(count, self.resident or count)
        waiting = list(range(resident, count))  # for a place on the device
        ready, turns = list(range(resident)), [threading.Semaphore(0) for _ in range(count)]
        back, errors = threading.Semaphore(0), []
        self.stopping = False

        def body(number):
            turns[number].acquire()
            try:
                if not self.stopping:
                    interpreter.set_program(number)
                    program()
            except BaseException as error:
                errors.append(error)
            ready.remove(number)
            if waiting:
                ready.append(waiting.pop(0))
            back.release()

        def pause():
            number = interpreter_builder.grid_idx[0]
            back.release()
            turns[number].acquire()
            if self.stopping:
                raise Hang("stopped")
            interpreter.set_program(number)

        self.pause = pause
        threads = [threading.Thread(target=body, args=(number,), daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        turn = 0
        while ready:
            if turn > self.limit or errors:
                self.stopping = True
            number = ready[0] if self.stopping else self.order(sorted(ready), turn)
            turns[number].release()
            back.acquire()
            turn += 1
        self.turns += turn
        for thread in threads:
            thread.join()
        if turn > self.limit:
            raise Hang(f"{turn} turns and no end of the launch")
        if errors:
            raise errors[0]
        return None


@contextlib.contextmanager
def scheduled(order, limit=20_000, resident=None):
    """Run the programs of every launch so; `resident`: only so many at a time, the next when one has ended.

    Enter it after `watch.watching`, which must see an atomic when it happens, not when its program is about to pause.
    """
    scheduler = Scheduler(order, limit, resident)
    before = interpreter.run_programs
    rmw, barrier = interpreter_builder.create_atomic_rmw, interpreter_builder.create_barrier

    def atomic_rmw(*arguments):
        if threading.current_thread() is not threading.main_thread():
            scheduler.pause()
        return rmw(*arguments)

    def create_barrier(*arguments):
        if threading.current_thread() is not threading.main_thread():
            scheduler.pause()
        return barrier(*arguments)

    interpreter.run_programs = scheduler.run
    try:
        with interpreter.replaced(create_atomic_rmw=atomic_rmw, create_barrier=create_barrier):
            yield scheduler
    finally:
        interpreter.run_programs = before
