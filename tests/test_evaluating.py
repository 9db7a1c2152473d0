"""`ensdistill evaluate`: metrics on new labelled images, and whether calibration holds there."""

import csv
import json
from collections import Counter

import h5py
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import betabinom, binomtest
from typer.testing import CliRunner

from ensdistill import calibration, calibration_check, cli, evaluating
from ensdistill.bootstrap import image_weights
from ensdistill.calibration import adaptive_ece, classwise_ece, ece, smooth_ece
from ensdistill.calibration_check import binomial, check, consistency, coverage_p, refit
from ensdistill.deployment import Deployment, open_student
from ensdistill.evaluating import answers_to, labelled_files, measured, scaled
from ensdistill.metrics import METRICS
from ensdistill.predictions import Mixture, read_prediction
from ensdistill.selective import augrc, aurc, rejection_ratio
from tests.builders import encode, write_tar, write_tree
from tests.deployed import CLASSES, deploy, drawn


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Enough to compare with; their number is no part of what is tested."""
    monkeypatch.setattr(evaluating, "RESAMPLES", 40)
    monkeypatch.setattr(calibration_check, "DRAWS", 200)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A BatchEnsemble of two members for colour images of 8×8, with a temperature."""
    return deploy(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def split(student):
    """Test images (N, 3, 8, 8) and labels of its study."""
    with h5py.File(student.parents[3] / "images.h5") as file:
        return file["test/images"][:], file["test/labels"][:]


def tree(split, count=60, above=""):
    """Files of so many images in the folders of their classes, and their places in the split."""
    images, labels = split
    names = [f"{above}{CLASSES[labels[i]]}/{i:03}.png" for i in range(count)]
    files = {name: encode(it.transpose(1, 2, 0)) for name, it in zip(names, images, strict=False)}
    return files, sorted(range(count), key=lambda i: names[i])


def run(*arguments):
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])


def refused(*arguments):
    result = run(*arguments)
    assert type(result.exception).__name__ == "InputError", result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def stored_prediction(student):
    return read_prediction(student.parents[3] / "logits/students/kd/0.h5", "test")


def test_metrics_are_those_of_the_logits(tmp_path, student, split):
    files, order = tree(split, 200)
    folder, output = write_tree(tmp_path / "new", files), tmp_path / "o.json"
    result = run(student, folder, "--json", "-o", output)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(output.read_text(encoding="utf-8"))
    assert (found["images"], found["broken"], found["absent"]) == (200, {}, [])

    whole, labels = stored_prediction(student)
    prediction, labels = Mixture(whole.logits[order]), labels[order]
    temperature = found["temperature"]
    known = open_student(student).deployment
    assert temperature == known.temperature
    p = softmax(prediction.logits.astype(float), -1).mean(1)
    q = softmax(np.log(p) / temperature, -1)
    own = np.arange(len(labels)), labels
    for probs, values in ((p, found["metrics"]), (q, found["scaled"])):
        assert values["acc"]["value"] == pytest.approx(100 * np.mean(probs.argmax(1) == labels))
        assert values["nll"]["value"] == pytest.approx(-np.log(probs[own]).mean(), rel=1e-5)
        assert values["ece"]["value"] == pytest.approx(ece(probs, labels), abs=1e-6)
        squares = (probs**2).sum(1) - 2 * probs[own] + 1
        assert values["bs"]["value"] == pytest.approx(squares.mean(), rel=1e-5)
    log_members = np.log(softmax(prediction.logits.astype(float), -1))
    between = log_members[:, 0] - log_members[:, 1]
    kl = (np.exp(log_members[:, 0]) - np.exp(log_members[:, 1])) * between
    assert found["metrics"]["diversity"]["value"] == pytest.approx(kl.sum(1).mean() / 2, rel=1e-5)
    left_out = {"temperature", "dee", "dee_ts", "nll_ts", "bs_ts", "ece_ts", "human_kl"}
    conformal = {"lac_coverage", "lac_size", "aps_coverage", "aps_size"}
    assert found["metrics"].keys() == METRICS.keys() - left_out - conformal
    assert found["scaled"].keys() == found["metrics"].keys() - {"diversity"}
    # The NLL is a mean, and its interval that of the plain percentile bootstrap about its median.
    losses = -np.log(p[own])
    means = np.sort(image_weights(200, resamples=40).counts @ losses / 200)
    low, high = losses.mean() + np.quantile(means, [0.025, 0.975]) - np.median(means)
    assert found["metrics"]["nll"]["low"] == pytest.approx(low, rel=1e-5)
    assert found["metrics"]["nll"]["high"] == pytest.approx(high, rel=1e-5)


