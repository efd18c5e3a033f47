"""What the encoder is shown: thinned as binomial numbers would be, and the likelihood still sees everything."""

import pytest
import scipy.stats
import torch
from networks import make_batch, make_config, make_network

from anvi._fit import step
from anvi.nn import Batch, Draws
from anvi.nn.config import Entries


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alike(count: float, cells: int) -> Batch:
    """Cells with one gene and the same count."""
    where = torch.arange(cells), torch.zeros(cells, dtype=torch.long)
    batch = make_batch(make_config("scvi"))
    return batch._replace(x=None, entries=Entries(*where, torch.full((cells,), count)), weight=torch.ones(cells))


@pytest.mark.parametrize("count", [1, 2, 5, 60])
@pytest.mark.parametrize("kept", [0.35, 0.6, 0.9])
def test_thinning_is_nearly_binomial(count, kept, monkeypatch):
    monkeypatch.setattr(step, "SHALLOWEST", kept)
    n = 40_000
    depth = 1.0  # of a uniform number between `kept` and 1; the efficiency makes it `kept` at its lower end
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low=0.0, high=1.0, generator=None: self.fill_(low))
    batch = step._thinned(alike(count, n), 0.5, torch.tensor([depth]), noise())
    monkeypatch.undo()
    found, expected = batch.seen.count, scipy.stats.binom(count, kept)
    assert found.min() >= 0 and found.max() <= count and torch.equal(found, found.round())
    # what rounding a normal number costs: at most 5 % of the count in the mean, a tenth of a count in the deviation
    assert float(found.mean()) == pytest.approx(expected.mean(), abs=0.05 * count)
    assert float(found.std()) == pytest.approx(expected.std(), abs=0.1)
    assert torch.equal(batch.entries.count, torch.full((n,), float(count)))


def test_so_many_cells_are_thinned_and_the_others_not():
    config = make_config("totalanvi", n_genes=60)
    batch = make_batch(config, n_cells=400)
    (thinned,) = step.augment([batch], config.n_genes, noise(), hide_proteins=0.0, thin_counts=0.3)
    seen, whole = thinned.seen.dense(batch.x), batch.x
    changed = (seen != whole).any(1).double().mean()
    assert (
        abs(float(changed) - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5 + 0.02
    )  # four standard errors, and luck of few counts
    assert (seen <= whole).all() and torch.equal(thinned.x, whole)


@pytest.mark.parametrize("model", ["scanvi", "totalanvi"])
def test_the_encoder_sees_the_thinned_counts_and_the_likelihood_all(model):
    config = make_config(model)
    network, batch = make_network(config).eval(), make_batch(config)
    (thinned,) = step.augment([batch], config.n_genes, noise(), hide_proteins=0.0, thin_counts=0.99)
    fewer = batch._replace(x=thinned.seen.dense(batch.x))
    assert not torch.equal(fewer.x, batch.x)
    with torch.no_grad():
        ours, theirs = network.encode(thinned, Draws()), network.encode(fewer, Draws())
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-13, atol=1e-13)
        sparse = thinned._replace(x=None, entries=Entries.of(batch.x))
        torch.testing.assert_close(network.encode(sparse, Draws()).mean, ours.mean, rtol=1e-12, atol=1e-12)
        # given the same latent vector the bound explains every count
        rates = network.decode(ours.mean, thinned, Draws())[0]
        log_prob, all_counts = (network.rna.log_prob(part, rates, batch.log_library) for part in (thinned, batch))
        assert torch.equal(log_prob, all_counts)


def test_nothing_is_hidden_unless_asked():
    config = make_config("totalanvi")
    batch = make_batch(config)
    (same,) = step.augment([batch], config.n_genes, noise(), hide_proteins=0.0, thin_counts=0.0)
    assert same is batch


def test_room_for_entries_stays_empty():
    batch = alike(3, 50)
    row, column, count = batch.entries
    padded = Entries(*(torch.cat([part, part.new_zeros(9)]) for part in (row, column, count)))
    (thinned,) = step.augment([batch._replace(entries=padded)], 1, noise(), hide_proteins=0.0, thin_counts=0.9)
    assert len(thinned.seen.count) == 59 and not thinned.seen.count[50:].any()
