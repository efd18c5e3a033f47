"""What a scvi-tools model says of its data and of itself, by the letter."""

import numpy as np
import pytest
from checkpoints import CHECKPOINTS, content_of, data_of, expected, registry, saved, state

import anvi as av
from anvi.io import from_scvi_tools


def test_categories_keep_the_order_of_the_checkpoint(tmp_path):
    content = content_of("scvi")
    state(content, "batch")["categorical_mapping"] = np.array(["z", "a", "m"], dtype=object)
    assert from_scvi_tools(saved(content, tmp_path)).setup.batches == ("z", "a", "m")


@pytest.mark.parametrize(
    "values, names",
    [
        (np.array([3, 1, 2]), ("3", "1", "2")),
        (np.array([1.0, 2.0, 0.0]), ("1", "2", "0")),
        (np.array([0.5, 1.0, 2.0]), ("0.5", "1.0", "2.0")),
        (np.array([True, False, None], dtype=object), None),
        (["x", "y", "z"], ("x", "y", "z")),
        (np.array(["u", "v", "w"]), ("u", "v", "w")),
    ],
    ids=["int", "whole", "float", "none", "list", "str"],
)
def test_names_become_text_as_those_of_the_users_columns_do(tmp_path, values, names):
    content = content_of("scvi")
    state(content, "batch")["categorical_mapping"] = values
    if names is None:
        with pytest.raises(ValueError, match="neither text nor numbers"):
            from_scvi_tools(saved(content, tmp_path))
    else:
        assert from_scvi_tools(saved(content, tmp_path)).setup.batches == names


@pytest.mark.parametrize("per_modality", [False, True])
def test_names_of_genes_beside_the_registry(tmp_path, per_modality):
    content = content_of("totalvi")
    names = state(content, "X").pop("column_names")
    if not per_modality:
        content["var_names"] = names
    assert from_scvi_tools(saved(content, tmp_path)).setup.genes == tuple(names)
    content["var_names"] = None
    with pytest.raises(ValueError, match="lacks the names of its genes"):
        from_scvi_tools(saved(content, tmp_path))


def test_proteins_without_names_are_numbered(tmp_path):
    content = content_of("totalvi_anndata")
    state(content, "proteins")["column_names"] = np.arange(6)
    path = saved(content, tmp_path)
    data, there = data_of("totalvi_anndata"), expected("totalvi_anndata")
    data.obsm["adt"] = data.obsm["adt"].to_numpy()
    model = from_scvi_tools(path, data)
    assert model.setup.proteins[:2] == ("protein_0", "protein_1")
    latent = av.tl.latent(data, model=model, inplace=False)
    np.testing.assert_allclose(latent, there["latent_mean"], rtol=0, atol=1e-5)


def test_places_of_counts_and_columns(tmp_path):
    content = content_of("totalanvi")
    fields = registry(content)["field_registries"]
    fields["X"]["data_registry"] = {"attr_name": "layers", "attr_key": "raw", "mod_key": "gex"}
    fields["proteins"]["data_registry"] = {"attr_name": "layers", "attr_key": "counts", "mod_key": "adt"}
    fields["batch"]["data_registry"]["mod_key"] = "third"
    fields["labels"]["data_registry"]["mod_key"] = None
    setup = from_scvi_tools(saved(content, tmp_path)).setup
    assert (setup.rna_mod, setup.rna_layer, setup.prot_mod, setup.prot_layer) == ("gex", "raw", "adt", "counts")
    assert (setup.batch_key, setup.labels_key) == ("third:batch", "cell_type")


def test_panels_of_their_own(tmp_path):
    content = content_of("totalvi")
    mapping = np.array(["big", "small", "old"], dtype=object)
    registry(content)["field_registries"]["panel"] = {
        "data_registry": {"attr_name": "obs", "attr_key": "_scvi_panel"},
        "state_registry": {"categorical_mapping": mapping, "original_key": "kit"},
    }
    setup = from_scvi_tools(saved(content, tmp_path)).setup
    assert (setup.panel_key, setup.panels, setup.batch_key) == ("kit", ("big", "small", "old"), "batch")


def test_missing_proteins_may_be_overridden_and_a_batch_may_lack_a_mask(tmp_path):
    content = content_of("totalvi")
    del state(content, "proteins")["protein_batch_mask"]["2"]
    assert from_scvi_tools(saved(content, tmp_path)).setup.measured[2] == (True,) * 6
    content = content_of("totalvi")
    content["attr_dict"]["init_params_"]["non_kwargs"]["override_missing_proteins"] = True
    assert from_scvi_tools(saved(content, tmp_path)).setup.measured == ((True,) * 6,) * 3
    content = content_of("totalvi")
    state(content, "proteins")["protein_batch_mask"]["2"] = np.array([True])
    with pytest.raises(ValueError, match="protein_batch_mask is not as long"):
        from_scvi_tools(saved(content, tmp_path))


