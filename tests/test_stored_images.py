"""Images read in parts against the arrays that were stored."""

import multiprocessing

import h5py
import numpy as np
import pytest

from ensdistill import InputError
from ensdistill.images import evaluation_images, read_description, read_images
from ensdistill.stored_images import StoredImages
from tests.builders import noise
from tests.stores import png, sorted_file, store, store_files

PIXELS, LABELS = noise(23, 3, 7, 9), np.arange(23) % 5
PLACES = [
    [0],
    [22, 0, 5],
    [3, 4, 5, 6],
    [8, 1, 8, 2, 8],
    list(range(23)),
    list(range(22, -1, -1)),
    [],
]


@pytest.fixture(params=[None, 1, 5], ids=lambda it: f"chunk {it}")
def stored(request, tmp_path):
    path = tmp_path / "images.h5"
    with h5py.File(path, "w") as file:
        store(file, "train", PIXELS, LABELS, request.param)
    return StoredImages(path, "train")


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_images_come_in_the_order_asked(stored, places):
    np.testing.assert_array_equal(stored.read(places), PIXELS[np.array(places, int)])
    assert stored.read(places).dtype == np.uint8
    np.testing.assert_array_equal(stored.labels, LABELS)
    assert (stored.shape, stored.nbytes, len(stored)) == (PIXELS.shape, PIXELS.size, 23)


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_chosen_images_come_as_if_there_were_no_others(stored, places):
    chosen = np.random.default_rng(0).permutation(23)[:23]
    own = stored.choose(chosen)
    np.testing.assert_array_equal(own.read(places), PIXELS[chosen][np.array(places, int)])
    np.testing.assert_array_equal(own.labels, LABELS[chosen])
    np.testing.assert_array_equal(stored.choose([4, 2]).choose([1]).read([0]), PIXELS[[2]])


def test_no_part_of_the_file_is_read_that_no_image_asked_for_shares_a_chunk_with(stored):
    spans = [(it.start, it.stop) for it in stored._spans(np.array([0, 3, 5, 6, 9, 20]), (5,))]
    assert spans == [(0, 2), (2, 5), (5, 6)]  # 0 3 | 5 6 9 | 20
    spans = [(it.start, it.stop) for it in stored._spans(np.array([3, 4, 5, 9, 11]), (5,))]
    assert spans == [(0, 4), (4, 5)]  # 3 4 5 9: neighbours over the border, then their chunk


def test_of_larger_images_the_centre_is_read(tmp_path):
    path = sorted_file(tmp_path / "images.h5", side=6, train_side=9)
    centre = noise(24, 3, 9, 9, seed=0)[:, :, 1:7, 1:7]
    np.testing.assert_array_equal(read_images(path, "train")[0], centre)
    np.testing.assert_array_equal(evaluation_images(path, "train").read([5, 2]), centre[[5, 2]])
    assert StoredImages(path, "train").shape == (24, 3, 9, 9)
    assert evaluation_images(path, "train").shape == (24, 3, 6, 6)
    assert read_description(path)["shape"] == (3, 6, 6)


def test_files_are_decoded_to_the_pixels_that_they_were(tmp_path):
    pixels = noise(6, 3, 8, 8)
    with h5py.File(tmp_path / "images.h5", "w") as file:
        files = [png(it) for it in pixels]
        store_files(file, "train", files, LABELS[:6], resize=8, mode="RGB")
        store(file, "val", pixels[:, :, 2:6, 2:6], LABELS[:6])
    stored = StoredImages(tmp_path / "images.h5", "train")
    assert stored.encoded
    assert (stored.shape, stored.block) == ((6, 3, 8, 8), 1)
    np.testing.assert_array_equal(stored.read([4, 0, 4]), pixels[[4, 0, 4]])
    centre, _ = read_images(tmp_path / "images.h5", "train")
    np.testing.assert_array_equal(centre, pixels[:, :, 2:6, 2:6])


def test_a_damaged_chunk_is_told_when_it_is_read(stored):
    with h5py.File(stored.path, "r") as file:
        images = file["train/images"]
        place = images.id.get_chunk_info(images.id.get_num_chunks() - 1).byte_offset
    content = bytearray(stored.path.read_bytes())
    content[place + 20] ^= 1
    stored.path.write_bytes(content)
    with pytest.raises(InputError, match=r"images\.h5: damaged"):
        stored.read([22])


def _read(stored, places):
    return stored.read(places)


def test_a_process_that_was_forked_reads_by_itself(stored):
    stored.read([0])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(_read, [(stored, [place, 3]) for place in range(10)])
    for place, images in enumerate(found):
        np.testing.assert_array_equal(images, PIXELS[[place, 3]])