def test_other_metrics_are_resampled_by_image(student):
    prediction, labels = stored_prediction(student)
    prediction, labels = Mixture(prediction.logits[:50]), labels[:50]
    known = open_student(student).deployment
    found = measured(scaled(prediction, 1.0), labels, known)
    probs = prediction.probs()
    functions = {"ece": ece, "classwise_ece": classwise_ece, "adaptive_ece": adaptive_ece}
    functions |= {"smooth_ece": smooth_ece, "aurc": aurc, "augrc": augrc}
    for key, function in {**functions, "rejection_ratio": rejection_ratio}.items():
        draws = []
        for counts in image_weights(50, resamples=40).counts:
            rows = np.repeat(np.arange(50), counts)
            draws.append(function(probs[rows], labels[rows]))
        middle = np.median(draws)
        for end, share in (("low", 0.025), ("high", 0.975)):
            expected = function(probs, labels) + np.quantile(draws, share) - middle
            assert getattr(found[key], end) == pytest.approx(expected, rel=1e-6), key


def test_the_class_wise_error_of_resamples_is_that_of_their_images(monkeypatch):
    monkeypatch.setattr(calibration, "TOGETHER", 300)  # in many parts
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.full(6, 0.3), 80), rng.integers(0, 6, 80)
    counts = image_weights(80, resamples=30).counts
    found = calibration.classwise_resampled(probs, labels, counts, 4)
    for value, counted in zip(found, counts, strict=True):
        rows, sums = np.repeat(np.arange(80), counted), Counter()
        for p, y in zip(probs[rows], labels[rows], strict=True):
            for k in range(6):
                sums[k, max(0, int(np.ceil(4 * p[k])) - 1)] += p[k] - (k == y)
        assert value == pytest.approx(sum(map(abs, sums.values())) / (80 * 6), rel=1e-12)


