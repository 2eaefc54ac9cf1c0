"""Rows and targets against plain loops over documents."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_ds.model.rows import count_targets, head_rows

DOCUMENT = st.lists(st.integers(0, 99).flatmap(lambda token: st.tuples(st.just(token), st.booleans())), max_size=7)
SEQUENCES = st.lists(st.lists(DOCUMENT, min_size=1, max_size=4), min_size=1, max_size=3)


def pack(sequences):
    """Lists of documents of (token, supervised) -> labels and positions, padded at the end by one more document."""
    length = max(1, max(sum(map(len, documents)) for documents in sequences))
    labels, positions = [], []
    for documents in sequences:
        row = [token if supervised else -100 for document in documents for token, supervised in document]
        place = [i for document in documents for i in range(len(document))]
        labels.append(row + [-100] * (length - len(row)))
        positions.append(place + list(range(length - len(row))))
    return torch.tensor(labels), torch.tensor(positions)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, st.integers(0, 4))
def test_rows_are_those_whose_target_is_a_label_of_the_same_document(sequences, offset):
    """Mutation: shift labels by one more (`offset + 2` in the targets or in the rows)."""
    labels, positions = pack(sequences)
    expected = []
    for b, documents in enumerate(sequences):
        start = 0
        for document in documents:
            for i, (token, supervised) in enumerate(document):
                if supervised and i - offset - 1 >= 0:
                    expected.append((b * labels.shape[1] + start + i - offset - 1, token))
            start += len(document)
    rows, targets = head_rows(labels, positions, offset)
    assert list(zip(rows.tolist(), targets.tolist(), strict=True)) == expected
    assert count_targets(labels, positions, 4)[offset] == len(expected)
