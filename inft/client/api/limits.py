"""How many requests are taken: a token bucket for each tenant, and for each address that shows no key."""

import time
from collections import OrderedDict
from collections.abc import Callable

MOST_BUCKETS = 4096  # kept at once: addresses are a caller's to choose


class Limiter:
    """Token buckets: `burst` requests at once, `rate` a second over time. For one thread, that of the event loop."""

    def __init__(self, *, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def take(self, key: str) -> float:
        """Take a token and return 0.0; where there is none, return the seconds until there will be one."""
        now = self._clock()
        tokens, counted = self._buckets.pop(key, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - counted) * self._rate)
        taken = tokens >= 1
        self._buckets[key] = (tokens - taken, now)  # at the end: the one that was idle longest stands first
        if len(self._buckets) > MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1 - tokens) / self._rate
