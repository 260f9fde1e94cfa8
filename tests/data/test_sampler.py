from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from crossx.data.sampler import Draw, EpochSampler, EvaluationSampler, derive_seed
from crossx.errors import UsageError


def on_ranks(world_size, make):
    """Iterate a fresh sampler on each rank, as ranks of a process group would."""
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "is_initialized", lambda: True)
        patch.setattr(distributed, "get_world_size", lambda: world_size)
        for rank in range(world_size):
            patch.setattr(distributed, "get_rank", lambda rank=rank: rank)
            sampler = make()
            drawn = list(sampler)
            assert len(drawn) == len(sampler)
            outputs.append(drawn)
    return outputs


@given(st.integers(1, 60), st.integers(0, 2**62), st.integers(0, 1000))
@settings(max_examples=50)
def test_uniform_epoch_draws_each_image_once(count, seed, epoch):
    sampler = EpochSampler([0] * count, seed)
    sampler.set_epoch(epoch)
    draws = list(sampler)
    assert sorted(draw.index for draw in draws) == list(range(count))
    assert {(draw.epoch, draw.repeat) for draw in draws} <= {(epoch, 0)}
    assert draws == list(sampler)


def batches(draws, size):
    return [draws[start : start + size] for start in range(0, len(draws), size)]


@given(st.integers(1, 9), st.integers(0, 60), st.integers(1, 6), st.sampled_from(["uniform", "balanced"]))
@settings(max_examples=200)
def test_batches_of_all_ranks_are_those_of_one_process(world_size, more, batch_size, sampling):
    count = world_size + more
    labels = [index % 3 for index in range(count)]
    alone = batches(list(EpochSampler(labels, 5, sampling)), world_size * batch_size)
    ranks = on_ranks(world_size, lambda: EpochSampler(labels, 5, sampling, batch_size))
    ranks = [batches(draws, batch_size) for draws in ranks]
    steps = list(zip(*ranks, strict=True))
    for step, batch in zip(steps, alone, strict=False):
        assert Counter(draw for own in step for draw in own) == Counter(batch)
    left_out = alone[len(steps) :]
    assert sum(map(len, left_out)) < 2 * world_size
    sizes = [len(own) for step in steps for own in step]
    assert min(sizes) >= min(2, batch_size) or len(steps) == 1
    assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in steps)


def test_fewer_images_than_ranks_are_refused():
    with pytest.raises(UsageError, match=r"2 training images are too few for 3 processes"):
        on_ranks(3, lambda: EpochSampler([0, 1], 0))
    with pytest.raises(UsageError, match=r"2 pairs of training images are too few for 3 processes"):
        on_ranks(3, lambda: EpochSampler([0, 0, 0, 0], 0, "pairs", 2))


def in_pairs(draws):
    return list(zip(draws[::2], draws[1::2], strict=True))


label_lists = st.lists(st.sampled_from([0, 1, 2, 4, 7]), min_size=1, max_size=60)


@given(label_lists, st.integers(1, 6), st.integers(0, 2**62), st.integers(0, 1000))
@settings(max_examples=100)
def test_pairs_are_of_one_class_and_hold_every_image(labels, half, seed, epoch):
    sampler = EpochSampler(labels, seed, "pairs", 2 * half)
    sampler.set_epoch(epoch)
    draws = list(sampler)
    assert len(draws) == len(sampler)
    assert draws == list(sampler)
    assert len(set(draws)) == len(draws)
    drawn = Counter(draw.index for draw in draws)
    of_class = Counter(labels)
    assert drawn.keys() == set(range(len(labels)))
    for label, count in of_class.items():
        twice = [index for index, times in drawn.items() if labels[index] == label and times == 2]
        assert len(twice) == count % 2
    for first, second in in_pairs(draws):
        assert labels[first.index] == labels[second.index]
        assert first.index != second.index or of_class[labels[first.index]] == 1


