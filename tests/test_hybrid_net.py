"""The published nets take one training step at the published size: 32 slices of 3 x 128 x 128, 21 tabular columns, Adam at 1e-4."""
import pytest
import torch

from brainmets.losses import make_loss
from brainmets.models.hybrid import HybridNet, count_parameters, hybrid_config


@pytest.mark.parametrize("backbone, n_maps, n_parameters", [("resnet50", 2048, 23_782_001), ("efficientnet_b0", 1280, 4_183_213)])
def test_published_net_takes_a_step(backbone, n_maps, n_parameters):
    generator = torch.Generator().manual_seed(0)
    image, tabular = torch.randn(32, 3, 128, 128, generator=generator), torch.randn(32, 21, generator=generator)
    target = torch.stack([torch.rand(32, generator=generator)*100, torch.ones(32)], 1)
    net = HybridNet(hybrid_config("paper", backbone=backbone, weights="none", in_channels=3)).train()
    assert count_parameters(net)["total"] == n_parameters
    loss = make_loss("mse", target[:, 0], target[:, 1])
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-4)
    before = {name: value.clone() for name, value in net.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = loss(net(image, tabular), target)
        first.backward()
        gradients = {name: value.grad for name, value in net.named_parameters()}
        assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
        optimiser.step()
        torch.manual_seed(1)  # the same dropout as before
        with torch.no_grad(): second = loss(net(image, tabular), target)
    assert all(torch.equal(before[name], value) == (not gradients[name].any()) for name, value in net.named_parameters())
    assert second < first
    with torch.no_grad(): assert net.feature_maps(image[:1]).shape == (1, n_maps, 4, 4)
