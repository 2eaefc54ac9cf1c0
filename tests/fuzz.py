"""How fuzzed tests draw: the same examples every time."""

from hypothesis import HealthCheck, settings

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
