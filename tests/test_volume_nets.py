"""The nets to compare with, at the published size, against their makers' own, through the one training loop."""
import resource
import time

import numpy as np
import pytest
import torch
from monai.networks.nets import DenseNet121, resnet18, resnet34
from safetensors.torch import save_file
from torch import nn

from brainmets.losses import CoxLoss
from brainmets.models.volume_nets import (VOLUME_NETS, ConvConfig, ConvNet, TransRPConfig, TransRPNet, load_volume_net, make_volume_net, net_facts, save_volume_net, volume_net_facts)
from brainmets.tables import DataError, write_json
from brainmets.train.learner import TrainConfig, fit_member, predict

torch.set_num_threads(1)
SEE_IMAGES = [name for name in VOLUME_NETS if name not in ("vit", "deepsurv")]  # the ViT has tests of its own
MILLION = {"resnet18": 33.3, "resnet34": 63.6, "densenet121": 11.4, "transrp": 119.0}


def small(name, **changes):
    if name == "deepsurv": return make_volume_net(name, n_clinical=3, **changes)
    return make_volume_net(name, "quick", n_clinical=3, image_size=(32, 32, 32), in_channels=2, **({} if name == "vit" else {"width": 0.125}), **changes)


@pytest.mark.parametrize("name", SEE_IMAGES)
def test_published_size_forward_and_backward(name):
    generator, net = torch.Generator().manual_seed(0), make_volume_net(name).train()
    image, clinical = torch.randn(1, 3, 96, 128, 112, generator=generator), torch.randn(1, 27, generator=generator)
    began = time.time()
    risk = net(image, clinical)
    risk.square().sum().backward()
    seconds, memory = time.time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    assert risk.shape == (1, 1) and all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert all(p.grad.any() for p in net.image_encoder.parameters() if p.ndim > 1)
    n = sum(p.numel() for p in net.parameters())
    assert round(n/1e6, 1) == MILLION[name]
    print(f"{name}: {n/1e6:.1f} million, forward and backward of one {seconds:.1f} s on one thread, memory so far {memory:.1f} GiB")