def test_a_table_and_a_text_for_people(tmp_path, student, split):
    files, _ = tree(split)
    folder = write_tree(tmp_path / "new", files)
    result = run(student, folder, "-o", tmp_path / "o.csv")
    with (tmp_path / "o.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = json.loads(run(student, folder, "--json").stdout)
    assert {(row["metric"], row["scaling"]) for row in rows} == {
        *((key, "none") for key in found["metrics"]),
        *((key, "T*") for key in found["scaled"]),
    }
    for row in rows:
        values = found["metrics" if row["scaling"] == "none" else "scaled"][row["metric"]]
        assert {key: float(row[key]) for key in values} == values
    accuracy = found["metrics"]["acc"]
    lines = result.stdout.splitlines()
    assert lines[0] == f"{folder}: images: 60"
    (line,) = [line for line in lines if line.startswith("ACC % ↑")]
    assert f"{accuracy['value']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}]" in line
    answer = found["calibration"]["answer"]
    assert lines[-1] == f"{answer[0].upper()}{answer[1:]}."


def test_only_test_images_count_where_there_are_some(tmp_path, student, split):
    files, _ = tree(split, 30)
    wrong = {f"train/{name}": data for name, data in tree(split, 60)[0].items()}
    tested = {f"test/{name}": data for name, data in files.items()}
    expected = json.loads(run(student, write_tree(tmp_path / "plain", files), "--json").stdout)
    folder = write_tree(tmp_path / "both", {**wrong, **tested})
    archive = write_tar(tmp_path / "both.tar", {**wrong, **tested})
    table = tmp_path / "table.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for split_name, names in (("train", wrong), ("Testing", tested)):
            writer.writerows([f"{folder}/{name}", name.split("/")[1], split_name] for name in names)
    for place in (folder, archive, table):
        found = json.loads(run(student, place, "--json").stdout)
        assert found["images"] == 30
        for key, value in expected["metrics"].items():
            assert found["metrics"][key]["value"] == pytest.approx(value["value"], abs=1e-5), key
    assert json.loads(run(student, f"{folder}/train", "--json").stdout)["images"] == 60


def test_broken_images_and_absent_classes_are_told(tmp_path, student, split):
    files, _ = tree(split)
    files = {name: data for name, data in files.items() if name.startswith(CLASSES[0])}
    files |= {f"{CLASSES[0]}/000 broken.png": b"x", "stray.png": b"x", "notes.txt": b"x"}
    folder = write_tree(tmp_path / "new", files)
    result = run(student, folder, "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["absent"] == CLASSES[1:]
    assert found["skipped"] == {"classless": 1, "others": 1}
    broken = f"{folder}/{CLASSES[0]}/000 broken.png"
    assert found["broken"] == {broken: "not an image of a known format"}
    assert found["images"] == len(files) - 2
    said = f"could not be read: 1 of {len(files) - 2}; such as {broken}: not an image"
    assert said in result.stderr
    shown = run(student, folder).stdout.splitlines()[0]
    assert shown.endswith(f"no images (1); of no image: {', '.join(CLASSES[1:])}")


@pytest.mark.parametrize(
    ("files", "arguments", "sentence"),
    [
        ({"zebra/0.png": b"x"}, [], "new: class 'zebra' is none of the student's: cat, dog, Kött"),
        ({"0.png": b"x"}, [], "new: no image in a folder with the name of its class was found"),
        ({"cat/0.png": b"x"}, [], "new/cat/0.png: not an image of a known format; no other"),
        ({"cat/0.png": b"x"}, ["-o", "o.txt"], "o.txt: the ending must be one of .csv, .json"),
    ],
)
def test_one_sentence(tmp_path, monkeypatch, student, files, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "new", files)
    assert sentence in refused(student, "new", *arguments)
    assert [it.name for it in tmp_path.iterdir()] == ["new"]
    assert refused(student, "gone") == "gone: no such folder"


def test_of_a_dirichlet_all_but_its_diversity_is_known(tmp_path):
    kind = {"prediction": "dirichlet", "concentration_offset": 1.0}
    student = deploy(tmp_path / "study", "single", members=1, prediction=kind)
    with h5py.File(student.parents[3] / "images.h5") as file:
        files, order = tree((file["test/images"][:], file["test/labels"][:]))
    predictor, skipped = open_student(student), Counter()
    folder = tmp_path / "new"
    write_tree(folder, files)
    found = answers_to(predictor, labelled_files(folder, CLASSES, skipped), 7)
    prediction, labels = stored_prediction(student)
    np.testing.assert_array_equal(found.labels, labels[order])
    np.testing.assert_allclose(found.prediction.probs(), prediction.probs()[order], rtol=2e-5)
    values = measured(found.prediction, found.labels, predictor.deployment)
    assert "diversity" not in values


def test_the_interval_of_a_share_is_exact():
    for count, images in ((0, 7), (3, 7), (7, 7), (930, 1000)):
        found, expected = binomial(count, images), binomtest(count, images).proportion_ci()
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_temperature_is_refitted_and_its_interval_covers():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        logits = 2 * generator.normal(size=(400, 4))
        p = softmax(logits, -1)
        labels = drawn(softmax(logits / 1.7, -1), generator)
        found = refit(p, labels)
        inside += found.low < 1.7 < found.high
    assert 180 <= inside <= 199

    def loss(log_temperature):
        z = np.log(p) / np.exp(log_temperature)
        return np.mean(logsumexp(z, 1) - z[np.arange(400), labels])

    expected = np.exp(minimize_scalar(loss, bracket=(0, 1), tol=1e-12).x)
    assert found.estimate == pytest.approx(expected, rel=1e-6)
    certain = refit(np.array([[0.9, 0.1]] * 5), np.zeros(5, int))
    assert np.isnan(certain.low)


def test_p_values_are_uniform_if_the_probabilities_are_right():
    generator = np.random.default_rng(1)
    found, errors, means = [], [], []
    for seed in range(200):
        p = softmax(2 * generator.normal(size=(300, 5)), -1)
        error, mean, value = consistency(p, drawn(p, generator), seed)
        found.append(value)
        errors.append(error)
        means.append(mean)
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.06)
    assert np.mean(np.array(found) <= 0.5) == pytest.approx(0.5, abs=0.1)
    assert np.mean(means) == pytest.approx(np.mean(errors), rel=0.05)


def test_coverage_of_new_images_follows_from_that_of_validation_images():
    generator, held = np.random.default_rng(2), []
    for _ in range(3000):
        limit = np.sort(generator.random(99))[89]  # of 99 the 90th
        held.append(np.sum(generator.random(50) <= limit))
    for count in (40, 45, 48):
        assert coverage_p(count, 50, 99) == pytest.approx(
            np.mean(np.array(held) <= count), abs=0.03
        )
        assert coverage_p(count, 50, 99) == pytest.approx(betabinom(50, 90, 10).cdf(count))
    assert coverage_p(3, 50, 5) == 1  # too few scores: all classes are in every set


def known_of(generator, classes, temperature):
    """A deployment calibrated on probabilities as `world` draws them."""
    p, labels = world(generator, 2000, classes, temperature)
    q = softmax(np.log(p) / temperature, -1)
    scores = np.sort(1 - q[np.arange(2000), labels]).tolist()
    return Deployment(
        [str(k) for k in range(classes)], 3, (8, 8), temperature=temperature, scores=scores
    )


def world(generator, images, classes, temperature, sharper=1.0):
    """Probabilities of which labels are right after scaling by T, or sharper than that."""
    logits = 3 * generator.normal(size=(images, classes))
    labels = drawn(softmax(logits, -1), generator)
    return softmax(sharper * temperature * logits, -1), labels


def test_the_answer():
    generator = np.random.default_rng(3)
    known = known_of(generator, 6, 1.5)
    for _ in range(3):
        found = check(*world(generator, 6000, 6, 1.5), known)
        assert found.answer.startswith("calibration holds to within 3 points: confidence − acc")
        assert found.p_ece > 0.001
        assert found.refitted.low < 1.5 < found.refitted.high or abs(found.gain.estimate) < 1e-3
    found = check(*world(generator, 6000, 6, 1.5, sharper=2.0), known)
    assert found.answer.startswith("calibration does not hold: the calibration error is ")
    assert "; sets for 90% of labels hold 8" in found.answer
    assert found.gap.low > 0.02
    assert found.p_ece < 0.01  # of 200 draws none
    assert found.p_coverage < 0.01
    assert found.refitted.low < 3 < found.refitted.high
    assert found.gain.low > 0
    (one,) = {check(*world(generator, 1, 6, 1.5), known).answer.partition(" is")[0]}
    assert one == "undecided: too few images: by 1 images confidence − accuracy"
    few = [check(*world(generator, 30, 6, 1.5), known).answer[:11] for _ in range(100)]
    assert Counter(few)["calibration"] <= 10  # wrongly refused: 5 of 100 are expected at most
    assert Counter(few)["undecided: "] >= 90
    # Ten images that are all right with confidence 1 say little of the eleventh.
    sure = np.tile([1 - 1e-6, 1e-6], (10, 1))
    answer = check(sure, np.zeros(10, int), Deployment(["a", "b"], 3)).answer
    assert answer.startswith("undecided")


def test_without_a_temperature_the_probabilities_as_they_are_are_asked(tmp_path, student, split):
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes(student.read_bytes())
    images, labels = split
    files = {f"{labels[i]}/{i}.png": encode(images[i].transpose(1, 2, 0)) for i in range(40)}
    found = json.loads(run(alone, write_tree(tmp_path / "new", files), "--json").stdout)
    assert found["temperature"] is None
    assert found["scaled"] is None
    assert found["calibration"]["temperature"] == 1
    assert found["calibration"]["coverage"] is None
    shown = run(alone, tmp_path / "new").stdout
    assert "Calibration, without temperature scaling:" in shown


def test_the_interval_of_the_temperature_is_as_wide_as_new_images_would_make_it():
    """By fits to resamples, of log T, with another minimiser."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 3, (500, 4))
    right = softmax(logits / 1.7, axis=1)
    labels = (right.cumsum(1) > rng.random((500, 1))).argmax(1)

    def fitted(rows):
        def loss(log_t):
            scaled = log_softmax(logits[rows] / np.exp(log_t), axis=1)
            return -scaled[np.arange(len(rows)), labels[rows]].mean()

        return minimize_scalar(loss, bounds=(-2, 2), method="bounded").x

    found = refit(softmax(logits, axis=1), labels)
    assert np.log(found.estimate) == pytest.approx(fitted(np.arange(500)), abs=1e-4)
    spread = np.std([fitted(rng.integers(0, 500, 500)) for _ in range(300)])
    half = np.log([found.estimate / found.low, found.high / found.estimate])
    assert half == pytest.approx([1.96 * spread] * 2, rel=0.15)
