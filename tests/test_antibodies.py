"""Names of antibodies: what a name says, which is which of another kit, and everything that reads them so."""

import logging
import os
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from helpers import cite, mudata_of, quiet_mudata
from mudata import MuData
from scipy import sparse

import anvi as av
from anvi._data import antibodies
from anvi._data.antibodies import TARGETS, match_antibodies, match_kits, read_antibody, split_targets

DATA = Path(os.environ.get("ANVI_DATA_DIR", ""))
needs_kits = pytest.mark.skipif(not (DATA / "kits").is_dir(), reason="ANVI_DATA_DIR has no kits")


def matched(query: list[str], model: list[str]) -> dict[str, str | None]:
    table = match_antibodies(query, model).set_index("name")["matched_to"]
    return table.to_dict()


# names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    """CD8a|cd8A|CD8A|CD 8a|CD8-a|CD8|CD8α|CD8alpha|CD8a_TotalSeqB|CD8a_TotalSeq-C|CD8a TotalSeq™-A|CD8a-TotalSeqD
    TotalSeq-B0046 CD8a|B0046_CD8a|prot:CD8a|prot_CD8a|adt_CD8a|ADT-CD8a|CITE_CD8a|AB_CD8a|CD8a:AB|CD8a_PROT|CD8a-ADT
    anti-human CD8a|anti-human/mouse CD8a|Anti-CD8a|Hu.CD8a|HuMs.CD8a|human CD8a|CD8a-GCTGCGCTTTCCATT
    CD8a_GCTGCGCTTTCCATT|Hu.CD8a_TotalSeqA|adt:anti-human CD8a_PROT|GRCh38_CD8a|GRCh38______CD8a|CSP_CD8a|CD8a_protein
    CD8a_TotalC|CD8a-TSB|CD8a_B0046|CD8a-A0046-GCTGCGCTTTCCATT|surface:CD8a|CD8a_surface|CD8a-human|CD8a (human)|hCD8a
    Ab-CD8a|CD8a_Ab|anti-human CD8a-TotalSeqC""".replace("\n", "|").split("|"),
)
def test_one_antibody_under_many_names(name):
    found = read_antibody(name.strip())
    assert (found.target, found.clone, found.isotype) == ("CD8", None, False)
    assert matched([name.strip()], ["CD4", "CD8a", "CD8b"])[name.strip()] == "CD8a"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("IL7Ralpha (CD127)", "CD127"),
        ("IL-7Rα", "CD127"),
        ("PD-1 (CD279)", "PD1"),
        ("PDCD1", "CD279"),
        ("C-kit (CD117)", "CD117"),
        ("B220 (CD45R)", "CD45R_B220"),
        ("MHCII (HLA-DR)", "HLA.DR"),
        ("CD26 (Adenosine)", "DPP4"),
        ("TCR α/β", "TCRab"),
        ("HLA-A,B,C", "HLA-ABC"),
        ("CD274_B7-H1", "PD-L1"),
        ("Ox40 (CD134)", "OX-40"),
        ("Lag3", "CD223 (lag3)"),
        ("EpCAM (CD326)", "CD326"),
        ("CD16", "FCGR3A"),
    ],
)
def test_synonyms(one, other):
    assert matched([one], [other]) == {one: other}
    assert matched([other], [one]) == {other: one}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("CD45RA", "CD45RO"),
        ("CD45RA", "CD45"),
        ("CD45R", "CD45RA"),
        ("CD8a", "CD8b"),
        ("CD1.1", "CD11"),  # digits do not run together
        ("CD4", "CD44"),
        ("IgM", "mouse IgM isotype control"),
        ("CD4", "anti-mouse CD4"),  # another species' protein
        ("CD16 (CD32)", "CD16"),  # says two targets
        ("TCRab", "TCRgd"),
        ("CD3", "CD3_CD19"),
        ("CD3 (UCHT1)", "CD3 (SK7)"),
        ("CD34 (581)", "CD34 (561)"),
        ("CD34-581", "CD34_561"),
        ("CD66b (6/40c)", "CD66b (G10F5)"),
        ("CD59 (p282)", "CD59 (MEM-43)"),
        ("CD3", "CD3 (mouse)"),
        ("CD4_mouse", "CD4"),
        ("CD19 [anti-mouse]", "CD19"),
        ("CD45 (rat)", "mouse CD45"),
        ("mouse IgG1", "rat IgG1"),
    ],
)
def test_what_is_not_the_same(one, other):
    assert matched([one], [other]) == {one: None}
    assert matched([other], [one]) == {other: None}


@pytest.mark.parametrize("name", ["Ms.CD4", "CD4 (mouse)", "CD4_mouse", "CD4-rat", "anti-mouse CD4-RM4.5"])
def test_the_species_of_an_antibody_may_stand_on_either_side(name):
    said = name.replace("rat", "mouse") if "rat" in name else name
    assert matched([said], ["anti-mouse CD4"]) == {said: "anti-mouse CD4"}
    assert ("rat" in name) == (matched([name], ["anti-mouse CD4"]) == {name: None})


@pytest.mark.parametrize(
    "name",
    ["\ufeffCD4", "CD\u200b4", "CD4\u2060", "aCD4", "αCD4", "CD4 Recombinant", "CD4_anti-human", "antihuman CD4"],
)
def test_what_no_eye_sees_makes_no_other_antibody(name):
    assert matched([name], ["CD4"]) == {name: "CD4"}


def test_marks_without_width_make_no_other_category():
    assert av._data.containers.as_name("\ufeffCD4 T\u200b") == "CD4 T"


@pytest.mark.parametrize(
    ("name", "clone"),
    [
        ("CD3 (UCHT1)", "UCHT1"),
        ("CD3 (581)", "581"),
        ("CD3_TS1/8", "TS1/8"),
        ("CD3 (6/40c)", "6/40c"),
        ("CD3 [UCHT1]", "UCHT1"),
        ("CD3 (clone UCHT1)", "UCHT1"),
        ("CD3 clone: UCHT1", "UCHT1"),
        ("Hu.CD3_UCHT1", "UCHT1"),
        ("CD3:UCHT1|CD3E|AHS0231|pAbO", "UCHT1"),
        ("CD3-2", "2"),
        ("CD3 (clone 2)", "2"),
    ],
)
def test_clones_are_taken_off_and_kept(name, clone):
    assert read_antibody(name)[2:4] == ("CD3", clone)
    assert matched([name], ["CD3"]) == {name: "CD3"}  # one side names no clone: nothing speaks against it


@pytest.mark.parametrize(
    "name", ["PD-1", "Siglec-8", "B7-H1", "LFA-3", "CD158e1", "HLA-A2", "BDCA-2", "CD49f", "TIM-3"]
)
def test_numbers_of_names_are_no_clones(name):
    assert read_antibody(name).clone is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("IgG1", "IgG1"),
        ("IgG2a-control", "IgG2a"),
        ("IgG1_control_TotalSeqC", "IgG1"),
        ("Mouse IgG2b, κ isotype Ctrl", "mouse IgG2b"),
        ("AB_Mouse_IgG1_K_Iso", "mouse IgG1"),
        ("Isotype_MOPC.21", "mouse IgG1"),
        ("Rat-IgG2b", "rat IgG2b"),
        ("Armenian Hamster IgG isotype control", "hamster IgG"),
    ],
)
def test_isotype_controls(name, shown):
    found = read_antibody(name)
    assert found.isotype and found.plain == shown


@pytest.mark.parametrize("name", ["IgM", "IgD", "anti-human IgM", "anti-human IgG1", "IgG Fc", "CD16", "Isoform-3"])
def test_targets_that_look_like_isotypes(name):
    assert not read_antibody(name).isotype


def test_isotypes_without_a_species_are_the_only_one_of_their_class():
    assert matched(["mouse IgG1"], ["IgG1-control"]) == {"mouse IgG1": "IgG1-control"}
    assert matched(["mouse IgG1", "rat IgG1"], ["IgG1"]) == {"mouse IgG1": None, "rat IgG1": None}


def test_no_name_in_the_table_stands_for_two_targets():
    names = [[name.strip() for name in entry.split(", ")] for entry in TARGETS.strip().replace("\n", ";").split(";")]
    assert len(names) > 150
    keys = [antibodies._key(name) for entry in names for name in dict.fromkeys(map(antibodies._key, entry))]
    assert len(keys) == len(set(keys)) and all(keys)
    for entry in names:
        for name in entry:
            found = read_antibody(name)
            assert (found.target, found.clone, found.isotype) == (entry[0], None, False), name
            assert found.plain == name


# matching ---------------------------------------------------------------------------------------------------------


def test_two_names_of_one_target_are_refused_by_name():
    table = match_antibodies(["PD-1 (CD279)", "PD1 (CD279)", "CD3"], ["CD3", "PD-1"]).set_index("name")
    assert table["matched_to"].to_dict() == {"PD-1 (CD279)": None, "PD1 (CD279)": None, "CD3": "CD3"}
    assert table["how"]["PD1 (CD279)"] == "ambiguous: 'PD-1 (CD279)', 'PD1 (CD279)' could all be 'PD-1'"
    table = match_antibodies(["CD8"], ["CD8a (SK1)", "CD8a (RPA-T8)"])
    assert table["how"][0] == "ambiguous: could be 'CD8a (SK1)', 'CD8a (RPA-T8)'"


def test_two_clones_of_one_target_stay_apart():
    pairs = {"CD3 (SK7)": "CD3_SK7", "CD3 (UCHT1)": "CD3_UCHT1"}
    assert matched(list(pairs), list(pairs.values())) == pairs
    assert matched(["CD3 (SK7)", "CD3 (UCHT1)"], ["CD3"]) == {"CD3 (SK7)": None, "CD3 (UCHT1)": None}
    table = match_antibodies(["CD3 (SK7)", "CD3 (OKT3)"], ["CD3 (SK7)"])
    assert list(table["matched_to"]) == ["CD3 (SK7)", None]
    assert table["how"][1] == "another name of 'CD3 (SK7)', which 'CD3 (SK7)' is already"
    assert match_antibodies(["CD3 (OKT3)"], ["CD3 (SK7)"])["how"][0] == "another clone than 'CD3 (SK7)'"


def test_the_same_name_comes_before_any_rule():
    assert matched(["CD8", "CD8a"], ["CD8a", "CD8"]) == {"CD8": "CD8", "CD8a": "CD8a"}
    assert matched(["CD8", "CD8a"], ["CD8a"]) == {"CD8": None, "CD8a": "CD8a"}
    assert matched(["p1", "P1"], ["P1"]) == {"p1": None, "P1": "P1"}


def test_never_two_onto_one():
    """Random kits of odd names: pairs are one to one, and the same from either side."""
    rng = np.random.default_rng(0)
    forms = ("{}", "{}_TotalSeqB", "prot:{}", "Hu.{}", "{} (X12)", "{} (Y34)", "anti-human {}", "{}:AB")
    bases = ["CD8", "CD8a", "PD-1", "CD279", "CD3", "cd3e", "Foo", "FOO", "IgG1", "IgG1-control", "mouse IgG1"]
    for _ in range(100):
        kits = []
        for _ in range(2):
            names = [form.format(base) for form in forms for base in bases]
            kits.append(list(rng.choice(names, 25, replace=False)))
        there, back = matched(*kits), matched(*kits[::-1])
        pairs = {(one, other) for one, other in there.items() if other}
        assert len({other for _, other in pairs}) == len(pairs)
        assert pairs == {(other, one) for one, other in back.items() if other}
        assert pairs


def test_empty_kits():
    assert match_antibodies([], ["CD3"]).shape == (0, 7)
    assert match_antibodies(["CD3"], [])["matched_to"].tolist() == [None]


def test_several_kits_take_the_first_name():
    found = match_kits(
        {"a": ["CD8a", "IgG1-control"], "b": ["CD8", "IgG1", "X_TotalSeqB"], "c": ["CD8A", "anti-human X"]}
    )
    assert list(found["new_name"]) == ["CD8a", "IgG1", "CD8a", "IgG1", "X", "CD8a", "X"]
    with pytest.raises(ValueError, match=r"harmonize calls 'CD8', 'CD8b' of 'b' all 'CD8a'; two clones need two names"):
        match_kits({"b": ["CD8", "CD8b"]}, {"CD8": "CD8a", "CD8b": "CD8a"})


# pp.panels --------------------------------------------------------------------------------------------------------


def two_kits(first: list[str], second: list[str], n: int = 6) -> tuple[MuData, np.ndarray]:
    """Cells of two kits in one object, NaN where a kit has no such column; and the counts of each cell's own kit."""
    counts = np.random.default_rng(1).poisson(5, (2 * n, len(first))).astype(np.float32) + 1
    cells = [f"c{i}" for i in range(2 * n)]
    columns = list(dict.fromkeys([*first, *second]))
    table = pd.DataFrame(np.nan, cells, columns, dtype=np.float32)
    table.iloc[:n, :] = pd.DataFrame(counts[:n], cells[:n], first).reindex(columns=columns)
    table.iloc[n:, :] = pd.DataFrame(counts[n:, : len(second)], cells[n:], second).reindex(columns=columns)
    prot = anndata.AnnData(table)
    prot.layers["twice"] = 2 * prot.X
    rna = anndata.AnnData(sparse.csr_matrix(np.ones((2 * n, 3), np.float32)), obs=pd.DataFrame(index=cells))
    mdata = mudata_of({"rna": rna, "prot": prot})
    mdata.obs["kit"] = pd.Categorical(["one"] * n + ["two"] * n)
    return mdata, counts


