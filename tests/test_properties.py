"""What holds of metrics, predictions, configuration and files whatever they are given.

Hypothesis draws examples, always the same ones; `EXAMPLES=2000 python -m pytest
tests/test_properties.py` draws others, and that many of each.
"""

import json
import math
import os
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.special import softmax

from ensdistill import InputError, metrics
from ensdistill.conformal import aps_scores, conformal_sets, lac_scores, sets_of, threshold
from ensdistill.deployment import Deployment, answers
from ensdistill.files import read_csv, write_csv
from ensdistill.hdf5 import open_hdf5, write_hdf5
from ensdistill.pictures import decode, mode_of, size_of
from ensdistill.predictions import Dirichlet, Mixture, join
from ensdistill.sources import folder
from ensdistill.stored_images import StoredImages
from ensdistill.studies import read_configuration
from ensdistill.weights import load_student, read_header, save_student
from tests.builders import encode, noise, write_tar, write_tree, write_zip
from tests.fuzzed import CONFIG, student
from tests.mutations import VALUES
from tests.stores import png, store, store_files

MORE = os.environ.get("EXAMPLES")
drawn = settings(
    deadline=None,
    database=None,
    derandomize=not MORE,
    max_examples=int(MORE or 15),
)


@st.composite
def judged(draw, images=12, classes=5):
    """Probabilities that are fractions, with ties and zeros, and labels; also as fractions."""
    count, kinds = draw(st.integers(1, images)), draw(st.integers(1, classes))
    row = st.lists(st.integers(0, 4), min_size=kinds, max_size=kinds).filter(any)
    weights = draw(st.lists(row, min_size=count, max_size=count))
    exact = [[Fraction(it, sum(row)) for it in row] for row in weights]
    labels = draw(st.lists(st.integers(0, kinds - 1), min_size=count, max_size=count))
    return np.array(exact, np.float64), np.array(labels), exact


def logits(most=4, classes=5, size=30.0):
    """(N, M, K)."""
    number = st.floats(-size, size, width=32)
    shapes = st.tuples(st.integers(1, 5), st.integers(1, most), st.integers(1, classes))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=number))


# --- metrics ---------------------------------------------------------------------------------


@drawn
@given(judged(), st.integers(1, 16))
def test_metrics_equal_their_definitions_in_fractions(pair, n_bins):
    probs, labels, exact = pair
    count, classes = probs.shape
    best = [row.index(max(row)) for row in exact]
    right = [b == y for b, y in zip(best, labels, strict=True)]
    assert metrics.accuracy(probs, labels) == pytest.approx(100 * sum(right) / count)
    at_label = [row[y] for row, y in zip(exact, labels, strict=True)]
    expected = -math.fsum(math.log(max(p, Fraction(1, 10**12))) for p in at_label) / count
    assert metrics.nll(probs, labels) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    squares = sum(
        (p - (k == y)) ** 2 for row, y in zip(exact, labels, strict=True) for k, p in enumerate(row)
    )
    assert metrics.brier(probs, labels) == pytest.approx(float(squares / count), abs=1e-14)

    def gaps(values, hits):
        bins = Counter()
        for p, hit in zip(values, hits, strict=True):
            bins[max(0, math.ceil(p * n_bins) - 1)] += hit - p  # (lo, hi], the first closed
        return sum(map(abs, bins.values())) / count

    sure = gaps([max(row) for row in exact], right)
    assert metrics.ece(probs, labels, n_bins) == pytest.approx(float(sure), abs=1e-12)
    each = [gaps([row[k] for row in exact], labels == k) for k in range(classes)]
    found = metrics.classwise_ece(probs, labels, n_bins)
    assert found == pytest.approx(float(sum(each) / classes), abs=1e-12)


BOUNDS = {
    metrics.accuracy: 100, metrics.nll: 27.7, metrics.brier: 2, metrics.ece: 1,
    metrics.classwise_ece: 1, metrics.adaptive_ece: 1, metrics.smooth_ece: 1, metrics.aurc: 1,
    metrics.augrc: 1, metrics.optimal_temperature: 20,
}  # fmt: skip


@drawn
@given(judged(), st.randoms(use_true_random=False))
def test_metrics_have_bounds_and_do_not_depend_on_the_order_of_images(pair, random):
    probs, labels, _ = pair
    order = random.sample(range(len(labels)), len(labels))
    for metric, most in BOUNDS.items():
        found = metric(probs, labels)
        assert 0 <= found <= most + 1e-9, metric
        # Where an NLL is flat in T, which T* is found depends on rounding.
        if metric is not metrics.optimal_temperature:
            assert metric(probs[order], labels[order]) == pytest.approx(found, abs=1e-9), metric
    ratio = metrics.rejection_ratio(probs, labels)
    again = metrics.rejection_ratio(probs[order], labels[order])
    assert again == pytest.approx(ratio, abs=1e-9, nan_ok=True)
    assert math.isnan(ratio) or ratio <= 1 + 1e-12
    assert metrics.aurc(probs, labels) >= metrics.augrc(probs, labels) - 1e-12
    assert 0 <= metrics.entropy(probs) <= math.log(probs.shape[1]) + 1e-12


