"""Results are the same however few images are looked at together, and take no more memory."""

import tracemalloc
from collections import Counter

import h5py
import numpy as np
import pandas as pd
import pytest

from ensdistill import InputError, blocks, findings, predictions
from ensdistill.bootstrap import Estimate
from ensdistill.judging import fitted, judge
from ensdistill.metrics import METRICS, ensemble_probs, human_kl
from ensdistill.predictions import Mixture, join, read_prediction
from ensdistill.reports import (
    corruptions,
    diversity_students,
    diversity_teachers,
    out_of_distribution,
    reliability,
    saturation,
    scores,
    selective,
    sweep,
    transfer,
)
from ensdistill.resampled import ResampledSystems, ensemble_nll

POOL, K = 3, 4
TITLES = {"titles": {"clean": "as they are", "ods": "A step"}, "eta": 0.25, "etas": [0.1, 0.2]}


def write(path, arrays, **attributes):
    """A file whose arrays stand in chunks of ten images, so that they are read in several."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            images = array.ndim - 3 if name.endswith("logits") else 0
            chunks = tuple(10 if axis == images else n for axis, n in enumerate(array.shape))
            file.create_dataset(name, data=array, chunks=chunks)
    with h5py.File(path, "a") as file:
        for key, value in attributes.items():
            file.attrs[key] = value if isinstance(value, str | float | int) else str(value)
    return str(path)


class Study:
    """Files of teachers, of students of three kinds, and of analyses."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        counts = {"val": 44, "test": 53, "out_of_distribution/far": 31}
        counts |= {"corrupted/fog/0": 25, "corrupted/fog/4": 25}
        labels = {split: rng.integers(0, K, count) for split, count in counts.items()}

        def network(name, members, **attributes):
            arrays = {}
            for split, y in labels.items():
                logits = rng.normal(0, 2, (len(y), members, K))
                logits[np.arange(len(y)), :, y] += 1
                logits[:4] = np.round(logits[:4])  # with classes that tie
                arrays |= {f"{split}/logits": logits.astype(np.float32), f"{split}/labels": y}
            return write(folder / f"{name}.h5", arrays, parameters=members, **attributes)

        def noise(*shape):
            return rng.normal(0, 2, (*shape, K)).astype(np.float32)

        self.pool = [network(f"teacher{seed}", 1) for seed in range(POOL)]
        dirichlet = {"prediction": "dirichlet", "concentration_offset": 1.0}
        self.students = {
            "A": [network(f"a{seed}", 2) for seed in range(2)],
            "D": [network("d", 1, **dirichlet)],
            "one": [network("one", 1)],
        }
        said = {key: str(value).replace("'", '"') for key, value in TITLES.items()} | {"eta": 0.25}
        moved = {f"{name}/logits": noise(33, 2) for name in ("clean", "ods")}
        moved["labels"] = rng.integers(0, K, 33)
        self.perturbed = write(folder / "perturbed.h5", moved, **said)
        both = {f"{name}/logits": noise(2, 21, 2) for name in ("clean", "ods")}
        self.swept = write(folder / "swept.h5", both, **said)
        both = {"clean/logits": noise(21, POOL), "ods/logits": noise(POOL, 21, POOL)}
        self.transferred = write(folder / "transferred.h5", both)

    def tables(self):
        files = self.pool, self.students
        yield scores.table(*files, n_bins=5)
        yield reliability.table(*files, n_bins=5)
        yield selective.table(*files)
        yield out_of_distribution.table(*files, *files, ["far"])
        yield corruptions.table(*files, n_bins=5)
        yield diversity_students.table(*files, n_bins=5)
        yield diversity_teachers.table(self.perturbed, self.pool, 5)
        yield saturation.table(self.perturbed, self.pool)
        yield sweep.table(self.swept, self.perturbed, self.pool)
        yield transfer.table(self.transferred, 2)

    def estimates(self):
        """What claims and findings are about, by name."""
        found = ResampledSystems(self.pool, self.students, 2, 5)
        known = {f"{x} {key}": it for x, its in found.metrics.items() for key, it in its.items()}
        systems = findings.measured(*(self.pool, self.students) * 2, 2)
        for name, value in {**vars(systems), "curve": found.curve}.items():
            values = value if isinstance(value, dict) else {"": value}
            known |= {f"{name} {key}": it for key, it in values.items()}
        return known


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def together(monkeypatch, logits):
    monkeypatch.setattr(blocks, "WHOLE", 0)
    monkeypatch.setattr(blocks, "BLOCK", logits)


@pytest.mark.parametrize("images", [7, 12, 1])
def test_tables_do_not_depend_on_how_many_images_are_looked_at_together(study, monkeypatch, images):
    whole = list(study.tables())
    together(monkeypatch, images * K)  # of one network
    for expected, found in zip(whole, study.tables(), strict=True):
        # Alone a class-wise ECE sums over images, which no values of theirs are kept of.
        moved = [column for column in found if column == "classwise_ece"]
        pd.testing.assert_frame_equal(found[moved], expected[moved], rtol=0, atol=1e-12)
        pd.testing.assert_frame_equal(
            found.drop(columns=moved), expected.drop(columns=moved), **EXACT
        )