def test_columns_of_one_antibody_are_joined():
    mdata, counts = two_kits(["CD3", "CD8a", "IgG1-control"], ["anti-human CD3", "CD8_TotalSeqB", "IgG1"])
    shown = av.pp.panels(mdata, "kit", harmonize="show")
    assert list(shown.columns) == [
        *("kit", "name", "normalised", "target", "clone", "isotype", "matched_to", "how", "new_name"),
    ]
    assert mdata["prot"].n_vars == 6 and "measured" not in mdata["prot"].varm  # nothing written
    av.pp.panels(mdata, "kit", harmonize=True)
    prot = mdata["prot"]
    assert list(prot.var_names) == ["CD3", "CD8a", "IgG1"]
    np.testing.assert_array_equal(prot.X, counts)
    np.testing.assert_array_equal(prot.layers["twice"], 2 * counts)
    assert prot.varm["measured"].to_numpy().all()
    assert list(prot.var["original_names"]) == ["CD3; anti-human CD3", "CD8a; CD8_TotalSeqB", "IgG1-control; IgG1"]
    assert list(prot.var["isotype"]) == [False, False, True]
    assert list(mdata.var_names[-3:]) == ["CD3", "CD8a", "IgG1"]


@pytest.mark.parametrize("fill", ["nan", "zero", "sparse"])
def test_joined_objects_go_to_a_file_and_fit(tmp_path, fill):
    mdata = cite()
    names = list(mdata["prot"].var_names)
    half = (mdata.obs["batch"] == "batch_1").reindex(mdata["prot"].obs_names).to_numpy()
    counts, own = mdata["prot"].X.copy(), mdata["prot"].X
    twice = np.full((len(half), 40), np.nan if fill == "nan" else 0, np.float32)
    twice[~half, :20], twice[half, 20:] = counts[~half], counts[half]
    twice = twice if fill == "nan" else np.nan_to_num(twice)
    prot = anndata.AnnData(
        sparse.csr_matrix(twice) if fill == "sparse" else twice,
        obs=pd.DataFrame(index=mdata["prot"].obs_names),
        var=pd.DataFrame(index=[*names, *(f"{name}_TotalSeqC" for name in names)]),
    )
    joined = mudata_of({"rna": mdata["rna"], "prot": prot}, like=mdata)
    copy = av.pp.panels(joined, "batch", harmonize=True, copy=True)
    assert joined["prot"].n_vars == 40 and list(copy["prot"].var_names) == names
    assert sparse.issparse(copy["prot"].X) == (fill == "sparse")
    values = copy["prot"].X.toarray() if fill == "sparse" else copy["prot"].X
    np.testing.assert_array_equal(np.nan_to_num(values), np.nan_to_num(own))
    copy.write(tmp_path / "joined.h5mu")
    with quiet_mudata():
        back = mudata.read_h5mu(tmp_path / "joined.h5mu")
    if fill == "zero":
        return
    av.tl.totalvi(back, batch_key="batch", max_epochs=1)
    assert len(av.get.model(back).setup.proteins) == 20