def test_arguments_of_old_files_are_flat(tmp_path):
    content = content_of("totalvi")
    given = content["attr_dict"]["init_params_"]
    content["attr_dict"]["init_params_"] = {
        **given["non_kwargs"],
        "use_cuda": True,
        "model_kwargs": {**given["kwargs"]["model_kwargs"], "dropout_rate_encoder": 0.35},
    }
    config = from_scvi_tools(saved(content, tmp_path)).config
    assert (config.dropout_encoder, config.dropout_decoder, config.gene_likelihood) == (0.35, 0.2, "nb")


def test_more_classes_than_names_are_refused(tmp_path):
    content = content_of("scanvi")
    state(content, "labels")["categorical_mapping"] = np.array(["a", "b"], dtype=object)
    with pytest.raises(ValueError, match="3 classes, but only 2 label names"):
        from_scvi_tools(saved(content, tmp_path))


@pytest.mark.parametrize(
    "option, message",
    [
        ({"batch_representation": "embedding"}, "batch_representation='embedding'"),
        (
            {"extra_encoder_kwargs": {"use_activation": False}},
            "arguments that anvi does not have: extra_encoder_kwargs",
        ),
        ({"extra_decoder_kwargs": {"bias": False}}, "arguments that anvi does not have: bias"),
        ({"classifier_parameters": {"activation_fn": "x"}}, "arguments that anvi does not have: activation_fn"),
        ({"wings": 2}, "arguments that anvi does not have: wings"),
        ({"latent_distribution": "ln"}, "not built: latent_distribution='ln' with labels"),
        ({"classifier_parameters": {"n_layers": 1}}, None),
    ],
    ids=str,
)
def test_arguments_that_change_the_mathematics_are_refused(tmp_path, option, message):
    content = content_of("scanvi")
    content["attr_dict"]["init_params_"]["kwargs"]["model_kwargs"] |= option
    path = saved(content, tmp_path)
    if message is None:
        assert from_scvi_tools(path).name == "scanvi"
    else:
        with pytest.raises(ValueError, match=message):
            from_scvi_tools(path)


@pytest.mark.parametrize(
    "field, value",
    [
        *(("init_params_", value) for value in (None, {}, {"kwargs": 3, "non_kwargs": 4})),
        *(("registry_", value) for value in (None, {}, [1])),
        *(("field_registries", value) for value in (None, {}, {"X": 3}, {"X": {"state_registry": [1]}})),
        *(("scvi_version", value) for value in (None, "new", 3)),
    ],
    ids=str,
)
def test_nonsense_in_place_of_a_part_is_a_value_error(tmp_path, field, value):
    content = content_of("totalanvi")
    (content["attr_dict"] if field in ("init_params_", "registry_") else registry(content))[field] = value
    with pytest.raises(ValueError, match=r"model\.pt"):
        from_scvi_tools(saved(content, tmp_path))


def test_the_setup_says_what_the_registry_says():
    scanvi = from_scvi_tools(CHECKPOINTS / "scanvi").setup
    assert scanvi.genes == tuple(f"gene{i}" for i in range(20))
    assert (scanvi.batch_key, scanvi.batches) == ("batch", ("batch0", "batch1", "batch2"))
    assert scanvi.classes == ("B cell", "T cell", "NK cell")  # "Missing" changed places with the last one
    assert (scanvi.labels_key, scanvi.unlabeled_category) == ("cell_type", "Missing")
    assert scanvi.categorical == (("sex", ("female", "male")), ("donor", ("donor0", "donor1", "donor2")))
    assert scanvi.continuous == ("age", "depth")
    assert (scanvi.size_factor_key, scanvi.rna_layer, scanvi.proteins) == (None, None, ())
    joint = from_scvi_tools(CHECKPOINTS / "totalanvi").setup
    assert (joint.rna_mod, joint.prot_mod, joint.prot_obsm, joint.panel_key) == ("rna", "protein", None, None)
    assert joint.panels == joint.batches
    assert joint.measured == ((True,) * 6, (True,) * 6, (True,) * 4 + (False,) * 2)
    anndata = from_scvi_tools(CHECKPOINTS / "totalvi_anndata").setup
    assert anndata.prot_obsm == "adt"
    assert (anndata.labels_key, anndata.classes) == (None, ())
    assert from_scvi_tools(CHECKPOINTS / "scvi").setup.labels_key is None
