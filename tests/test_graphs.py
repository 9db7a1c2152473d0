"""What graphs of networks tell: normalisations that can be folded, and where networks are cut."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from ensdistill.graphs import cut_at
from ensdistill.hydra import split
from ensdistill.libraries import LibraryNetwork
from ensdistill.networks import build_network, fold_batch_norms, norms_to_fold
from tests.test_convert import ARCHITECTURES, K, shaken

B = 2
RUNNING = {"track_running_stats": False}


def built(name, **more):
    options, side = ARCHITECTURES[name]
    torch.manual_seed(0)
    network = build_network(name, K, mean=[0.4] * 3, std=[0.2] * 3, options=options, **more)
    return shaken(network.double().eval()), torch.rand(B, 3, side, side, dtype=torch.float64)


def count(network):
    return sum(isinstance(it, nn.BatchNorm2d) for it in network.modules())


FOLDED = {
    "timm:resnet18": 12,  # a stem, two of each of four blocks, three shortcuts
    "timm:resnet50": 16,
    "torchvision:mobilenet_v3_small": 34,
    "timm:mobilenetv3_small_050": 34,
    "timm:tf_mobilenetv3_small_minimal_100": 34,
    "timm:test_efficientnet": 13,
    "timm:regnetx_002": 44,
    "timm:densenet121": 9,  # the stem, and the second of two in each of eight layers
    "file:tests/small_networks.py:resnet_v2": 0,  # their weights would be standardised again
    "timm:mobilevit_xxs": 23,  # of 32: three blocks that timm does not trace have three each
    "timm:vit_tiny_patch16_224": 0,
}
"""How many normalisations follow a convolution."""


@pytest.mark.parametrize("name", FOLDED)
def test_folding_changes_logits_by_rounding_only(name):
    network, x = built(name)
    expected, norms = network(x), count(network)
    fold_batch_norms(network)
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-10)
    assert norms - count(network) == FOLDED[name]


def wrapped(body):
    """As networks of libraries are."""
    return shaken(LibraryNetwork(body, [0.4] * 3, [0.2] * 3).double().eval())


def folds(network):
    """How many normalisations are folded, the logits being the same."""
    x = torch.rand(B, 3, 8, 8, dtype=torch.float64)
    expected, norms = network(x), count(network)
    fold_batch_norms(network)
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-10)
    return norms - count(network)


def test_an_activation_of_a_norm_stays():
    act = timm.layers.BatchNormAct2d
    body = nn.Sequential(nn.Conv2d(3, 4, 3), act(4, act_layer=nn.SiLU), nn.Conv2d(4, 4, 1), act(4))
    assert folds(wrapped(body)) == 2


class Twice(nn.Module):
    """A convolution or a normalisation is passed twice, or something else takes what is between."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.last, self.how = nn.BatchNorm2d(3), nn.BatchNorm2d(3), how
        self.normalized = True  # means something to our own networks alone

    def forward(self, x):
        if self.how == "norm":
            return self.norm(self.other(F.relu(self.norm(self.conv(x)))))
        if self.how == "conv":
            return self.last(self.conv(self.norm(self.conv(x))))
        if self.how == "used":
            x = self.conv(x)
            return self.norm(x) + x
        if self.how == "sum":
            return self.norm(self.conv(x) + x)
        if self.how == "returned":
            return self.norm(F.relu(self.conv(x)))
        return self.norm(input=self.conv(x))


@pytest.mark.parametrize("how", ["norm", "conv", "used", "sum", "returned"])
def test_a_norm_that_is_not_right_behind_its_own_convolution_stays(how):
    assert folds(wrapped(Twice(how))) == 0


def test_a_norm_may_get_its_input_by_name():
    assert folds(wrapped(Twice("named"))) == 1


@pytest.mark.parametrize(("options", "expected"), [({"affine": False}, 1), (RUNNING, 0)], ids=str)
def test_a_norm_without_gains_is_folded_but_not_one_without_statistics(options, expected):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert folds(wrapped(nn.Sequential(conv, nn.BatchNorm2d(4, **options)))) == expected


