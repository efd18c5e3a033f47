"""Tensors of scvi-tools as weights of ours: none is lost, none is left over."""

import numpy as np
import pytest
import torch
from checkpoints import CHECKPOINTS, NAMES, content_of, saved, state

import anvi as av
from anvi.io import from_scvi_tools
from anvi.io._scvi_tools import map_weights
from anvi.nn import Draws


def test_sizes_come_from_the_tensors(tmp_path):
    content = content_of("scanvi")
    content["attr_dict"]["init_params_"]["non_kwargs"] |= {"n_hidden": 999, "n_latent": 999, "n_layers": 999}
    content["attr_dict"]["init_params_"]["kwargs"]["model_kwargs"] = {"encode_covariates": False}
    config = from_scvi_tools(saved(content, tmp_path)).config
    assert (config.n_hidden, config.n_latent, config.n_layers_encoder, config.n_layers_decoder) == (8, 4, 2, 2)
    assert config.encode_covariates
    assert config == from_scvi_tools(CHECKPOINTS / "scanvi").config


def test_before_1_3_1_there_is_no_efficiency(tmp_path):
    content = content_of("totalvi")
    given = torch.arange(18.0).view(6, 3)
    content["model_state_dict"]["log_per_batch_efficiency"] = given
    assert torch.equal(from_scvi_tools(saved(content, tmp_path)).network.protein.log_efficiency, given.T)
    del content["model_state_dict"]["log_per_batch_efficiency"]
    assert not from_scvi_tools(saved(content, tmp_path)).network.protein.log_efficiency.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_left_over_or_missing_tensor_is_named(tmp_path, name):
    content = content_of(name)
    content["model_state_dict"]["extra.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"no place in a .* model of this configuration: extra\.weight\."):
        from_scvi_tools(saved(content, tmp_path))
    content = content_of(name)
    del content["model_state_dict"]["decoder.px_decoder.fc_layers.Layer 0.1.running_var"]
    with pytest.raises(ValueError, match=r"lacks tensors: decoder\.px_decoder\.fc_layers\.Layer 0\.1\.running_var\."):
        from_scvi_tools(saved(content, tmp_path))


def test_every_tensor_that_has_an_influence_is_needed():
    content = content_of("totalanvi")
    config = from_scvi_tools(CHECKPOINTS / "totalanvi").config
    tensors = {key: value for key, value in content["model_state_dict"].items() if isinstance(value, torch.Tensor)}
    unused = ("encoder.l_gene_", "decoder.px_dropout_decoder_gene.", "log_per_batch_efficiency")
    for key in tensors:
        fewer = {other: value for other, value in tensors.items() if other != key}
        if key.startswith(unused) or key.endswith("num_batches_tracked"):
            map_weights(fewer, config)
        else:
            with pytest.raises(ValueError, match="lacks tensors: "):
                map_weights(fewer, config)


def test_arrays_and_tensors_are_mapped_alike_and_copied():
    config = from_scvi_tools(CHECKPOINTS / "scanvi").config
    tensors = {
        key: value for key, value in content_of("scanvi")["model_state_dict"].items() if key != "pyro_param_store"
    }
    one, other = map_weights(tensors, config), map_weights({key: v.numpy() for key, v in tensors.items()}, config)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    tensors["px_r"].zero_()
    assert one["rna.log_theta"].any()


def test_a_tensor_of_another_shape_is_named(tmp_path):
    content = content_of("scvi")
    content["model_state_dict"]["px_r"] = torch.zeros(21)
    with pytest.raises(ValueError, match=r"'px_r' has the shape \(21,\)"):
        from_scvi_tools(saved(content, tmp_path))


def test_batches_that_do_not_go_with_the_tensors_are_refused(tmp_path):
    content = content_of("scvi")
    state(content, "batch")["categorical_mapping"] = np.array(["a", "b", "c", "d"], dtype=object)
    with pytest.raises(ValueError, match="ask for 4 columns in the decoder, which has 3"):
        from_scvi_tools(saved(content, tmp_path))


def test_a_single_class_has_no_column_in_scvi_tools():
    config = from_scvi_tools(CHECKPOINTS / "scanvi").config
    one = type(config)(**{**config.__dict__, "n_labels": 1}).checked()
    tensors = {
        key: value for key, value in content_of("scanvi")["model_state_dict"].items() if key != "pyro_param_store"
    }
    for key in ("classifier.classifier.1.weight", "classifier.classifier.1.bias"):
        tensors[key] = tensors[key][:1]
    tensors["y_prior"] = torch.ones(1, 1)
    for key in tensors:
        if key.startswith(("encoder_z2_z1.encoder", "decoder_z1_z2.decoder")) and tensors[key].dim() == 2:
            tensors[key] = tensors[key][:, :-3]
    mapped = map_weights(tensors, one)
    network = av.nn.VAE(one).eval()
    network.load_state_dict(mapped)
    assert not network.labels.encode_u.stack.linear[0].covariates.any()
    assert torch.isfinite(network.labels.classify(torch.zeros(2, one.n_latent), Draws())).all()