def test_an_ambiguous_kit_is_refused_and_the_advice_works():
    mdata, counts = two_kits(["PD-1", "CD3"], ["PD-1 (CD279)", "PD1 (CD279)"])
    with pytest.raises(ValueError, match=r"'PD-1 \(CD279\)' of panel 'two' is ambiguous") as raised:
        av.pp.panels(mdata, "kit", harmonize=True)
    assert mdata["prot"].n_vars == 4
    advice = str(raised.value).rpartition("harmonize=")[2].removesuffix(".")
    av.pp.panels(mdata, "kit", harmonize=eval(advice))
    assert list(mdata["prot"].var_names) == ["PD-1", "CD3", "PD-1 (clone 2)"]
    np.testing.assert_array_equal(mdata["prot"][:, "PD-1"].X, counts[:, [0]])


def test_arguments_of_harmonize_are_checked():
    mdata, _ = two_kits(["CD3"], ["CD3"])
    with pytest.raises(TypeError, match="harmonize= takes True or False, or one of 'show', or a dict; got int: 3"):
        av.pp.panels(mdata, "kit", harmonize=3)
    with pytest.raises(KeyError, match="harmonize names proteins that are not there: 'CD33'"):
        av.pp.panels(mdata, "kit", harmonize={"CD33": "CD3"})