@drawn
@given(judged(), st.floats(0.2, 5))
def test_the_best_temperature_is_a_minimum_and_scales_with_the_logits(pair, scale):
    probs, labels, _ = pair
    best = metrics.optimal_temperature(probs, labels)

    def loss(probs, temperature):
        scaled = metrics.apply_temperature(probs, temperature)
        at_label = scaled[np.arange(len(labels)), labels]
        return -np.mean(np.log(np.maximum(at_label, 1e-300)))

    if probs.min() > 0:
        for other in (0.05, best * 0.9, best * 1.1, 20.0):
            if 0.05 <= other <= 20:
                assert loss(probs, best) <= loss(probs, other) + 1e-9
        again = metrics.optimal_temperature(metrics.apply_temperature(probs, scale), labels)
        assume(0.06 < best < 19 and 0.06 < again < 19 and np.ptp(probs, 1).max() > 0)
        assert again == pytest.approx(best / scale, rel=1e-6)


@drawn
@given(*[st.lists(st.integers(-3, 3), min_size=1, max_size=9)] * 2)
def test_detection_counts_pairs(inside, outside):
    pairs = [(b > a) + (a == b) / 2 for a in inside for b in outside]
    assert metrics.auroc(inside, outside) == pytest.approx(np.mean(pairs))
    assert metrics.auroc(outside, inside) == pytest.approx(1 - np.mean(pairs))
    limit = max(t for t in outside if np.mean(np.array(outside) >= t) >= 0.95)
    assert metrics.fpr95(inside, outside) == pytest.approx(np.mean(np.array(inside) >= limit))
    assert 0 < metrics.aupr(inside, outside) <= 1


@drawn
@given(judged(), st.floats(0.05, 0.99), st.sampled_from([lac_scores, aps_scores]))
def test_conformal_sets_cover_their_own_calibration_images(pair, wanted, scores):
    probs, labels, _ = pair
    count, classes = probs.shape
    found = conformal_sets(scores, (probs, labels), (probs, labels), wanted)
    rank = math.ceil((count + 1) * wanted - 1e-9)
    assert found.coverage >= min(rank, count) / count - 1e-12
    assert 0 <= found.size <= classes
    known = scores(probs)[np.arange(count), labels]
    limits = [threshold(known, it) for it in (wanted / 2, wanted)]
    sizes = [sets_of(scores, probs, labels, limit)[1] for limit in limits]
    assert (sizes[0] <= sizes[1]).all()
    if scores is aps_scores:
        assert sizes[0].min() >= 1


# --- predictions -----------------------------------------------------------------------------


@drawn
@given(logits(), st.randoms(use_true_random=False), st.floats(-50, 50, width=32))
def test_a_mixture_depends_neither_on_the_order_of_members_nor_on_the_level_of_logits(
    z, random, level
):
    images, members, classes = z.shape
    one, probs = Mixture(z), softmax(z.astype(float), 2).mean(1)
    other = Mixture(z[:, random.sample(range(members), members)].astype(float) + level)
    joined = join([Mixture(z[:, [it]]) for it in range(members)])
    for it in (one, other, joined):
        np.testing.assert_allclose(it.probs(), probs, atol=1e-12)
        np.testing.assert_allclose(it.doubt(), 1 - probs.max(1), atol=1e-12)
        if members > 1:
            between = it.mutual_information()
            np.testing.assert_allclose(between, one.mutual_information(), atol=1e-9)
            assert (between >= -1e-9).all()
            assert (between <= math.log(min(members, classes)) + 1e-9).all()
            np.testing.assert_allclose(it.diversity(), one.diversity(), atol=1e-6, rtol=1e-9)
            assert (it.diversity() >= -1e-9).all()
    for start in range(images):
        part = joined.part(slice(start, images))
        np.testing.assert_array_equal(part.probs(), joined.probs()[start:])


