"""Networks of timm, torchvision and own files: what they are built of, weights, every student."""

import logging
import pickle
import sys
import urllib.error

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision import models

from ensdistill.networks import build_network, described
from ensdistill.pretrained import fill
from ensdistill.state_dicts import read_stored
from ensdistill.students import build_student
from ensdistill.weights import load_student, read_header, save_student
from tests.builders import MINE, message
from tests.project import REPOSITORY
from tests.test_convert import shaken

K = 4
RESNET = {"name": "timm:test_resnet", "num_classes": K, "in_channels": 3}

# --- own files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "options", "width"),
    [
        ("build", None, 6),
        ("build", {"width": 2}, 2),
        ("of_classes", None, 4),
        ("of_all", {"width": 7}, 7),
        ("fixed", None, 5),
    ],
)
def test_a_function_is_given_what_it_takes(own_networks, function, options, width):
    network = build_network(f"file:models/mine.py:{function}", K, options=options).eval()
    assert network.body.conv.out_channels == width
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x), network.body(x))  # its pixels are in [0, 1]
    assert network(x).shape == (2, K)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("models/mine.py:wrong", "file:models/mine.py:wrong: returned list, not a torch.nn.Module"),
        ("models/mine.py:fails", "file:models/mine.py:fails: KeyError: 'no such thing"),
        ("models/mine.py:none", "file:models/mine.py:none: the file has no function 'none' of its"),
        ("models/mine.py:text", "file:models/mine.py:text: the file has no function 'text' of its"),
        ("models/mine.py:nn", "file:models/mine.py:nn: the file has no function 'nn' of its own"),
        (
            "models/imports.py:mkdir",
            "file:models/imports.py:mkdir: the file has no function 'mkdir' of its own",
        ),
        (
            "models/imports.py:part",
            "file:models/imports.py:part: the file has no function 'part' of its own",
        ),
        ("models/his.py:build", "file:models/his.py: no such file"),
        ("models/broken.py:build", "file:models/broken.py: SyntaxError: "),
        ("models/raises.py:build", "file:models/raises.py: ModuleNotFoundError: No module named"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(own_networks, name, expected):
    (own_networks / "models/imports.py").write_text(
        "from functools import partial\nfrom os import mkdir\npart = partial(mkdir, 'canary')\n"
    )
    (own_networks / "models/broken.py").write_text("def build(:\n")
    (own_networks / "models/raises.py").write_text("import a_package_that_is_not\n")
    assert message(build_network, f"file:{name}", K).startswith(expected)


def test_a_wrong_option_of_a_function_is_told(own_networks):
    found = message(build_network, "file:models/mine.py:build", K, options={"depth": 3})
    assert found.startswith("file:models/mine.py:build: TypeError: build() got an unexpected")


@pytest.mark.parametrize("path", ["../outside.py", "/etc/outside.py", "models/../../outside.py"])
def test_a_file_outside_the_folder_is_not_run(own_networks, path):
    (own_networks.parent / "outside.py").write_text("import os; os.mkdir('canary')\n")
    found = message(build_network, f"file:{path}:build", K)
    assert found == f"file:{path}: is not in the folder where snakemake runs"
    assert not (own_networks / "canary").exists()


@pytest.mark.parametrize(
    "path",
    [".hidden/mine.py", "models/.mine.py", "venv/lib/python3.11/site-packages/mine/mine.py"],
)
def test_a_file_that_is_hidden_or_of_an_installed_package_is_not_run(own_networks, path):
    (own_networks / path).parent.mkdir(parents=True, exist_ok=True)
    (own_networks / path).write_text("import os; os.mkdir('canary')\n")
    found = message(build_network, f"file:{path}:build", K)
    assert found == f"file:{path}: is a file of an installed package, or hidden"
    assert not (own_networks / "canary").exists()


@pytest.mark.parametrize("which", ["prefix", "base_prefix"])
def test_a_file_of_the_interpreter_is_not_run(own_networks, which, monkeypatch):
    monkeypatch.setattr(sys, which, str(own_networks / "env"))
    (own_networks / "env/lib").mkdir(parents=True)
    (own_networks / "env/lib/mine.py").write_text("import os; os.mkdir('canary')\n")
    found = message(build_network, "file:env/lib/mine.py:build", K)
    assert found.endswith("is a file of an installed package, or hidden")
    assert not (own_networks / "canary").exists()
    monkeypatch.setattr(sys, which, str(own_networks.parent))  # all is below it
    build_network("file:models/mine.py:build", K)


def test_a_file_of_this_package_is_not_run(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    found = message(build_network, "file:ensdistill/files.py:write_csv", K)
    assert found == "file:ensdistill/files.py: is a file of an installed package, or hidden"


def test_a_link_out_of_the_folder_is_not_followed(own_networks):
    (own_networks.parent / "outside.py").write_text("import os; os.mkdir('canary')\n")
    (own_networks / "models/link.py").symlink_to(own_networks.parent / "outside.py")
    assert "is not in the folder" in message(build_network, "file:models/link.py:build", K)
    assert not (own_networks / "canary").exists()


def test_a_file_is_run_once(own_networks):
    (own_networks / "models/once.py").write_text(MINE + "\nopen('log', 'a').write('x')\n")
    for _ in range(2):
        build_network("file:models/once.py:build", K)
    assert (own_networks / "log").read_text() == "x"


# --- weights from files -----------------------------------------------------------------------


def written(network, path, wrap=lambda state: state):
    state = {key: it.contiguous() for key, it in network.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(wrap(state), path)
    return str(path)


WRAPPED = {
    "a.safetensors": None,
    "a.pth": lambda state: state,
    "nested.pth": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model.pth": lambda state: {"model": state, "best": 0.5},
    "msd.pt": lambda state: {"model_state_dict": state},
}


@pytest.mark.parametrize("file", WRAPPED)
@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5", "mine"])
def test_weights_come_from_a_file(own_networks, file, name):
    made = {
        "timm:test_resnet": lambda: timm.create_model("test_resnet", num_classes=K),
        "torchvision:shufflenet_v2_x0_5": lambda: models.shufflenet_v2_x0_5(num_classes=K),
        "mine": lambda: build_network("file:models/mine.py:build", K).body,
    }
    given = made[name]()
    path = written(given, own_networks / file, WRAPPED[file])
    full = "file:models/mine.py:build" if name == "mine" else name
    found = build_network(full, K, pretrained=path).body.state_dict()
    assert all(torch.equal(found[key], it) for key, it in given.state_dict().items())
    assert found.keys() == given.state_dict().keys()


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
def test_of_other_classes_the_last_layer_is_new_and_all_else_kept(own_networks, name, caplog):
    family, _, model = name.partition(":")
    library = {"timm": timm.create_model, "torchvision": models.get_model}[family]
    given = library(model, num_classes=7)
    path = written(given, own_networks / "a.safetensors")
    with caplog.at_level(logging.INFO):
        network = build_network(name, K, pretrained=path).body
    found, expected = network.state_dict(), given.state_dict()
    new = {key for key in found if found[key].shape != expected[key].shape}
    assert new == {"fc.weight", "fc.bias"}
    assert all(torch.equal(found[key], expected[key]) for key in found.keys() - new)
    assert found["fc.weight"].std() > 0
    assert "the last layer (fc) is new: it was of other classes" in caplog.text


def test_two_last_layers_of_other_classes_are_both_new(own_networks, caplog):
    options = {"img_size": 32, "depth": 1}
    model = "deit_tiny_distilled_patch16_224"
    path = written(timm.create_model(model, num_classes=7, **options), own_networks / "a.pth")
    with caplog.at_level(logging.INFO):
        build_network(f"timm:{model}", K, pretrained=path, options=options)
    assert [it for it in ("(head)", "(head_dist)") if it in caplog.text] == [
        "(head)",
        "(head_dist)",
    ]


def test_weights_for_images_of_another_size_are_adapted_as_timm_does(own_networks):
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    given = timm.create_model("vit_tiny_patch16_224", num_classes=K, img_size=64, **options)
    path = written(given, own_networks / "a.pth")
    name, options = "timm:vit_tiny_patch16_224", {**options, "img_size": 32}
    found = build_network(name, K, pretrained=path, options=options).body
    assert found.pos_embed.shape == (1, 5, 24)
    assert torch.equal(found.pos_embed[:, :1], given.pos_embed[:, :1])
    assert torch.equal(found.blocks[0].attn.qkv.weight, given.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
@pytest.mark.parametrize("channels", [1, 6])
def test_grey_images_through_colour_weights_are_grey_colour_images(own_networks, name, channels):
    family, _, model = name.partition(":")
    library = {"timm": timm.create_model, "torchvision": models.get_model}[family]
    given = shaken(library(model, num_classes=K)).eval()
    path = written(given, own_networks / "a.safetensors")
    grey = build_network(name, K, in_channels=channels, pretrained=path).eval()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        ours, theirs = (net(x.expand(-1, c, -1, -1)) for net, c in ((grey, channels), (given, 3)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("bn1.bias"), "is not of this network: missing: 'bn1.bias'"),
        (
            lambda s: s.update(more=torch.ones(1)),
            "is not of this network: unexpected: 'more'",
        ),
        (
            lambda s: s.update({"bn1.bias": torch.ones(5)}),
            "is not of this network: bn1.bias has the shape (5,), not (32,)",
        ),
        (
            lambda s: s.update({"conv1.0.weight": torch.ones(5, 3, 3, 3)}),
            "is not of this network: conv1.0.weight has the shape (5, 3, 3, 3), not (",
        ),
    ],
)
def test_weights_of_another_network_are_told_apart(change, expected):
    network = timm.create_model("test_resnet", num_classes=K)
    state = {key: it.clone() for key, it in network.state_dict().items()}
    before = {key: it.clone() for key, it in network.state_dict().items()}
    change(state)
    assert message(fill, network, state, "x.pth").startswith(f"x.pth: {expected}")
    assert all(torch.equal(it, before[key]) for key, it in network.state_dict().items())


class Hostile:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        import os

        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "nested", "safetensors"])
def test_code_in_a_file_of_weights_is_not_run(own_networks, name, kind):
    path = own_networks / ("a.safetensors" if kind == "safetensors" else "a.pth")
    state = timm.create_model("test_resnet").state_dict()
    hostile = Hostile(own_networks / "canary")
    if kind in ("pickle", "safetensors"):
        path.write_bytes(pickle.dumps(hostile))
    else:
        torch.save({"state_dict": state, "more": hostile} if kind == "nested" else hostile, path)
    found = message(build_network, name, K, pretrained=str(path))
    assert str(path) in found
    assert not (own_networks / "canary").exists()
    message(read_stored, path)
    assert not (own_networks / "canary").exists()


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:resnet18", "mine"])
def test_a_missing_file_is_named(own_networks, name):
    full = "file:models/mine.py:build" if name == "mine" else name
    found = message(build_network, full, K, pretrained="a.pth")
    assert found == f"{full}: no such file of weights: a.pth"


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_what_holds_no_weights_is_told(own_networks, content, ending):
    path = own_networks / f"a.{ending}"
    path.write_bytes(content)
    assert message(read_stored, path).startswith(f"{path}: ")


@pytest.mark.parametrize("given", [{"epoch": 3}, [torch.ones(2)], {}, {"state_dict": {"a": 1}}])
def test_what_holds_no_weights_by_name_is_told(own_networks, given):
    torch.save(given, own_networks / "a.pth")
    assert "no state dict, " in message(read_stored, own_networks / "a.pth")


# --- weights of the libraries -----------------------------------------------------------------

IMAGES = {"shape": (3, 32, 32), "classes": list("abcd"), "mean": [0.1] * 3, "std": [0.9] * 3}


@pytest.mark.parametrize("pretrained", [True, "a.safetensors"])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("timm:vit_tiny_patch16_224", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ("timm:resnet18", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("torchvision:resnet18", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_pixels_are_normalised_as_pretrained_weights_saw_them(
    name, mean, std, channels, pretrained
):
    if channels == 1:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    images = {**IMAGES, "shape": (channels, 32, 32)}
    known = described({"name": name, "pretrained": pretrained}, images)
    assert known["mean"] == pytest.approx(mean)
    assert known["std"] == pytest.approx(std)
    alone = described({"name": name}, {**images, "mean": [0.1] * channels, "std": [0.9] * channels})
    assert (alone["mean"], alone["std"]) == ([0.1] * channels, [0.9] * channels)
    assert (known["num_classes"], known["in_channels"]) == (4, channels)


def test_a_students_file_says_how_pixels_are_normalised(own_networks):
    path = written(timm.create_model("test_vit", num_classes=9), own_networks / "vit.safetensors")
    architecture = {"name": "timm:test_vit", "pretrained": path}
    student = build_student("single", described(architecture, IMAGES), 1)
    expected = timm.get_pretrained_cfg("test_vit")
    assert student.network.normalize.mean.flatten().tolist() == pytest.approx(expected.mean)
    save_student(own_networks / "weights", student, {})
    (own_networks / "vit.safetensors").unlink()  # not needed any more
    spec = read_header(own_networks / "weights")["spec"]["architecture"]
    assert spec["mean"] == pytest.approx(expected.mean)
    assert "pretrained" not in spec
    loaded = load_student(own_networks / "weights")
    x = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(loaded(x), student.eval()(x))


PATIENT = """
import torch
from torch import nn


def build(num_classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
    if network[1].weight.is_meta:
        return network
    for _ in range(1000):
        if network[1].weight.data.normal_().abs().max() < 4:
            return network
    raise ValueError("no number came near enough")
"""


def test_a_network_that_draws_until_its_numbers_fit_is_loaded(own_networks, monkeypatch):
    """As `torch.nn.init.trunc_normal_` does: in memory left as it was found it drew for ever."""
    (own_networks / "models/patient.py").write_text(PATIENT)
    own = {"name": "file:models/patient.py:build", "num_classes": K, "in_channels": 3}
    student = build_student("single", own | {"mean": [0.0] * 3, "std": [1.0] * 3}, 1)
    save_student(own_networks / "weights", student, {})
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    deterministic = torch.are_deterministic_algorithms_enabled()
    before = torch.get_rng_state()
    try:
        torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
        loaded = load_student(own_networks / "weights")
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert torch.equal(before, torch.get_rng_state())
    x = torch.rand(2, 3, 2, 2)
    assert torch.equal(loaded(x), student.eval()(x))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)


def test_offline_one_sentence_names_the_file_and_where_to_put_it(offline):
    found = message(build_network, "timm:resnet18.a1_in1k", K, pretrained=True)
    assert found.startswith("timm:resnet18.a1_in1k: its weights cannot be fetched (")
    assert "fetch model.safetensors of timm/resnet18.a1_in1k on huggingface.co elsewhere" in found
    assert found.endswith("set 'pretrained' to the path of that file")
    found = message(build_network, "torchvision:resnet18", K, pretrained=True)
    assert found.startswith("torchvision:resnet18: its weights cannot be fetched (")
    assert "fetch https://download.pytorch.org/models/resnet18-f37072fd.pth elsewhere" in found
    assert found.endswith("set 'pretrained' to the path of that file")


def test_nothing_is_fetched_for_a_network_without_storage(offline):
    with torch.device("meta"):
        for name in ("timm:resnet18", "torchvision:resnet18"):
            network = build_network(name, K, pretrained=True)
            assert next(network.body.parameters()).is_meta


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
def test_offered_weights_are_taken(monkeypatch, name):
    """From a stand-in for what would be downloaded."""
    given = {"timm": lambda: timm.create_model("test_resnet", num_classes=1000),
             "torchvision": models.shufflenet_v2_x0_5}[name.partition(":")[0]]()  # fmt: skip
    state = given.state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: {**state})
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: {**state}
    )
    found = build_network(name, K, pretrained=True).body.state_dict()
    new = {key for key in found if found[key].shape != state[key].shape}
    assert new == {"fc.weight", "fc.bias"}
    assert all(torch.equal(found[key], state[key]) for key in found.keys() - new)


def test_a_network_without_offered_weights_is_told():
    found = message(build_network, "timm:vit_pwee_patch16_reg1_gap_256", K, pretrained="a")
    assert "no such file" in found
    none = next(it for it in timm.list_models() if not timm.get_pretrained_cfg(it).has_weights)
    found = message(build_network, f"timm:{none}", K, pretrained=True)
    assert found == f"timm:{none}: timm has no weights of it; set pretrained: false"


def test_without_timm_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    found = message(build_network, "timm:resnet18", K)
    assert found == ("architectures of timm need the package timm: pip install 'ensdistill[timm]'")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm:resnet81", "unknown architecture 'timm:resnet81'; did you mean 'resnet"),
        ("torchvision:resnet81", "unknown architecture 'torchvision:resnet81'; did you mean 'resn"),
        ("torchvision:raft_small", "unknown architecture 'torchvision:raft_small'"),
        ("timm:qqqq", "unknown architecture 'timm:qqqq'"),
        ("timm:resnet18.no_such_tag", "timm:resnet18.no_such_tag: "),
    ],
)
def test_an_unknown_model_is_told_with_one_that_is_close(name, expected):
    for pretrained in (False, True):
        assert message(build_network, name, K, pretrained=pretrained).startswith(expected)
    if "qqqq" not in name:
        architecture = {"name": name, "pretrained": True}
        if name != "timm:resnet81":
            assert message(described, architecture, IMAGES).startswith(expected)


