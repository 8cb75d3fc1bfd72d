"""What wraps a network for training: how often the compiler works for batches of many shapes."""

import functools

import pytest
import torch
from running import tiny
from torch import nn

from luqrun.train import setup


class Tagger(nn.Module):
    """Looks as networks for text do to the compiler: ids (n, length), by keyword."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids, mask=None, scale=1.0):
        return self.layer(self.table(ids) * mask[..., None] * scale)


@pytest.mark.parametrize(("any_size", "most"), [(True, 1), (False, 2)])
def test_batches_of_many_shapes_are_compiled_once_where_it_is_known_before(any_size, most, monkeypatch):
    graphs = []
    counting = functools.partial(torch.compile, backend=lambda graph, _: graphs.append(1) or graph.forward)
    monkeypatch.setattr(torch, "compile", counting)
    model = Tagger()
    network = setup.wrap(model, tiny("compile=true"), torch.device("cpu"), any_size)
    for shape in ((5, 5), (7, 4), (6, 9), (8, 8)):
        ids = torch.randint(9, shape)
        found = network(ids, mask=torch.ones(shape))
        torch.testing.assert_close(found, model(ids, torch.ones(shape)))
    assert len(graphs) == most


def test_nothing_is_wrapped_where_nothing_asks_for_it():
    model = Tagger()
    assert setup.wrap(model, tiny(), torch.device("cpu"), any_size=True) is model