EXACT = {"check_exact": True}


def test_neither_do_estimates_of_claims_and_findings(study, monkeypatch):
    whole = study.estimates()
    together(monkeypatch, 7 * K)
    for name, found in study.estimates().items():
        expected = whole[name]
        if isinstance(found, Estimate):
            np.testing.assert_array_equal(found.measured, expected.measured, name)
            np.testing.assert_array_equal(found.resampled, expected.resampled, name)
        else:
            assert found == expected, name


def test_peoples_answers_are_those_of_the_images_in_the_block(monkeypatch):
    rng, chosen = np.random.default_rng(1), {"human_kl": METRICS["human_kl"]}
    logits, human = rng.normal(size=(53, 2, K)), rng.dirichlet(np.ones(K), 53)
    together(monkeypatch, 7 * K)
    (found,) = judge(chosen, [Mixture(logits)], np.zeros(53, int), 5, human=human)
    assert found["human_kl"] == human_kl(ensemble_probs(logits), human)


@pytest.mark.parametrize("logits", [1, 3 * K, 10 * K, 25 * K, 10_000])
def test_every_image_is_looked_at_once_and_few_together(monkeypatch, logits):
    together(monkeypatch, logits)
    systems = [Mixture(np.zeros((53, members, K))) for members in (1, 2)]
    systems[0].together = 10
    parts = list(blocks.blocks(systems))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(53))
    assert max(part.stop - part.start for part in parts) <= max(1, logits // (2 * K))
    # What stands together in a file is not torn apart between two others.
    ends = {part.stop for part in parts}
    assert ends >= set(range(10, 53, 10)) or all(end % 10 == 0 or end == 53 for end in ends)


def test_a_single_block_is_the_prediction_itself(study):
    prediction, _ = read_prediction(study.pool[0], "test")
    assert prediction.part(slice(0, 53)) is prediction
    np.testing.assert_array_equal(prediction.part(slice(3, 9)).logits, prediction.logits[3:9])


def test_whole_arrays_are_to_be_had_too(study, monkeypatch):
    methods = ["probs", "entropy", "doubt", "mean_logits", "energy", "max_logit"]
    methods += ["mutual_information", "diversity", "disagreement"]
    for path in (study.students["A"][0], study.students["D"][0]):
        small, _ = read_prediction(path, "test")
        with monkeypatch.context() as patch:
            together(patch, 7 * K)
            large, _ = read_prediction(path, "test")
            assert type(large) is not type(small)
            np.testing.assert_allclose(large.logits, small.logits, rtol=1e-12)
            for name in methods:
                expected, found = getattr(small, name)(), getattr(large, name)()
                if expected is None:
                    assert found is None
                else:
                    np.testing.assert_array_equal(found, expected, name)


def test_ensembles_of_one_pool_share_the_reading_of_its_files(study, monkeypatch):
    together(monkeypatch, 7 * K)
    pool = [read_prediction(path, "test") for path in study.pool]
    opened, whole = Counter(), predictions.open_hdf5

    def counted(path):
        opened[path] += 1
        return whole(path)

    monkeypatch.setattr(predictions, "open_hdf5", counted)
    ensemble_nll([it for it, _ in pool], pool[0][1], [1, 2, 3])
    assert opened == dict.fromkeys(study.pool, 6)  # 53 images, of which ten stand together
    systems = [join([pool[i][0] for i in chosen]) for chosen in [(0, 1), (0, 2), (1, 2)]]
    opened.clear()
    fitted(systems, pool[0][1])
    assert max(opened.values()) < 6 * 30  # a pass for each slope that one of the three needs


@pytest.mark.parametrize("place", [2, 52])
def test_logits_that_are_not_finite_are_refused_when_they_are_read(tmp_path, monkeypatch, place):
    logits = np.zeros((53, 1, K), np.float32)
    logits[place] = np.inf
    path = write(tmp_path / "x.h5", {"test/logits": logits, "test/labels": np.zeros(53, int)})
    with pytest.raises(InputError, match=r"x\.h5: some test logits are not finite"):
        read_prediction(path, "test")
    together(monkeypatch, 7 * K)
    prediction, _ = read_prediction(path, "test")
    with pytest.raises(InputError, match=r"x\.h5: some test logits are not finite"):
        prediction.entropy()


def test_memory_grows_with_the_block_and_not_with_the_images(tmp_path, monkeypatch):
    classes, images = 500, 2000
    rng = np.random.default_rng(0)
    paths = []
    for place, members in enumerate((1, 1, 2)):
        arrays = {}
        for split in ("val", "test"):
            logits = rng.standard_normal((images, members, classes), np.float32)
            labels = np.arange(images) % classes
            arrays |= {f"{split}/logits": logits, f"{split}/labels": labels}
        paths.append(write(tmp_path / f"{place}.h5", arrays, parameters=1))
    together(monkeypatch, 2**14)
    tracemalloc.start()
    try:
        scores.table(paths[:2], {"A": paths[2:]}, n_bins=5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images * classes * 8 / 2  # half of what the probabilities of one system take
