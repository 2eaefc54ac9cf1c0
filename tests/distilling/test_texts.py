"""Which texts are left out."""

import json

import pytest

from medusa_ds.distilling.output import Journal
from medusa_ds.distilling.texts import Excluded, Seen, loops, repetitive
from medusa_ds.errors import UserError

FOX = "The quick brown fox jumps over the lazy dog near the old river bank at dawn"


@pytest.mark.parametrize("period", [1, 2, 7, 32])
def test_a_tail_that_repeats_is_a_loop(period):
    """Mutation: compare the tail with itself unshifted (everything loops), or only its last item."""
    assert loops([*range(1000, 1200), *[n % period for n in range(64)]])
    broken = [n % period for n in range(64)]
    broken[20] = -1
    assert not loops([*range(1000, 1200), *broken])


def test_short_or_slowly_repeating_tails_are_no_loops():
    assert not loops([1] * 63)
    assert not loops([n % 33 for n in range(200)])


def test_texts_that_say_the_same_again_are_repetitive():
    assert repetitive("I am happy to help you. " * 10)
    assert not repetitive(FOX)
    assert not repetitive(" ".join(f"{a} plus {b} is {a + b}." for a in range(9) for b in range(9)))


def test_eight_words_of_an_excluded_text_are_an_overlap_whatever_their_case():
    """Mutation: compare runs of seven or nine words."""
    excluded = Excluded([FOX, "Who are you?"])
    assert excluded.overlap("Say: the QUICK brown fox, jumps over the lazy!")
    assert not excluded.overlap("Say: the quick brown fox jumps over the cat")
    assert excluded.overlap("Hello, who are you then?")
    assert not excluded.overlap("Who is it?")
    assert not Excluded([]).overlap("anything")


def test_near_duplicates_are_not_added():
    seen = Seen()
    assert seen.add(FOX)
    assert not seen.add(FOX.replace("dawn", "noon"))
    assert not seen.add("the quick brown fox jumps over the lazy dog")
    assert seen.add("The quick brown fox likes to write letters to its aunt in Paris every single Sunday")
    assert seen.count == 2


def test_a_broken_last_line_is_cut_off(tmp_path):
    """Mutation: keep what follows the last line break; the next row is then glued to it."""
    file = tmp_path / "a" / "rows.jsonl"
    journal = Journal(file)
    journal.append({"row": 1, "text": "ä\u2028"})
    journal.close()
    with open(file, "a") as stream:
        stream.write('{"row": 2, "te')
    journal = Journal(file)
    assert journal.rows == [{"row": 1, "text": "ä\u2028"}]
    journal.append({"row": 3})
    journal.close()
    assert [json.loads(line)["row"] for line in file.read_bytes().splitlines()] == [1, 3]


def test_a_journal_belongs_to_one_process_and_holds_rows_only(tmp_path):
    journal = Journal(tmp_path / "rows")
    with pytest.raises(UserError, match="in use"):
        Journal(tmp_path / "rows")
    journal.close()
    (tmp_path / "rows").write_text('{"row": 1}\nhello\n')
    with pytest.raises(UserError, match="rows:2: not a row"):
        Journal(tmp_path / "rows")
