"""The ring of keys."""

import pytest
import torch

from models.queue import Queue

from .toys import unit_rows


def test_starts_with_unit_rows_of_unknown_class():
    queue = Queue(64, 5)
    torch.testing.assert_close(queue.rows_KD.norm(dim=1), torch.ones(64))
    assert (queue.labels_K == -1).all()


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 10, 11, 25])
def test_holds_the_newest_keys_whatever_the_batch(batch):
    queue, pushed, labels = Queue(10, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    start = queue.rows_KD.clone()
    for number in range(6):
        keys, classes = unit_rows(batch, 4), torch.full((batch,), number)
        queue.push(keys, classes)
        pushed, labels = torch.cat([pushed, keys]), torch.cat([labels, classes])
        expected = torch.cat([start, pushed])[-10:]
        order = (torch.arange(10) + len(pushed)) % 10  # the ring's oldest row comes first
        assert torch.equal(queue.rows_KD[order], expected)
        assert torch.equal(queue.labels_K[order][-min(10, len(labels)) :], labels[-10:])


def test_a_key_without_class_takes_the_old_class_away():
    queue = Queue(4, 2)
    queue.push(unit_rows(4, 2), torch.arange(4))
    queue.push(unit_rows(1, 2))
    assert queue.labels_K.tolist() == [-1, 1, 2, 3]


def test_state_goes_on_where_it_was():
    one, other = Queue(5, 3), Queue(5, 3)
    one.push(unit_rows(7, 3))
    other.load_state_dict(one.state_dict())
    more = unit_rows(2, 3)
    one.push(more), other.push(more)
    assert torch.equal(one.rows_KD, other.rows_KD)


def test_an_empty_queue_is_refused():
    with pytest.raises(ValueError, match="queue: 0 rows; give at least 1"):
        Queue(0, 4)