def test_one_kit_loses_its_affixes():
    mdata = cite()
    names = list(mdata["prot"].var_names)
    mdata["prot"].var_names = [f"{name}_TotalSeqB" for name in names]
    with quiet_mudata():
        mdata.update_var()
    av.pp.panels(mdata, harmonize=True)
    assert list(mdata["prot"].var_names) == names


def test_a_fit_and_a_check_tell_of_split_targets(caplog):
    mdata = cite()
    counts = mdata["prot"].X
    half = (mdata.obs["batch"] == "batch_1").reindex(mdata["prot"].obs_names).to_numpy()
    prot = anndata.AnnData(
        np.column_stack([np.where(half, np.nan, counts[:, 0]), np.where(half, counts[:, 0], np.nan), counts[:, 2]]),
        obs=pd.DataFrame(index=mdata["prot"].obs_names),
        var=pd.DataFrame(index=["CD8a", "CD8", "CD3"]),
    )
    split = mudata_of({"rna": mdata["rna"], "prot": prot}, like=mdata)
    text = "1 antibodies stand in two columns under two names"
    assert any(text in note for note in av.pp.check(split, batch_key="batch").notes)
    with caplog.at_level(logging.WARNING, "anvi"):
        av.tl.totalvi(split, batch_key="batch", max_epochs=1)
    assert text in caplog.text and "harmonize=True" in caplog.text
    av.pp.panels(split, "batch", harmonize=True)
    assert not any(text in note for note in av.pp.check(split, batch_key="batch").notes)