@drawn
@given(logits(most=3), st.sampled_from([0.0, 1.0, 0.25]), st.floats(0.1, 10))
def test_a_dirichlet_is_its_concentrations_and_keeps_its_bounds(z, offset, temperature):
    prediction = Dirichlet(z, offset)
    alpha = np.exp(z.astype(float)) + offset
    means = alpha / alpha.sum(2, keepdims=True)
    np.testing.assert_allclose(prediction.probs(), means.mean(1), rtol=1e-9)
    between = prediction.mutual_information()
    assert (between >= -1e-8).all()
    assert (between <= prediction.entropy() + 1e-8).all()
    assert (prediction.diversity() >= -1e-8).all()
    if z.shape[1] == 1:
        expected = (z.shape[2] - 1) / alpha.sum(2)[:, 0]
        np.testing.assert_allclose(prediction.diversity(), expected, rtol=1e-9)
    said = answers(prediction, temperature)
    scaled = softmax(np.log(means.mean(1)) / temperature, 1)
    np.testing.assert_allclose(said.probabilities, scaled, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(said.member_probabilities.sum(2), 1, rtol=1e-9)


@drawn
@given(logits(), st.floats(0.1, 10))
def test_scaled_answers_of_a_mixture_are_those_of_its_formulas(z, temperature):
    said = answers(Mixture(z), temperature)
    mean = softmax(z.astype(float), 2).mean(1)
    clipped = np.log(np.maximum(mean, np.finfo(float).tiny))
    np.testing.assert_allclose(said.probabilities, softmax(clipped / temperature, 1), atol=1e-12)
    members = softmax(z.astype(float) / temperature, 2)
    rounding = 1e-6 + abs(z).max() * np.finfo(np.float32).eps / temperature
    np.testing.assert_allclose(said.member_probabilities, members, atol=rounding)


# --- configuration ---------------------------------------------------------------------------

COUNTS, SHARES = st.integers(1, 10**6), st.floats(0, 1)
POSITIVE = st.floats(1e-6, 1e6)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=9)


def some(**keys):
    return st.fixed_dictionaries({}, optional=keys)


@st.composite
def studies(draw):
    """Valid studies, as config.yaml has them."""
    recipe = some(
        batch_size=COUNTS,
        learning_rate=POSITIVE,
        momentum=st.floats(0, 0.99),
        nesterov=st.booleans(),
    )
    moves = st.sampled_from(
        ["none", "gaussian", "ods", "conf_ods", "mixup"]
    ) | st.fixed_dictionaries(
        {"name": st.sampled_from(["ods", "gaussian"])}, optional={"eta": SHARES}
    )
    labels = st.lists(
        TEXTS.filter(lambda it: not it.startswith("DE")), min_size=1, max_size=4, unique=True
    )
    known = {
        "images": some(
            train=COUNTS, validation=COUNTS, test=COUNTS, seed=st.integers(0, 2**32 - 1)
        ),
        "members": st.integers(2, 4),
        "pool": st.integers(4, 9),
        "student_seeds": st.integers(1, 10_000),
        "precision": st.sampled_from(["fp32", "tf32", "bf16"]),
        "confidence_bins": COUNTS,
        "teacher": recipe,
        "student": recipe,
        "distillation": some(alpha=SHARES, temperature=POSITIVE, eta=SHARES | st.just("3/255")),
        "analyses": some(perturbed_images=COUNTS, train_images=COUNTS, jacobian_images=COUNTS),
    }
    study = draw(st.fixed_dictionaries({}, optional=known))
    study["methods"] = {
        f"m{at}": {"label": label, "perturbation": draw(moves)}
        for at, label in enumerate(draw(labels))
    }
    return study


@drawn
@given(studies())
def test_a_study_is_the_same_after_it_was_written(study):
    whole = read_configuration({"run": ["a"], "studies": {"a": study}})
    text = yaml.safe_dump(whole.model_dump(), allow_unicode=True)
    assert read_configuration(yaml.safe_load(text)) == whole
    assert json.loads(whole.model_dump_json()) == json.loads(json.dumps(whole.model_dump()))


SOUND = yaml.safe_load(CONFIG)


def places(tree, path=()):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@drawn
@given(st.sampled_from(sorted(places(SOUND), key=str)), st.sampled_from(VALUES), st.booleans())
def test_a_value_that_is_wrong_is_refused_in_a_sentence_that_names_its_key(path, value, renamed):
    config = json.loads(json.dumps(SOUND))
    *above, key = path
    node = config
    for step in above:
        node = node[step]
    if renamed and isinstance(node, dict):
        node["unknown"] = node.pop(key)
        path = (*path, "unknown")
    else:
        node[key] = value
    try:
        assert read_configuration(config).studies
    except InputError as error:
        sentence = str(error)
        assert sentence.startswith("config.yaml")
        assert sentence.isprintable()
        assert len(sentence) < 600
        assert any(str(part) in sentence for part in path[2:] or path)


# --- files -----------------------------------------------------------------------------------

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8
).filter(lambda it: it.strip("."))
KINDS_OF_NUMBERS = hnp.integer_dtypes(endianness="=") | hnp.floating_dtypes(
    endianness="=", sizes=(32, 64)
)


