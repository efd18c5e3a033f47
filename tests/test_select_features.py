import numpy as np
import pytest

from anvi._data.select import find_features
from anvi._data.setup import Setup

SETUP = Setup(genes=("CD4", "CD8A", "MS4A1"), proteins=("CD3", "CD4"))


def test_all():
    wanted = find_features(SETUP)
    assert wanted.genes is None and wanted.proteins is None and wanted.asked is None
    assert wanted.gene_names == SETUP.genes and wanted.protein_names == SETUP.proteins


@pytest.mark.parametrize(("modality", "genes", "proteins"), [("rna", 3, 0), ("prot", 0, 2)])
def test_one_modality(modality, genes, proteins):
    wanted = find_features(SETUP, modality=modality)
    assert (len(wanted.gene_names), len(wanted.protein_names)) == (genes, proteins)
    assert wanted.has_genes == (genes > 0) and wanted.has_proteins == (proteins > 0)
    assert (wanted.proteins if genes else wanted.genes).size == 0


def test_some_in_any_order():
    wanted = find_features(SETUP, ["prot:CD4", "MS4A1", "CD3", "rna:CD4"])
    assert wanted.gene_names == ("MS4A1", "CD4") and wanted.genes.tolist() == [2, 0]
    assert wanted.protein_names == ("CD4", "CD3") and wanted.proteins.tolist() == [1, 0]
    joined = np.array([*wanted.gene_names, *wanted.protein_names])
    assert joined[wanted.order].tolist() == ["CD4", "MS4A1", "CD3", "CD4"]
    assert wanted.asked == ("prot:CD4", "MS4A1", "CD3", "rna:CD4")


def test_a_shared_name_is_clear_within_one_modality():
    assert find_features(SETUP, ["CD4"], "prot").proteins.tolist() == [1]


def test_a_colon_may_belong_to_the_name():
    assert find_features(Setup(genes=("HLA:A", "B")), ["HLA:A"]).genes.tolist() == [0]


@pytest.mark.parametrize(
    ("features", "modality", "error", "match"),
    [
        (["CD4"], None, ValueError, "'CD4' is in several modalities; write 'rna:CD4' or 'prot:CD4'"),
        (["CD8a"], None, KeyError, "no 'CD8a' in 'rna' or 'prot'. Did you mean 'CD8A'"),
        (["CD3"], "rna", KeyError, "no 'CD3' in 'rna'"),
        (["CD3", "prot:CD3"], None, ValueError, "'prot:CD3' twice"),
        ("CD3", None, TypeError, r"features=\['CD3'\]"),
        ([], None, ValueError, "empty"),
        (None, "atac", ValueError, "modality='atac' is not in the model; it has 'rna' and 'prot'"),
    ],
)
def test_errors(features, modality, error, match):
    with pytest.raises(error, match=match):
        find_features(SETUP, features, modality)


def test_an_rna_model_has_no_proteins():
    with pytest.raises(ValueError, match="modality='prot' is not in the model; it has 'rna'"):
        find_features(Setup(genes=("A",)), modality="prot")