@needs_kits
@pytest.mark.data
def test_three_kits_are_reproduced_from_the_raw_ones():
    """The object that was harmonised by hand: PBMC 10k, MALT and ECCITE-seq; two pairs of clones need a word."""
    files = {
        "pbmc10k_totalseqB": DATA / "pbmc_citeseq.h5mu",
        "malt_totalseqB": DATA / "kits" / "malt_1k_17ab.h5mu",
        "eccite_ctrl": DATA / "kits" / "eccite_ctrl_500_49ab.h5mu",
    }
    parts = {"rna": {}, "prot": {}}
    with quiet_mudata():
        for kit, file in files.items():
            raw = mudata.read_h5mu(file)
            for mod in parts:
                part = raw[mod][raw["prot"].obs_names].copy()
                part.obs_names = kit + "_" + part.obs_names
                parts[mod][kit] = part
        rna = anndata.concat(parts["rna"], join="inner")
        prot = anndata.concat(parts["prot"], join="outer", fill_value=np.nan, label="kit")
        mdata, by_hand = MuData({"rna": rna, "prot": prot}), mudata.read_h5mu(DATA / "three_kits.h5mu")["prot"]
    with pytest.raises(ValueError, match=r"'PD-1 \(CD279\)', 'PD1 \(CD279\)' could all be 'PD-1'"):
        av.pp.panels(mdata, "kit", harmonize=True)
    clones = {"PD1 (CD279)": "PD-1 (clone 2)", "PD-L1 (CD274)": "PD-L1", "B7-H1 (PD-L1)": "PD-L1 (clone 2)"}
    av.pp.panels(mdata, "kit", harmonize=clones)
    prot = mdata["prot"]
    assert set(prot.var_names) == set(by_hand.var_names) and prot.n_vars == 53
    ours = prot[by_hand.obs_names, by_hand.var_names].X
    np.testing.assert_array_equal(ours, by_hand.X.toarray() if sparse.issparse(by_hand.X) else by_hand.X)
    assert prot.varm["measured"].sum().to_dict() == {"eccite_ctrl": 49, "malt_totalseqB": 17, "pbmc10k_totalseqB": 14}
    assert set(prot.var_names[prot.var["isotype"]]) == {"IgG1", "IgG2a", "IgG2b"}


# queries ----------------------------------------------------------------------------------------------------------

FORMS = {
    "suffix": "{}_TotalSeqB".format,
    "case": str.lower,
    "all but two": lambda name: name if name in ("P01", "P02") else f"adt_{name}",
}