@drawn
@given(
    st.dictionaries(
        NAMES,
        hnp.arrays(KINDS_OF_NUMBERS, hnp.array_shapes(max_dims=4, max_side=5)),
        min_size=1,
        max_size=3,
    ),
    st.dictionaries(NAMES, st.text(st.characters(codec="utf-8", exclude_characters="\0"))),
)
def test_arrays_and_texts_come_back_from_hdf5(arrays, texts):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "x.h5")
        write_hdf5(path, {f"a/{name}": it for name, it in arrays.items()}, texts)
        with open_hdf5(path) as file:
            assert dict(file.attrs) == texts
            assert {*file["a"]} == {*arrays}
            for name, array in arrays.items():
                found = file[f"a/{name}"][()]
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array)


@drawn
@given(st.lists(st.tuples(TEXTS, st.floats(allow_nan=False), st.integers(-(2**53), 2**53))))
def test_rows_come_back_from_a_table(rows):
    frame = pd.DataFrame(rows, columns=["system", "nll", "n"])
    with tempfile.TemporaryDirectory() as place:
        write_csv(Path(place, "x.csv"), frame)
        found = read_csv(Path(place, "x.csv"))
    assert [tuple(it) for it in found.itertuples(index=False)] == rows


ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=5)
NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)


@drawn
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5).filter(lambda it: it != "spec"), JSON
    )
)
def test_the_header_of_weights_comes_back_and_so_do_the_weights(header):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "weights.safetensors")
        save_student(path, student(), header)
        assert read_header(path) == {**header, "spec": json.loads(json.dumps(student().spec))}
        state = load_student(path).network.state_dict()
    for key, tensor in student().network.state_dict().items():
        assert torch.equal(state[key], tensor)


@drawn
@given(
    st.lists(TEXTS, min_size=1, max_size=4),
    st.none() | st.tuples(st.integers(1, 99), st.integers(1, 99)),
    st.none() | POSITIVE,
    st.lists(SHARES, max_size=4),
)
def test_what_is_known_of_a_student_comes_back_from_json(classes, size, temperature, scores):
    known = Deployment(classes, 3, size, temperature=temperature, scores=scores)
    assert Deployment.from_json(known.to_json()) == known


@drawn
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))),
    st.booleans(),
    st.sampled_from(["png", "bmp", "tif", "webp", "ppm"]),
)
def test_pixels_come_back_from_lossless_formats(pixels, grey, ending):
    image = Image.fromarray(pixels[:, :, 0] if grey else pixels)
    assume(not (grey and ending == "webp"))  # it has no grey
    data = encode(image, ending)
    np.testing.assert_array_equal(np.asarray(decode("x", data)), np.asarray(image))
    assert (mode_of("x", data), size_of("x", data)) == (image.mode, pixels.shape[:2])


@drawn
@given(
    hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2)),
    st.sampled_from(["png", "tif", "ppm"]),
)
def test_grey_of_16_bits_is_scaled_to_8(values, ending):
    data = encode(Image.fromarray(values), ending)
    expected = values.astype(int) * 255 // 65535
    np.testing.assert_array_equal(np.asarray(decode("x", data)), expected)
    assert mode_of("x", data) == "L"


@drawn
@given(st.data(), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_images_are_read_in_any_order_whatever_their_chunks(data, count, chunk, encoded):
    pixels = noise(count, 3, 5, 4, seed=count)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "images.h5")
        with h5py.File(path, "w") as file:
            if encoded:
                store_files(file, "val", list(map(png, pixels)), np.zeros(count), mode="RGB")
            else:
                store(file, "val", pixels, np.zeros(count), min(chunk, count))
        places = data.draw(st.lists(st.integers(0, count - 1)))
        stored = StoredImages(path, "val", data.draw(st.sampled_from([None, (3, 2)])))
        rows, columns = (slice(1, 4), slice(1, 3)) if stored.shape[2] == 3 else (slice(None),) * 2
        expected = pixels[places][:, :, rows, columns]
        np.testing.assert_array_equal(stored.read(places), expected)


FILES = st.text(
    st.characters(codec="utf-8", exclude_categories=["C"], exclude_characters="/\\"),
    min_size=1,
    max_size=9,
)


@drawn
@given(
    st.lists(
        FILES.filter(lambda it: it.strip(".") and not it.startswith(".")), min_size=1, max_size=3
    )
)
def test_names_in_any_script_are_read_alike_from_folders_and_archives(names):
    files = {
        f"köttur 猫/{at}{name}.png": encode(noise(4, 4, seed=at)) for at, name in enumerate(names)
    }
    with tempfile.TemporaryDirectory() as place:
        roots = [
            write_tree(Path(place, "tree"), files),
            write_zip(Path(place, "x.zip"), files),
            write_tar(Path(place, "x.tar"), files),
        ]
        found = [folder(path=it, size=None, labelled=False).sha256 for it in roots]
    assert found[0] == found[1] == found[2]