@pytest.mark.parametrize("option", ["num_classes", "checkpoint_path", "weights", "cache_dir"])
@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_options_that_the_study_decides_are_none(name, option):
    found = message(build_network, name, K, options={option: 3})
    assert found == f"{name}: {option!r} is no option: the study decides it"


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_unknown_options_are_told(name):
    assert "no_such_thing" in message(build_network, name, K, options={"no_such_thing": 3})


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
def test_first_convolution_and_last_layer_compute_in_float32_under_autocast(size):
    torch.manual_seed(0)
    architecture = {**RESNET, "mean": [0.4] * 3, "std": [0.2] * 3}
    network = build_network(**architecture, ensemble_size=size).eval()
    seen = {}
    names = {"body.conv1.0": "first", "body.conv1.3": "second", "body.fc": "last"}
    for name, key in names.items():
        network.get_submodule(name).register_forward_hook(
            lambda module, given, out, key=key: seen.update({key: (module, given[0], out)})
        )
    x = torch.rand(2, 3, 32, 32)
    pixels = ((x - 0.4) / 0.2).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    first, given, out = seen["first"]
    torch.testing.assert_close(given, pixels)
    assert out.dtype == torch.bfloat16
    last, features, found = seen["last"]
    assert logits.dtype == found.dtype == torch.float32
    assert seen["second"][1].dtype == seen["second"][2].dtype == torch.bfloat16
    for module, rows, result in ((first, given, out), (last, features, found)):
        expected = []
        for j, row in enumerate(rows.float()):
            weight, bias = module.weight, module.bias
            if size == 2:
                own = module.s[j][:, None] * module.r[j][None]
                weight = weight * own.view(*own.shape, *[1] * (weight.ndim - 2))
                bias = None if bias is None else bias[j]
            if weight.ndim == 4:
                how = (module.stride, module.padding)
                expected.append(F.conv2d(row[None], weight, bias, *how))
            else:
                expected.append(F.linear(row[None], weight, bias))
        exact = torch.cat(expected).detach()
        rounded = exact.to(result.dtype)
        torch.testing.assert_close(
            result, rounded, rtol=1e-5 if result is found else 8e-3, atol=1e-5
        )
        if result is out:  # of rounded pixels most would differ
            assert (result == rounded).float().mean() > 0.99