@pytest.fixture(scope="module")
def reference():
    mdata = cite()
    reference = mdata[(mdata.obs["batch"] == "batch_0").to_numpy()].copy()
    with av.settings.override(progress=False, verbosity=0):
        av.tl.totalanvi(reference, max_epochs=2)
    return reference, mdata[(mdata.obs["batch"] == "batch_1").to_numpy()].copy()


def under(query: MuData, form) -> MuData:
    query = query.copy()
    query["prot"].var_names = [form(name) for name in query["prot"].var_names]
    with quiet_mudata():
        query.update_var()
    return query


@pytest.mark.parametrize("form", FORMS)
def test_a_query_of_another_convention_gives_the_same_answers(reference, form, caplog):
    fitted, query = reference
    expected, other = query.copy(), under(query, FORMS[form])
    model = av.get.model(fitted)
    with caplog.at_level(logging.WARNING, "anvi"):
        av.tl.predict(other, model=model)
    assert "under other names" in caplog.text
    av.tl.predict(expected, model=model)
    np.testing.assert_array_equal(other.obsm["totalanvi_proba"], expected.obsm["totalanvi_proba"])

    mapped, like = under(query, FORMS[form]), query.copy()
    for one in (mapped, like):
        av.tl.map_query(one, fitted, max_epochs=0)
        av.tl.denoise(one)
    np.testing.assert_array_equal(mapped.obsm["X_totalanvi"], like.obsm["X_totalanvi"])
    assert mapped.uns["totalanvi"]["reference"]["proteins_matched"] == 75  # panel_1 lacks a quarter
    # layers stand beside the query's own columns
    (layer,) = (name for name in mapped["prot"].layers if name)  # anndata 0.13 calls X the layer None
    np.testing.assert_array_equal(mapped["prot"].layers[layer], like["prot"].layers[layer])
    assert not np.isnan(mapped["prot"].layers[layer]).all(0).any()

    aligned = av.pp.align_query(under(query, FORMS[form]), fitted)
    assert list(aligned["prot"].var_names) == list(model.setup.proteins)
    assert list(aligned["prot"].var["original_names"]) == [FORMS[form](name) for name in model.setup.proteins]
    np.testing.assert_array_equal(aligned["prot"].X, query["prot"][aligned["prot"].obs_names].X)


def test_declared_panels_follow_the_names(reference):
    fitted, query = reference
    other = under(query, FORMS["suffix"])
    av.pp.panels(other, panels={"all": list(other["prot"].var_names[:5])})
    plain = query.copy()
    av.pp.panels(plain, panels={"all": list(plain["prot"].var_names[:5])})
    model = av.get.model(fitted)
    for one in (other, plain):
        av.tl.predict(one, model=model)
    np.testing.assert_array_equal(other.obsm["totalanvi_proba"], plain.obsm["totalanvi_proba"])


def test_few_of_the_models_proteins_are_a_warning(reference, caplog):
    fitted, query = reference
    strange = under(query, lambda name: name if name in ("P01", "P02") else f"marker {name}x")
    with caplog.at_level(logging.INFO, "anvi"):
        av.tl.predict(strange, model=av.get.model(fitted))
    (record,) = [record for record in caplog.records if "not measured" in record.message]
    assert record.levelno == logging.WARNING
    assert "18 of the model's 20 proteins" in record.message and "does not know marker P03x" in record.message


def test_ambiguous_proteins_of_a_query_count_as_missing(reference, caplog):
    fitted, query = reference
    twice = under(query, lambda name: {"P01": "P03_PROT", "P03": "P03:AB"}.get(name, name))
    with caplog.at_level(logging.WARNING, "anvi"):
        av.tl.predict(twice, model=av.get.model(fitted))
    assert "2 in mdata['prot'].X count as missing: 'P03_PROT' is ambiguous" in caplog.text


# proteins in obsm -------------------------------------------------------------------------------------------------


def in_obsm(mdata: MuData, columns=slice(None), *, named: bool = False):
    cells = mdata["prot"].obs_names
    adata = mdata["rna"][cells].copy()
    adata.obs["cell_type"] = mdata.obs["cell_type"].reindex(cells)
    values = np.nan_to_num(mdata["prot"].X)[:, columns]
    adata.obsm["adt"] = pd.DataFrame(values, cells, mdata["prot"].var_names[columns]) if named else values
    return adata


