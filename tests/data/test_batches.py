"""Batches come in one order whatever reads them; bad images stop the run or are left out and counted."""

from __future__ import annotations

import gc
import pickle
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from written_datasets import (
    Written,
    image_of,
    png,
    put,
    put_tar,
    write_class_folders,
    write_hugging_face,
    write_parquet,
)

from coss_eval.data import images, sources
from coss_eval.data.batches import Batch, Geometry
from coss_eval.data.open import load_dataset
from coss_eval.data.split import Split
from coss_eval.errors import CossError

GEOMETRY = Geometry(24, crop_pct=0.8)


def read(split: Split, **options: object) -> Batch:
    """All batches of a split as one."""
    batches = list(split.batches(GEOMETRY, **options))
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_the_order_is_fixed(workers: int, batch_size: int, varied: Path, tmp_path: Path) -> None:
    for folder in (varied, write_hugging_face(tmp_path).folder):
        split = load_dataset(folder).train
        once = read(split, batch_size=batch_size, workers=workers)
        assert equal(once, read(load_dataset(folder).train, batch_size=256, workers=0))
        assert equal(once, read(split, batch_size=5, workers=0))  # now from memory
        assert torch.equal(once.labels, torch.from_numpy(split.labels))
        assert torch.equal(once.ids, torch.from_numpy(split.ids))


def test_what_workers_get_is_small_and_whole(written: Written) -> None:
    source = load_dataset(written.folder).train.images._source
    read_before = source.open(9).read()  # leaves a parquet row group in memory, which is not sent along
    sent = pickle.dumps(source)
    assert len(sent) < 2000
    assert pickle.loads(sent).open(9).read() == read_before


def test_shapes_and_types(varied: Path) -> None:
    sizes = []
    for batch in load_dataset(varied).test.batches(GEOMETRY, batch_size=3):
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
        assert batch.images.shape[1:] == (3, 24, 24)
        sizes.append(len(batch.images))
    assert sizes == [3, 3, 2]


def test_changing_a_batch_does_not_change_the_next_pass(varied: Path) -> None:
    for name in (varied, "digits"):
        split = load_dataset(name).test
        whole = read(load_dataset(name).test)
        for _ in range(2):  # decoded, then from memory
            for batch in split.batches(GEOMETRY):
                batch.images.zero_()
        assert equal(whole, read(split))


