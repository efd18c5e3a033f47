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


KITS = Setup(
    genes=("GRCh38_CD3D", "MS4A1", "mm10_Cd3d"), proteins=("CD3_TotalSeqB", "CD4 (RPA-T4)", "CD4 (SK3)", "prot:CD19")
)


@pytest.mark.parametrize(
    ("name", "found"),
    {
        "CD3D": "GRCh38_CD3D",
        "rna:CD3D": "GRCh38_CD3D",
        "rna_MS4A1": "MS4A1",
        "GRCh38______MS4A1": "MS4A1",
        "gex:MS4A1": "MS4A1",
        "Cd3d": "mm10_Cd3d",
        "CD3": "CD3_TotalSeqB",
        "prot:CD3": "CD3_TotalSeqB",
        "ADT_CD3": "CD3_TotalSeqB",
        "anti-human CD3": "CD3_TotalSeqB",
        "CD3 (UCHT1)": "CD3_TotalSeqB",
        "CD4 (SK3)_TotalSeqC": "CD4 (SK3)",
        "CD19": "prot:CD19",
    }.items(),
)
def test_names_as_users_have_them(name, found):
    wanted = find_features(KITS, [name])
    assert wanted.gene_names + wanted.protein_names == (found,) and wanted.asked == (name,)


@pytest.mark.parametrize("name", ["CD3E", "MS4A1_TotalSeqB", "ms4a1", "prot:MS4A1", "rna:CD3", "CD20"])
def test_a_gene_is_not_answered_by_its_protein(name):
    """CD3E and MS4A1 are synonyms of the antibodies CD3 and CD20; of a gene that is not there nothing is known."""
    with pytest.raises(KeyError, match="the model has no"):
        find_features(KITS, [name])


def test_a_name_that_could_be_several_is_refused():
    with pytest.raises(ValueError, match=r"'CD4' could be several; write 'prot:CD4 \(RPA-T4\)' or 'prot:CD4 \(SK3\)'"):
        find_features(KITS, ["CD4"])
    both = Setup(genes=("GRCh38_CD4", "hg19_CD4"), proteins=("CD4_TotalSeqB",))
    with pytest.raises(ValueError, match="'rna:GRCh38_CD4' or 'rna:hg19_CD4' or 'prot:CD4_TotalSeqB'"):
        find_features(both, ["CD4"])
    with pytest.raises(ValueError, match="names 'CD3' twice"):
        find_features(KITS, ["CD3_TotalSeqB", "CD3"])