@pytest.fixture(scope="module")
def one_panel():
    return cite(n_batches=1, n_panels=1, rna_only_batch=False)


def fitted_in_obsm(adata):
    with av.settings.override(progress=False, verbosity=0):
        av.tl.totalanvi(adata, prot_obsm="adt", max_epochs=1)
    return av.get.model(adata)


def test_unnamed_arrays_are_taken_by_position_only_if_the_number_is_the_same(one_panel, caplog):
    unnamed, named = in_obsm(one_panel), in_obsm(one_panel, named=True)
    with caplog.at_level(logging.WARNING, "anvi"):
        av.tl.totalanvi(unnamed, prot_obsm="adt", max_epochs=1)
    assert "have no names: called protein_0, ...; name them: adata.uns['adt_names'] = [...]" in caplog.text
    by_name = fitted_in_obsm(named)
    for model in (av.get.model(unnamed), by_name):
        few = in_obsm(one_panel, slice(5, 20))
        for verb in (lambda: av.tl.predict(few, model=model), lambda: av.tl.map_query(few, model, max_epochs=0)):  # noqa: B023
            with pytest.raises(ValueError, match=r"obsm\['adt'\] has 15 columns without names.*cannot be told"):
                verb()
        assert not [slot for slot in few.obsm if slot != "adt"]
    same = in_obsm(one_panel)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "anvi"):
        av.tl.predict(same, model=by_name)
    assert "taken for the model's 20 by position" in caplog.text
    np.testing.assert_array_equal(same.obsm["totalanvi_proba"], named.obsm["totalanvi_proba"])
    few = in_obsm(one_panel, slice(5, 20))
    few.uns["adt_names"] = list(one_panel["prot"].var_names[5:])  # what the message says
    av.tl.predict(few, model=by_name)
    like = in_obsm(one_panel, slice(5, 20), named=True)
    av.tl.predict(like, model=by_name)
    np.testing.assert_array_equal(few.obsm["totalanvi_proba"], like.obsm["totalanvi_proba"])


def test_names_in_uns_where_others_keep_them(one_panel):
    adata = in_obsm(one_panel)
    adata.uns["protein_names"] = np.array(one_panel["prot"].var_names)
    assert fitted_in_obsm(adata).setup.proteins == tuple(one_panel["prot"].var_names)
    adata.uns["protein_names"] = ["CD3"]
    with pytest.raises(ValueError, match=r"adata.uns\['protein_names'\] has 1 names for 20 proteins"):
        av.tl.predict(adata, model="totalanvi")


def test_text_cells_are_named(one_panel):
    adata = in_obsm(one_panel, named=True)
    table = adata.obsm["adt"].astype(object)
    table.iloc[3, 4], table.iloc[5, 6] = "n/a", "nan"
    adata.obsm["adt"] = table
    with pytest.raises(
        ValueError, match=r"obsm\['adt'\] holds 'n/a', which is no number, at cell 'cell_00004', protein 'P05'"
    ):
        fitted_in_obsm(adata)
    assert not av.pp.check(adata, prot_obsm="adt").ok
    table.iloc[3, 4] = pd.NA
    assert len(fitted_in_obsm(adata).setup.proteins) == 20


# antibodies among genes -------------------------------------------------------------------------------------------


def mixed(mdata: MuData):
    """All features in one object, as `scanpy.read_10x_h5(gex_only=False)` gives them."""
    cells = mdata["prot"].obs_names
    parts = [mdata[mod][cells].copy() for mod in ("rna", "prot")]
    parts[1].X = sparse.csr_matrix(np.nan_to_num(parts[1].X))
    adata = anndata.concat(parts, axis="var")
    adata.var["feature_types"] = ["Gene Expression"] * parts[0].n_vars + ["Antibody Capture"] * parts[1].n_vars
    adata.obs["cell_type"] = mdata.obs["cell_type"].reindex(cells)
    return adata


@pytest.mark.parametrize("verb", ["scvi", "totalvi"])
def test_antibodies_among_genes_are_refused_and_the_remedy_works(one_panel, verb):
    adata = mixed(one_panel)
    with pytest.raises(
        ValueError, match=r"20 of the 80 features in data are no genes: data.var\['feature_types'\]"
    ) as said:
        getattr(av.tl, verb)(adata, max_epochs=1)
    report = av.pp.check(adata, labels_key=None)
    assert not report.ok and any("feature_types" in problem for problem in report.problems)
    names = {"adata": adata, "mudata": mudata}
    with quiet_mudata():
        exec(str(said.value).partition("Split them first: ")[2], names)
    assert av.pp.check(names["mdata"]).ok
    getattr(av.tl, verb)(names["mdata"], max_epochs=1)
    assert names["mdata"]["rna"].n_vars == 60 and names["mdata"]["prot"].n_vars == 20