def test_no_global_generator_is_touched(varied: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    split = load_dataset(varied).train
    read(split.limited(4), workers=0)
    read(split.holdout(0.5)[0], workers=2, batch_size=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002


def parts(split: Split) -> list[Split]:
    fit, select = split.holdout(0.4)
    return [split.limited(4), fit, select, split.subset([7, 0, 3, 3, 5]), split, split.subset([2, 1])]


def test_parts_are_the_same_images(varied: Path) -> None:
    split = load_dataset(varied).train
    whole = read(load_dataset(varied).train)
    for part in parts(split):  # in turn, from what the parts before left in memory
        assert equal(read(part, batch_size=3), Batch(*(x[part.indices] for x in whole)))


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 1, 5])
def test_sets_larger_than_memory_are_streamed(room: int, varied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(load_dataset(varied).train)
    monkeypatch.setattr(images, "MEMORY_BYTES", room * 3 * 24 * 24)
    split = load_dataset(varied).train
    for part in (split.subset([1, 5]), *parts(split), split):
        for workers in (0, 2):
            assert equal(read(part, batch_size=3, workers=workers), Batch(*(x[part.indices] for x in whole)))
    held = split.images._memory[1]
    assert held._pixels.shape[0] == room


def test_two_passes_at_once(varied: Path) -> None:
    split = load_dataset(varied).train
    pairs = list(zip(split.batches(GEOMETRY, batch_size=3), split.batches(GEOMETRY, batch_size=3), strict=True))
    assert all(equal(a, b) for a, b in pairs)
    small, large = split.batches(GEOMETRY, batch_size=4), split.batches(Geometry(32), batch_size=4)
    sizes = [(a.images.shape[-1], b.images.shape[-1]) for a, b in zip(small, large, strict=True)]
    assert sizes == [(24, 32)] * 2


@pytest.mark.slow
def test_an_unfinished_pass_leaves_no_workers(varied: Path) -> None:
    import multiprocessing

    before = set(multiprocessing.active_children())  # other tests' pools may still be there
    next(load_dataset(varied).train.batches(GEOMETRY, batch_size=1, workers=2))
    gc.collect()
    assert set(multiprocessing.active_children()) <= before


# Bad images


def cut(folder: Path, key: str) -> None:
    """Half of the file is lost."""
    file = folder / key
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil_files(folder: Path) -> list[str]:
    write_class_folders(folder)
    cut(folder, "train/n01/3.png")
    put(folder / "train" / "n02" / "1.png", b"<html>404</html>")
    put(folder / "train" / "n03" / "9.png", b"")
    return ["train/n01/3.png", "train/n02/1.png", "train/n03/9.png"]


def spoil_rows(folder: Path) -> list[str]:
    write_hugging_face(folder)
    rows: list[tuple[object, object]] = [(png(image_of("train", i % 3, i)), i % 3) for i in range(16)]
    rows[2], rows[7], rows[8] = (rows[2][0][:60], 2), (None, 1), (b"GIF89a", 2)
    write_parquet(folder / "train.parquet", rows)
    return ["train/2", "train/7", "train/8"]


SPOIL: dict[str, Callable[[Path], list[str]]] = {"files": spoil_files, "parquet": spoil_rows}


@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_bad_images_stop_the_run_all_named(spoil: str, workers: int, batch_size: int, tmp_path: Path) -> None:
    keys = SPOIL[spoil](tmp_path)
    split = load_dataset(tmp_path).train
    assert split.native_size == (12, 12)
    for _ in range(2):  # the second time from memory
        with pytest.raises(CossError, match="3 of 16 train images cannot be read") as caught:
            read(split, workers=workers, batch_size=batch_size)
        assert all(key in str(caught.value) for key in keys)
        assert "\n" not in str(caught.value)
        assert "--skip-bad-images" in str(caught.value)


@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_bad_images_are_left_out_and_listed(spoil: str, workers: int, batch_size: int, tmp_path: Path) -> None:
    keys = SPOIL[spoil](tmp_path)
    split = load_dataset(tmp_path, skip_bad_images=True).train
    good = np.array([key not in keys for key in split.keys])
    for _ in range(2):
        batch = read(split, workers=workers, batch_size=batch_size)
        assert len(batch.images) == len(batch.labels) == 13
        assert np.array_equal(batch.ids, split.ids[good])
        assert np.array_equal(batch.labels, split.labels[good])
    assert list(split.bad_images) == keys
    assert all(split.bad_images.values())
    whole = split.subset(np.flatnonzero(good))
    assert not whole.bad_images
    assert equal(read(whole, skip_bad_images=False), batch)
    with pytest.raises(CossError, match="3 of 16"):
        read(split, skip_bad_images=False)


def test_many_bad_images_are_counted_and_some_named(tmp_path: Path) -> None:
    written = write_class_folders(tmp_path)
    for key in list(written.test)[:7]:
        cut(tmp_path, key)
    with pytest.raises(CossError, match=r"7 of 9 test images.*and 2 more; mend"):
        read(load_dataset(tmp_path).test)


def test_a_tenth_of_odd_sizes_is_cut_to_the_others_and_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    put(tmp_path / "val" / "n03" / "zz.png", png(image_of("val", 0, 0, 13)))
    data = load_dataset(tmp_path)  # 1 of 10
    assert data.train.native_size == data.test.native_size == (12, 12)
    assert data.notes == ("1 of the test images are not 12x12 px and are cut to it: val/n03/zz.png (13x13)",)
    assert len(read(data.test).images) == 10


def test_more_odd_sizes_end_native_sizes_and_it_says_why(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    for name in ("y.png", "z.png"):
        put(tmp_path / "val" / "n03" / name, png(image_of("val", 0, 0, 13)))
    data = load_dataset(tmp_path)  # 2 of 11
    assert data.train.native_size is data.test.native_size is None
    assert "only 82 % of them are 12x12 px" in data.notes[0]
    assert "val/n03/y.png (13x13); val/n03/z.png (13x13)" in data.notes[0]


def test_an_odd_size_found_later_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{split}/n01/{i:02}.png" for split in ("train", "val") for i in range(34)]
    for name in names:
        put(tmp_path / name, png(image_of("val", 0, 0, 13 if name == "val/n01/32.png" else 12)))
    monkeypatch.setattr(images, "_header_sample", lambda count: [0, 1, 33])
    monkeypatch.setattr(images, "READ_ALL_HEADERS", 3)
    split = load_dataset(tmp_path).test
    assert split.native_size == (12, 12)
    with pytest.raises(CossError, match=r"1 of 34 test images.*32.png \(13x13 pixels"):
        read(split)


@pytest.mark.parametrize("count", [1, 31, 1024, 1025, 10_000, 1_281_167])
def test_headers_are_sampled_over_the_whole_set(count: int) -> None:
    sample = list(images._header_sample(count))
    assert (sample[0], sample[-1]) == (0, count - 1)
    assert len(sample) == (min(count, 1024))
    assert len(set(sample)) == len(sample)


def test_the_search_for_more_bad_images_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coss_eval.data.split.LOOK_FURTHER", 4)
    spoil_files(tmp_path)
    with pytest.raises(CossError, match="2 of the first 8 train images"):
        read(load_dataset(tmp_path).train, batch_size=2)


def write_groups(folder: Path, groups: tuple[int, ...], *, dictionary: bool = False) -> Path:
    """Two parquet files of noise of some 2 kB an image, so many a row group."""
    rows = [(png(image_of("train", i % 3, i, 24)), i % 3) for i in range(40)]
    rows = [rows[i // 4 * 4] for i in range(40)] if dictionary else rows
    for split, count in (("train", 40), ("test", 4)):
        write_parquet(folder / f"{split}.parquet", rows[:count], group=groups[0] if split == "train" else 4)
    return folder


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("group", [3, 40])
def test_row_groups_larger_than_memory_are_read_in_blocks(
    group: int, dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order; at no time more than HELD_BYTES of them, whatever the size of a group."""
    write_groups(tmp_path, (group,), dictionary=dictionary)
    whole = load_dataset(tmp_path).train.images
    contents = [whole.raw(i) for i in range(40)]
    monkeypatch.setattr(sources, "HELD_BYTES", 16_000)
    split = load_dataset(tmp_path).train
    source = split.images._source
    assert len(source._blocks) > (1 if group == 40 else 13)  # as a group of one value is small, it is not cut further
    for order in (range(40), range(39, -1, -1), np.random.default_rng(0).permutation(40).tolist()):
        for index in order:
            assert split.images.raw(index) == contents[index]
            assert sum(map(source._weight, source._held.values())) <= 16_000 or len(source._held) == 1
    if not dictionary:
        assert len(source._held) > 1


def test_memory_does_not_grow_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the images: the same peak, but for the labels, keys and ids of each, whatever holds them."""
    monkeypatch.setattr(sources, "HELD_BYTES", 200_000)
    monkeypatch.setattr(images, "MEMORY_BYTES", 0)
    raw = [png(image_of("train", 0, i, 100)) for i in range(10)]  # 30 kB each, and as much decoded

    def folders(at: Path, count: int) -> None:
        for i in range(count):
            put(at / "val" / "n01" / f"{i}.png", raw[i % 10])

    def parquet(at: Path, count: int) -> None:
        rows = [(raw[i % 10] + bytes([i // 10]), 0) for i in range(count)]
        write_parquet(at / "val.parquet", rows, group=count, page=4)

    def tar(at: Path, count: int) -> None:
        samples = {f"{i}.{kind}": x for i in range(count) for kind, x in (("cls", b"0"), ("png", raw[i % 10]))}
        put_tar(at / "val.tar", samples)

    for write in (folders, parquet, tar):
        peaks = []
        for count in (8, 40, 400):  # the first one imports what it takes
            write(tmp_path / write.__name__ / str(count), count)
            gc.collect()
            before = pa.total_allocated_bytes()
            tracemalloc.start()
            split = load_dataset(tmp_path / write.__name__ / str(count)).test
            most = 0
            for batch in split.batches(GEOMETRY, batch_size=8, workers=0):
                most = max(most, pa.total_allocated_bytes() - before)
                assert len(batch.ids) == 8
            peaks.append(tracemalloc.get_traced_memory()[1] + most)
            tracemalloc.stop()
        assert peaks[2] < peaks[1] + 360 * 2_000, write.__name__  # of 30 kB an image


def test_training_images_are_shuffled_by_row_group_and_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_groups(tmp_path, (2,))
    first = load_dataset(tmp_path).train
    assert first.images.blocks(first.native_size) is None  # all of them stay in memory
    plain = np.random.default_rng([3, 0]).permutation(40)
    assert np.array_equal(first.shuffled(np.random.default_rng([3, 0])), plain)
    monkeypatch.setattr(images, "MEMORY_BYTES", 0)
    monkeypatch.setattr(sources, "HELD_BYTES", 32_000)
    split = load_dataset(tmp_path).train
    source = split.images._source
    together = source.blocks.together
    assert 2 <= together <= 5
    orders = [split.shuffled(np.random.default_rng([3, epoch])) for epoch in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1])  # as a run that goes on has it
    assert not np.array_equal(orders[0], orders[2])
    reads = []
    monkeypatch.setattr(source, "_read", lambda number, real=source._read: reads.append(number) or real(number))
    for order in orders:
        assert sorted(order.tolist()) == list(range(40))
        assert all(
            len({place // 2 for place in order[i : i + 2 * together]}) <= together for i in range(0, 40, 2 * together)
        )
        assert len({place // 2 for place in order[: 2 * together].tolist()}) > 1
        reads.clear()
        for place in order:
            split.images.raw(int(place))
        assert len(reads) <= 20  # each group once
    part = split.subset(np.arange(0, 40, 3))
    assert sorted(part.shuffled(np.random.default_rng(0)).tolist()) == list(range(len(part)))
