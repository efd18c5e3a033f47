import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from anvi._data import counts as counts_module
from anvi._data.counts import check_counts, check_no_empty_cells, looks_like_counts

CELLS, FEATURES = ["c0", "c1", "c2"], ["g0", "g1", "g2", "g3"]
COUNTS = np.array([[0, 3, 0, 1], [2, 0, 0, 0], [0, 0, 7, 5]], dtype=np.float32)


def check(counts, **options):
    check_counts(counts, CELLS, FEATURES, "data.X", options.pop("adata", None), **options)


def spoilt(value: float, *places: tuple[int, int]) -> np.ndarray:
    counts = COUNTS.copy()
    for place in places:
        counts[place] = value
    return counts


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
class TestForms:
    def test_counts_pass(self, form):
        check(form(COUNTS))
        check(form(np.zeros((3, 4))))

    @pytest.mark.parametrize(
        ("value", "kind"),
        [(-1, "negative"), (np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite"), (1.5, "non-int")],
    )
    def test_first_offence_is_named(self, form, value, kind):
        with pytest.raises(ValueError, match=rf"data\.X holds {kind}.* at cell 'c1', feature 'g2', and 1 more"):
            check(form(spoilt(value, (1, 2), (2, 0))))

    def test_worst_kind_comes_first(self, form):
        counts = spoilt(0.5, (0, 0))
        counts[2, 3] = np.nan
        with pytest.raises(ValueError, match="NaN values.*cell 'c2', feature 'g3', and 0 more"):
            check(form(counts))

    def test_missing_is_allowed_for_proteins_but_nothing_else_is(self, form):
        check(form(spoilt(np.nan, (0, 0), (1, 1))), missing_allowed=True)
        for value in (-1, np.inf, 0.5):
            with pytest.raises(ValueError, match="raw counts are expected"):
                check(form(spoilt(value, (1, 1))), missing_allowed=True)

    def test_layer_with_counts_is_suggested(self, form):
        adata = AnnData(np.log1p(COUNTS), layers={"scaled": np.log1p(COUNTS), "raw": form(COUNTS)})
        with pytest.raises(ValueError, match="non-integer.*pass layer='raw'"):
            check(form(np.log1p(COUNTS)), adata=adata)
        del adata.layers["raw"]
        with pytest.raises(ValueError, match="They look like logarithms"):
            check(form(np.log1p(COUNTS)), adata=adata)


def test_looks_like_counts():
    assert looks_like_counts(COUNTS) and looks_like_counts(sparse.csr_matrix(COUNTS))
    for value in (-1, np.nan, np.inf, 0.5):
        assert not looks_like_counts(spoilt(value, (1, 1)))
    assert not looks_like_counts(np.zeros((0, 4)))
    assert looks_like_counts(spoilt(np.nan, (1, 1)), missing_allowed=True)


def test_empty_cells_are_counted_and_three_are_named():
    check_no_empty_cells(np.ones(3), CELLS, "data.X")
    with pytest.raises(ValueError, match=r"1 cells without a single count \('c1'\)"):
        check_no_empty_cells(np.array([1, 0, 2]), CELLS, "data.X")
    with pytest.raises(ValueError, match=r"5 cells without a single count \('c0', 'c1', 'c2', \.\.\.\)"):
        check_no_empty_cells(np.zeros(5), [f"c{i}" for i in range(5)], "data.X")


def test_the_check_needs_little_memory_beside_the_counts():
    import tracemalloc

    values = np.ones((20_000, 1_000), dtype=np.float32)  # 80 MB
    tracemalloc.start()
    check_counts(values, None, None, "X", None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes / 2


def test_offences_are_counted_over_all_blocks(monkeypatch):
    monkeypatch.setattr(counts_module, "BLOCK", 3)
    values = np.ones((4, 5))
    values[1, 1], values[2, 4], values[3, 0] = 0.5, -1, -2
    names = list("abcd"), list("vwxyz")
    with pytest.raises(ValueError, match=r"negative values .* -1.0 at cell 'c', feature 'z', and 1 more"):
        check_counts(values, *names, "X", None)
