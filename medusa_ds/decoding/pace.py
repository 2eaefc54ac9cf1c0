"""How many guesses a step verifies where every one of them costs time, as on a CPU: as many as pay, none if none does.

Guesses stand in a fixed order, the most promising first, and a step verifies the first n of them. It is expected to
add 1 + p_1 + ... + p_n tokens, p the shares of the last steps in which a guess held, and to last as long as steps of
its size have lasted here; the size with the most tokens a second goes next. What was seen fades at every step, and more
between texts, towards what all texts have shown, which began as what was assumed. A text's first step and every 32nd
are a size larger than the best, so that guesses which did not hold are tried again. Which sizes run changes only the
time: every step keeps what the base model itself says.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Sequence


class Pace:
    """Chooses the size of the next step.

    Args:
        sizes: counts of guesses that a step may verify.
        assumed: for each guess the share of steps in which it is assumed to hold, as if seen in two steps.
    """

    FADES, LASTS, TRIES = 0.995, 0.998, 32

    def __init__(self, sizes: Sequence[int], assumed: Sequence[float]) -> None:
        self.sizes = sorted(sizes, reverse=True)
        self.held, self.tried = [0.0] * len(assumed), [0.0] * len(assumed)
        self.ever_held, self.ever_tried = [2 * share for share in assumed], [2.0] * len(assumed)
        self.steps = 0
        self.seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=5))

    def begin(self) -> None:
        """Another text: what the last one has shown counts a third."""
        self._fade(0.3)
        self.steps = 0

    def choose(self) -> int:
        """The size of the next step; at the beginning each size in turn, the largest first, until its time is known."""
        unknown = [size for size in self.sizes if len(self.seconds[size]) < 2]
        if unknown:
            return unknown[0]
        best = self.sizes.index(max(self.sizes, key=self._rate))
        return self.sizes[max(best - (self.steps % self.TRIES == 0), 0)]

    def saw(self, size: int, held: Collection[int], seconds: float | None) -> None:
        """Take in a step.

        Args:
            size: that it had.
            held: numbers, from 0, of the guesses that were right.
            seconds: that it took; None where it did not end as steps of its size do.
        """
        self._fade(self.FADES)
        self.steps += 1
        for guess in range(size):
            holds = guess in held
            self.tried[guess] += 1
            self.held[guess] += holds
            self.ever_tried[guess] = self.LASTS * self.ever_tried[guess] + 1
            self.ever_held[guess] = self.LASTS * self.ever_held[guess] + holds
        if seconds is not None:
            self.seconds[size].append(seconds)

    def _rate(self, size: int) -> float:
        times = sorted(self.seconds[size])
        return (1 + sum(map(self._share, range(size)))) / times[(len(times) - 1) // 2]

    def _share(self, guess: int) -> float:
        ever = self.ever_held[guess] / self.ever_tried[guess]
        return (self.held[guess] + 2 * ever) / (self.tried[guess] + 2)

    def _fade(self, factor: float) -> None:
        self.held, self.tried = ([factor * value for value in values] for values in (self.held, self.tried))