@given(label_lists, st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=100)
def test_pairs_of_a_batch_are_of_different_classes(labels, half, seed):
    left = Counter({label: (count + 1) // 2 for label, count in Counter(labels).items()})
    for batch in batches(list(EpochSampler(labels, seed, "pairs", 2 * half)), 2 * half):
        classes = Counter(labels[first.index] for first, _ in in_pairs(batch))
        # as many classes as there are places, or as still have pairs
        assert len(classes) == min(half, len(+left))
        left.subtract(classes)
    assert not +left


def test_a_class_is_drawn_in_the_measure_of_its_pairs():
    """Whole batches of different classes to the end, where the largest class has a pair for each."""
    labels = [0] * 20 + [1] * 10 + [2] * 10
    for seed in range(5):
        sizes = [
            len({labels[draw.index] for draw in batch})
            for batch in batches(list(EpochSampler(labels, seed, "pairs", 4)), 4)
        ]
        assert len(sizes) == 10
        assert sizes.count(2) >= 7


@given(st.integers(1, 5), st.integers(5, 40), st.integers(1, 4))
@settings(max_examples=100)
def test_pairs_stay_on_one_rank(world_size, pairs, half):
    labels = [index // 2 % 7 for index in range(2 * pairs)]
    alone = batches(list(EpochSampler(labels, 5, "pairs", 2 * half * world_size)), 2 * half * world_size)
    ranks = on_ranks(world_size, lambda: EpochSampler(labels, 5, "pairs", 2 * half))
    steps = list(zip(*(batches(draws, 2 * half) for draws in ranks), strict=True))
    for step, batch in zip(steps, alone, strict=False):
        assert Counter(pair for own in step for pair in in_pairs(own)) == Counter(in_pairs(batch))
        assert max(map(len, step)) - min(map(len, step)) in (0, 2)
    # a batch is left out only where a rank would have no pair of it
    assert sum(map(len, alone[len(steps) :])) < 2 * world_size


def test_undealt_draws_are_those_of_one_process_on_every_rank():
    labels = [0] * 11
    ranks = on_ranks(3, lambda: EpochSampler(labels, 0, dealt=False))
    assert ranks == [list(EpochSampler(labels, 0))] * 3


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler([0] * 50, seed)
        sampler.set_epoch(epoch)
        return tuple(draw.index for draw in sampler)

    orders = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_order_does_not_touch_or_read_the_global_generator():
    sampler = EpochSampler(list(range(20)), 0, "balanced")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = list(sampler)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert list(sampler) == first


def test_balanced_draws_classes_equally_and_images_of_a_class_equally():
    labels = [0] * 900 + [1] * 90 + [3] * 10  # class 2 is absent
    sampler = EpochSampler(labels, 0, "balanced")
    by_class, of_rare = Counter(), Counter()
    epochs = 12
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        indices = [draw.index for draw in sampler]
        assert len(indices) == 1000
        by_class.update(labels[index] for index in indices)
        of_rare.update(index for index in indices if labels[index] == 3)
    expected = epochs * 1000 / 3
    assert by_class.keys() == {0, 1, 3}
    # five standard deviations of a binomial count
    assert all(abs(n - expected) < 5 * (expected * 2 / 3) ** 0.5 for n in by_class.values())
    assert of_rare.keys() == set(range(990, 1000))
    assert all(abs(n - expected / 10) < 5 * (expected / 10) ** 0.5 for n in of_rare.values())


def test_repeats_of_an_image_are_counted():
    draws = list(EpochSampler([0] * 30 + [1], 0, "balanced"))
    repeats = [draw.repeat for draw in draws if draw.index == 30]
    assert len(repeats) > 1
    assert repeats == list(range(len(repeats)))


@given(st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=50)
def test_evaluation_counts_every_image_once(count, world_size):
    ranks = on_ranks(world_size, lambda: EvaluationSampler(count))
    if count < world_size:
        assert ranks == [list(range(count))] * world_size
    else:
        assert sorted(index for rank in ranks for index in rank) == list(range(count))
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_evaluation_on_one_rank_is_in_order():
    assert list(EvaluationSampler(5)) == [0, 1, 2, 3, 4]


def test_derived_seeds_are_fixed_and_distinct():
    # half of `printf 0/1/2/0 | b2sum -l 64`, least significant byte first; another hash would change every run
    assert derive_seed(0, 1, 2, 0) == 6_280_552_979_123_227_782
    assert 0 <= derive_seed("x") < 2**63
    draws = [Draw(epoch, index, repeat) for epoch in range(10) for index in range(50) for repeat in range(2)]
    seeds = {derive_seed(0, draw.epoch, draw.index, draw.repeat) for draw in draws}
    assert len(seeds) == len(draws)
    assert derive_seed(1, 23) != derive_seed(12, 3)