class Untraceable(nn.Module):
    """Its flow depends on numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) if x.mean() > -100 else x


def test_a_network_that_cannot_be_traced_stays_as_it_is():
    network = wrapped(Untraceable())
    before = {key: it.clone() for key, it in network.state_dict().items()}
    assert folds(network) == 0
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], it) for key, it in before.items())
    with pytest.raises(ValueError, match=r"cannot be cut at 'body.norm': torch.fx cannot trace it"):
        cut_at(network, "body.norm")


def test_norms_of_batch_ensembles_are_found():
    network, _ = built("timm:resnet18", ensemble_size=3)
    found = [(conv, norm) for _, conv, norm in norms_to_fold(network)]
    assert len(found) == 12
    assert ("body.conv1", "body.bn1") in found
    assert ("body.layer2.0.downsample.0", "body.layer2.0.downsample.1") in found


# --- cuts -------------------------------------------------------------------------------------

CUTS = {
    "timm:resnet18": ["layer4", "layer3.0", "global_pool", "fc", "linear", "layer2.0.conv1"],
    "timm:vit_tiny_patch16_224": ["blocks.1", "norm", "head", "blocks.1.mlp.fc2", "linear"],
    "timm:test_convnext": ["stages.3", "stages.1.downsample", "head", "linear"],
    "torchvision:mobilenet_v3_small": ["features.8", "classifier", "classifier.3", "linear"],
    "file:tests/small_networks.py:vit": ["encoder.ln", "heads", "linear"],
}
CUTS["timm:resnet18"].remove("layer2.0.conv1")  # a shortcut leads past it
CUTS["timm:vit_tiny_patch16_224"].remove("blocks.1.mlp.fc2")


@pytest.mark.parametrize(("name", "cut"), [(name, cut) for name in CUTS for cut in CUTS[name]])
@pytest.mark.parametrize("training", [False, True])
def test_body_and_head_are_the_network_to_the_bit(name, cut, training):
    network, x = built(name)
    network.train(training)
    for module in network.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()
    whole = copy.deepcopy(network)
    body, head = split(network, cut)
    parts, theirs = head(body(x)), whole(x)
    assert torch.equal(parts, theirs)
    direction = torch.randn_like(theirs)
    (parts * direction).sum().backward()
    (theirs * direction).sum().backward()
    mine = dict(body.named_parameters())
    own = dict(head.named_parameters())
    if cut == "linear":
        own = {f"{whole.last}.{key}": it for key, it in own.items()}
    expected = dict(whole.named_parameters())
    assert mine.keys() | own.keys() == expected.keys()
    assert not mine.keys() & own.keys()
    for key, it in expected.items():
        assert torch.equal((mine | own)[key].grad, it.grad), key


@pytest.mark.parametrize(("name", "cut"), [("timm:resnet18", "layer4"), ("timm:resnet18", "fc")])
def test_a_head_has_what_is_behind_the_cut(name, cut):
    network, _ = built(name)
    body, head = split(network, cut)
    of_head = {key.split(".")[1] for key, _ in head.named_parameters()}
    assert of_head == {"layer4": {"layer4", "fc"}, "fc": {"fc"}}[cut]
    assert not {key.split(".")[1] for key, _ in body.named_parameters()} & of_head
    assert not any(it.__class__.__name__ == "Normalize" for it in head.modules())


@pytest.mark.parametrize(
    ("name", "cut", "expected"),
    [
        (
            "timm:resnet18",
            "layer2.0.conv2",
            "it cannot be cut at 'body.layer2.0.conv2': what is behind uses",
        ),
        (
            "timm:resnet18",
            "layer5",
            "'cut' must be 'linear' or name a module, such as conv1, bn1, act1",
        ),
        (
            "timm:resnet18",
            "stage",
            "'cut' must be 'linear' or name a module, such as conv1",
        ),
        (
            "timm:deit_tiny_distilled_patch16_224",
            "head",
            "it cannot be cut at 'body.head': what is behind uses",
        ),
        (
            "timm:vit_tiny_patch16_224",
            "blocks.1.mlp",
            "it cannot be cut at 'body.blocks.1.mlp': what is behind uses",
        ),
    ],
)
def test_a_cut_that_leads_nowhere_is_refused(name, cut, expected):
    network, _ = built(name)
    with pytest.raises(ValueError, match="cut") as caught:
        split(network, cut)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_passed_is_no_place_to_cut():
    network = wrapped(Twice("norm"))
    with pytest.raises(ValueError, match=r"cannot be cut at 'body.last': it does not pass it"):
        split(network, "last")


def test_weights_are_shared_by_none_of_two_heads():
    body = models.get_model("mobilenet_v3_small", num_classes=K)
    _, head = split(wrapped(body), "classifier")
    twin = copy.deepcopy(head)
    for mine, other in zip(head.parameters(), twin.parameters(), strict=True):
        assert mine.data_ptr() != other.data_ptr()
