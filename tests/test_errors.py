"""What errors and reports are worded with."""

from medusa_ds.errors import counted


def test_numbers_of_things_are_told_in_words():
    """Mutation: an s whatever the number."""
    assert [counted(number, "step") for number in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
