"""Grad-CAM on the nets of the package: refusals, traces left behind, and the two published backbones."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch

from brainmets.explain.gradcam import Fields, captured, cell_fields, grad_cam, overlay, replaced_features, stack_maps, tiled_fields
from brainmets.models.hybrid import HybridNet, hybrid_config
from brainmets.samples.pictures import SliceGrid
from brainmets.tables import DataError

torch.set_num_threads(1)
NETS = {"quick": {}, "efficientnet": {"backbone": "efficientnet_b0"}, "four channels": {"in_channels": 4}, "attention": {"fusion": "attention"}, "image only": {"inputs": "image"}}


def inputs(n=3, channels=1, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, channels, size, size, generator=generator), torch.randn(n, 3, generator=generator)


@pytest.fixture(scope="module")
def nets(): return {name: HybridNet(hybrid_config("quick", n_tabular=3, **changes)) for name, changes in NETS.items()}


def n_hooks(net): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


@pytest.mark.parametrize("name", NETS)
def test_the_net_stays_as_it_was(nets, name):
    net = copy.deepcopy(nets[name]).train()
    net.head.eval()
    net.head[0].weight.requires_grad_(False)
    image, tabular = inputs(channels=net.config.in_channels)
    torch.manual_seed(5)
    net(image, tabular).sum().backward()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    gradients = {k: None if p.grad is None else p.grad.clone() for k, p in net.named_parameters()}
    modes, asked, hooks, drawn = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()], n_hooks(net), torch.get_rng_state()
    with torch.no_grad(): cam = grad_cam(net, image, tabular, "negative_output")
    assert cam.maps.shape == (3, 64, 64) and cam.fields == Fields((32.0, 32.0), (0.0, 0.0)) and np.isfinite(cam.maps).all() and (0 <= cam.maps).all()
    assert set(cam.maps.max((1, 2)).tolist()) <= {0.0, 1.0} and (cam.is_empty == (cam.maps.max((1, 2)) == 0)).all()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert all((p.grad is None) == (gradients[k] is None) and (p.grad is None or torch.equal(p.grad, gradients[k])) for k, p in net.named_parameters())
    assert [m.training for m in net.modules()] == modes and [p.requires_grad for p in net.parameters()] == asked and n_hooks(net) == hooks
    assert torch.equal(torch.get_rng_state(), drawn) and "forward_features" not in vars(net.image_encoder)


@pytest.mark.parametrize("name", NETS)
def test_a_map_is_the_slope_along_the_features(nets, name):
    "The mean of the signed cells is the slope of the output when the features grow in proportion, where all places of a channel pull alike."
    net = copy.deepcopy(nets[name]).double().eval()
    image, tabular = (a.double() for a in inputs(1, net.config.in_channels))
    with torch.no_grad():
        maps = net.feature_maps(image)
        even = maps.mean((2, 3), keepdim=True).expand_as(maps)     # all places alike: the map has one value
    def output(scale):
        with torch.no_grad(), replaced_features(net, lambda original, x: even*scale): return float(net(image, tabular))
    class Even(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.num_features = net.image_encoder, maps.shape[1]
        def forward_features(self, x): return even
        def forward_head(self, x): return self.encoder.forward_head(x)
    slope, evened = (output(1 + 1e-6) - output(1 - 1e-6))/2e-6, copy.copy(net)
    evened._modules = {**net._modules, "image_encoder": Even()}
    cam = grad_cam(evened, image, tabular, signed=True, fields=tiled_fields((64, 64), (2, 2)))
    np.testing.assert_allclose(cam.raw*maps[0, 0].numel(), np.full((1, 64, 64), slope), rtol=1e-5)


def test_no_trace_after_an_exception(nets):
    net = nets["quick"].train()
    hooks, (image, tabular) = n_hooks(net), inputs()
    def broken(output): raise RuntimeError("stop")
    for layer in (None, "layer3"):
        with pytest.raises(RuntimeError, match="stop"): grad_cam(net, image, tabular, broken, layer)
        with pytest.raises(RuntimeError, match="stop"):
            with captured(net, layer): broken(0)
        with pytest.raises(DataError): grad_cam(net, image[:, :, :, :40].repeat(1, 2, 1, 1), tabular, layer=layer)
    with pytest.raises(RuntimeError): cell_fields(net, torch.randn(1, 7, 64, 64))     # 7 channels, in the middle of the trace
    assert n_hooks(net) == hooks and "forward_features" not in vars(net.image_encoder) and net.training


def test_an_own_forward_features_comes_back(nets):
    net = copy.deepcopy(nets["quick"]).eval()
    original = net.image_encoder.forward_features
    own = net.image_encoder.forward_features = lambda x: original(x)
    grad_cam(net, *inputs())
    assert net.image_encoder.forward_features is own


def test_refusals(nets):
    net, (image, tabular) = nets["quick"].eval(), inputs()
    with pytest.raises(DataError, match="no image_encoder"): grad_cam(HybridNet(hybrid_config("quick", n_tabular=3, inputs="tabular")), image, tabular)
    with pytest.raises(DataError, match="at least one row"): grad_cam(net, image[:0], tabular[:0])
    with pytest.raises(DataError, match="at least one row"): grad_cam(net, image, tabular[:2])
    with pytest.raises(DataError, match="at least one row"): grad_cam(net, image[0], tabular)
    with pytest.raises(DataError, match="negative_output"): grad_cam(net, image, tabular, "risk")
    with pytest.raises(DataError, match="did you mean 'layer4'"): grad_cam(net, image, tabular, layer="layer5")
    with pytest.raises(DataError, match="row 1"): grad_cam(net, torch.where(torch.arange(3)[:, None, None, None] == 1, torch.nan, image), tabular)
    with pytest.raises(DataError, match="does not depend on the image"): grad_cam(net, image, tabular, lambda output: torch.zeros(3, requires_grad=True))
    with pytest.raises(DataError, match="equal shapes"): overlay(np.zeros((2, 8, 8)), np.zeros((3, 8, 8)))


def test_stack_refuses_and_keeps_one_scale(nets):
    cam = grad_cam(nets["quick"].eval(), *inputs())
    grid = SliceGrid((64, 64, 5), tuple(map(tuple, np.eye(4).tolist())), (0, 64, 0, 64))
    rows = pd.DataFrame({"scan_id": "a", "slice_index": [4, 0, 2]})
    volume = stack_maps(cam, rows, grid)
    assert not volume[:, :, [1, 3]].any() and volume.max() == 1
    np.testing.assert_allclose(volume.max((0, 1))[[4, 0, 2]], cam.scale/cam.scale.max(), rtol=1e-5)
    np.testing.assert_array_equal(volume[::-1, ::-1, 4].T, (cam.raw[0]/cam.raw.max()).astype(np.float32))
    with pytest.raises(DataError, match="one row for each map"): stack_maps(cam, rows[:2], grid)
    with pytest.raises(DataError, match="Expected one"): stack_maps(cam, rows.assign(scan_id=["a", "b", "c"]), grid)
    with pytest.raises(DataError, match="slice_index"): stack_maps(cam, rows[["scan_id"]], grid)