@pytest.mark.parametrize("with_prot", [False, True])
def test_antibodies_in_the_rna_of_a_mudata(one_panel, with_prot):
    with quiet_mudata():
        mods = {"rna": mixed(one_panel)} | ({"prot": one_panel["prot"].copy()} if with_prot else {})
        mods["rna"].var_names = [*mods["rna"].var_names[:60], *(f"adt_{i}" for i in range(20))]
        mdata = MuData(mods)
        mdata.obs["global"] = "here"
        with pytest.raises(ValueError, match=r"20 of the 80 features in mdata\['rna'\] are no genes") as said:
            av.tl.scvi(mdata, max_epochs=1)
        exec(str(said.value).partition("Split them first: ")[2], {"mdata": mdata})
        assert mdata["rna"].n_vars == 60 and mdata["prot"].n_vars == 20 and set(mdata.obs["global"]) == {"here"}
        av.tl.totalvi(mdata, max_epochs=1)


def test_other_features_among_genes(one_panel):
    adata = mixed(one_panel)
    adata.var["feature_types"] = adata.var["feature_types"].replace("Antibody Capture", "CRISPR Guide Capture")
    with pytest.raises(ValueError, match="'CRISPR Guide Capture' of P01") as said:
        av.tl.scvi(adata, max_epochs=1)
    names = {"adata": adata}
    exec(str(said.value).partition("Split them first: ")[2], names)
    av.tl.scvi(names["adata"], max_epochs=1)
    adata.var["feature_types"] = "Peaks"  # nothing but peaks: the user's wish
    av.tl.scvi(adata, max_epochs=1)


@pytest.mark.parametrize("kind", ["CRISPR Guide Capture", "Multiplexing Capture", "Gene Expression"])
def test_other_features_among_proteins(one_panel, kind):
    mdata = one_panel.copy()
    mdata["prot"].var["feature_types"] = ["Antibody Capture"] * 15 + [kind] * 5
    with pytest.raises(
        ValueError, match=rf"5 of the 20 features in mdata\['prot'\] are no antibodies.*'{kind}'"
    ) as said:
        av.tl.totalvi(mdata, max_epochs=1)
    av.tl.totalvi(mdata.copy(), max_epochs=1, proteins=[f"P{i:02}" for i in range(1, 16)])  # they were not asked for
    with quiet_mudata():
        exec(str(said.value).partition("Leave them out first: ")[2], {"mdata": mdata})
    assert mdata["prot"].n_vars == 15
    av.tl.totalvi(mdata, max_epochs=1)
    mdata["prot"].var["feature_types"] = kind  # nothing else: the user's wish
    av.tl.totalvi(mdata, max_epochs=1)


def test_one_name_in_every_kit_is_no_pair_of_names():
    """Names that lose a word when they are compared (protein 1 is 1) are still the same name."""
    names = ["protein 1", "protein 2", "CD8", "CD8a"]
    assert split_targets(names[:2], ["a", "b"], [[True, True], [True, True]]) is None
    told = split_targets(names, ["a", "b"], [[True, True, True, False], [True, True, False, True]])
    assert told.startswith("1 antibodies stand in two columns") and "'CD8'" in told


def test_affixes_take_no_target_away():
    """Every name of the table is what it was, alone and with what kits put about it."""
    for entry in TARGETS.strip().replace("\n", ";").split(";"):
        names = [name.strip() for name in entry.split(", ")]
        for name in names:
            for form in ("{}", "prot:{}", "GRCh38_{}", "{}_TotalSeqC", "{}-human", "{}_protein", "{}_A0034"):
                assert read_antibody(form.format(name)).target == names[0], form.format(name)


def test_antibodies_that_may_be_several_are_to_be_named_before_others_are_joined():
    names = ["CD3 (UCHT1)", "CD3 (OKT3)", "CD8a", "CD3", "CD8"]
    found = split_targets(names, ["A", "B"], [[True, True, True, False, False], [False, False, False, True, True]])
    assert "'CD8' of 'B' is 'CD8a'" in found
    assert "'CD3' may be several: pp.panels(mdata, panel_key, harmonize={name: ...})" in found