@pytest.mark.parametrize("name, theirs", [("resnet18", resnet18), ("resnet34", resnet34), ("densenet121", DenseNet121)])
def test_maps_are_those_of_monai(name, theirs):
    "With the same weights the same vector before the head, in eval and in training."
    net = ConvNet(ConvConfig(name, (64, 48, 32), 2, 0), seed=1)
    twin = theirs(3, 2, 1) if name == "densenet121" else theirs(pretrained=False, n_input_channels=2, feed_forward=False, conv1_t_stride=2, bias_downsample=False)
    encoder = twin.features if name == "densenet121" else twin
    encoder.load_state_dict(net.image_encoder.state_dict(), strict=True)
    if name == "densenet121": twin.class_layers.out = nn.Identity()
    image = torch.randn(3, 2, 64, 48, 32, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        net.train(mode), twin.train(mode)
        with torch.no_grad():
            maps, vector = net.feature_maps(image), twin(image)  # once each: a pass in training moves the running means
            torch.testing.assert_close(maps.mean((2, 3, 4)), vector, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(net.from_maps(maps), net.head(vector, None), rtol=1e-4, atol=1e-5)


def test_transrp_is_a_resnet_before_pytorchs_transformer():
    "Built a second time from MONAI's ResNet18 and PyTorch's encoder, with the same weights: the same tokens."
    config = TransRPConfig((48, 64, 32), 2, 0, hidden=24, layers=3, heads=4, mlp=40, width=0.125)
    net = TransRPNet(config, seed=1).eval()
    ours = net.image_encoder
    cnn = resnet18(pretrained=False, n_input_channels=2, feed_forward=False, conv1_t_stride=2, bias_downsample=False, widen_factor=0.125)
    cnn.load_state_dict(ours.cnn.state_dict(), strict=True)
    cnn.layer4[0].conv1.stride = cnn.layer4[0].downsample[0].stride = (1, 1, 1)
    layer = nn.TransformerEncoderLayer(24, 4, 40, 0.0, "gelu", batch_first=True, norm_first=True)
    transformer = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(24), enable_nested_tensor=False)
    names = {"attention.qkv.weight": "self_attn.in_proj_weight", "attention.out": "self_attn.out_proj", "norm_attention": "norm1", "norm_mlp": "norm2", "mlp.0": "linear1", "mlp.3": "linear2"}
    state = {f"layers.{k}.self_attn.in_proj_bias": torch.zeros(72) for k in range(3)}
    for key, value in ours.state_dict().items():
        if not key.startswith(("layers.", "norm.")): continue
        for mine, yours in names.items(): key = key.replace(mine, yours)
        state[key] = value
    transformer.load_state_dict(state, strict=True)
    image = torch.randn(2, 2, 48, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = nn.Sequential(*list(cnn.eval().children())[:8])(image)
        assert maps.shape == (2, 64, 3, 4, 2)
        tokens = torch.einsum("ncxyz,hc->nxyzh", maps, ours.project.weight[:, :, 0, 0, 0]).flatten(1, 3) + ours.project.bias + ours.positions
        expected = transformer.eval()(tokens)
        torch.testing.assert_close(ours(image, None), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(image), net.head(expected.mean(1), None), rtol=1e-4, atol=1e-5)


class Volumes(torch.utils.data.Dataset):
    "Sixteen patients; the bright ball and the first column tell the risk. Rows are (image, clinical, target)."
    def __init__(self, seed, n=16):
        rng = np.random.default_rng(seed)
        risk = rng.normal(size=n)
        ball = (np.square(np.indices((32, 32, 32)) - 15.5).sum(0) < 64)
        self.image = torch.tensor(rng.normal(0, 0.3, (n, 2, 32, 32, 32)) + risk[:, None, None, None, None]*ball).float()
        self.clinical = torch.tensor(np.column_stack([risk, rng.normal(size=(n, 2))])).float()
        self.target = torch.tensor(np.column_stack([np.ceil(300*np.exp(-risk)), rng.random(n) < 0.8])).float()

    def __len__(self): return len(self.target)

    def __getitem__(self, i): return self.image[i], self.clinical[i], self.target[i]


@pytest.mark.parametrize("name", VOLUME_NETS)
def test_one_loop_trains_them_all_and_a_stored_net_predicts_the_same(name, tmp_path):
    config = TrainConfig(epochs=2, batch_size=8, lr=1e-3, patience=2, accumulate=1, n_workers=0, device="cpu")
    net, fresh = small(name), Volumes(3, 8)
    before = net_facts(net)
    history = fit_member(tmp_path/"member", net, CoxLoss("efron"), Volumes(1), Volumes(2, 8), config, seed=1)
    assert len(history.epochs) == 2 and np.isfinite(history.epochs.train_loss).all()
    risk = predict(net, fresh, batch_size=3)
    assert np.isfinite(risk).all() and np.ptp(risk) > 0
    np.testing.assert_allclose(predict(net, fresh, batch_size=8), risk, atol=1e-5)
    save_volume_net(net, tmp_path/"net")
    np.testing.assert_array_equal(predict(load_volume_net(tmp_path/"net"), fresh, batch_size=3), risk)
    assert net_facts(load_volume_net(tmp_path/"net")) == before


@pytest.mark.parametrize("name", ["resnet18", "transrp"])
def test_a_med3d_file_is_converted_as_the_message_says(name, tmp_path):
    "A pickle as Med3D makes them is refused; the line in the message turns it into a file that is taken."
    source = small("resnet18", shortcut="A")
    encoder = ConvNet(ConvConfig("resnet18", (32, 32, 32), 1, 0, width=0.125, shortcut="A"), seed=7).image_encoder
    torch.save({"state_dict": {f"module.{key}": value for key, value in encoder.state_dict().items()}}, tmp_path/"FILE.pth")
    with pytest.raises(DataError, match="a pickle can run code") as refusal: small(name, shortcut="A", weights=str(tmp_path/"FILE.pth"))
    line = str(refusal.value).split("Med3D file: ")[1].rstrip(".").replace("FILE", str(tmp_path/"FILE"))
    exec(line, {"torch": torch, "safetensors": __import__("safetensors.torch")})
    net = small(name, shortcut="A", weights=str(tmp_path/"FILE.safetensors"))
    found = (net.image_encoder if name == "resnet18" else net.image_encoder.cnn).state_dict()
    assert all(torch.equal(found[key], value) for key, value in encoder.state_dict().items() if key != "conv1.weight") and not torch.equal(source.image_encoder.conv1.weight, found["conv1.weight"])
    torch.testing.assert_close(found["conv1.weight"].sum(1, keepdim=True), encoder.state_dict()["conv1.weight"])
    assert net.weights_source["weights"] == "FILE.safetensors" and net.weights_source["names_shortened"] == len(encoder.state_dict())
    save_volume_net(net, tmp_path/"net")
    assert str(tmp_path) not in (tmp_path/"net.json").read_text() and load_volume_net(tmp_path/"net").weights_source == net.weights_source


def test_weights_that_do_not_fit(tmp_path):
    encoder = ConvNet(ConvConfig("resnet18", (32, 32, 32), 2, 0, width=0.125)).image_encoder.state_dict()
    for change, words in (({"layer3.0.conv1.weight": torch.zeros(3)}, "of another shape"), ({"more": torch.zeros(1)}, "1 unknown: more")):
        save_file({**encoder, **change}, tmp_path/"w.safetensors")
        with pytest.raises(DataError, match=words): ConvNet(ConvConfig("resnet18", (32, 32, 32), 2, 0, width=0.125, weights=str(tmp_path/"w.safetensors")))
    with pytest.raises(DataError, match="no such file"): ConvNet(ConvConfig("resnet18", (32, 32, 32), 2, 0, weights=str(tmp_path/"nowhere.safetensors")))
    for n, k in ((3, 2), (4, 2)):  # two channels of a file are not spread over others: nobody knows which is which
        with pytest.raises(DataError, match="of another shape"):
            save_file(encoder, tmp_path/"w.safetensors")
            ConvNet(ConvConfig("resnet18", (32, 32, 32), n, 0, width=0.125, weights=str(tmp_path/"w.safetensors")))


@pytest.mark.parametrize("content", [[], {}, {"kind": "brainmets volume net"}, {"kind": 3}])
def test_a_foreign_json_is_refused(content, tmp_path):
    write_json(tmp_path/"net.json", content)
    for read in (volume_net_facts, load_volume_net):
        with pytest.raises(DataError, match="Remedy"): read(tmp_path/"net")
