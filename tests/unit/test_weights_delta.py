"""From a state to a payload and back, without sockets: bit for bit, in the smaller form, whatever the base."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_support import Named, assert_same_bits, awkward, changed, model

from orz_async.weights.assembly import Assembly, DamagedTransfer
from orz_async.weights.manifest import Limits, check
from orz_async.weights.payload import Payload
from orz_async.weights.shelf import HOLD_S, Shelf
from orz_async.weights.snapshot import State, capture

SEGMENT = 32 << 10  # a dozen of them in a small model


def shelf_of(*versions: Named, history: int = 8, chunk_bytes: int = 1000) -> Shelf:
    shelf = Shelf(chunk_bytes=chunk_bytes, history=history, segment_bytes=SEGMENT)
    for version, named in enumerate(versions):
        shelf.put(capture(version, named.items()), 0.0)
        settle(shelf)
    return shelf


def settle(shelf: Shelf) -> None:
    while shelf.busy:
        shelf.work(0.0)


def payload(shelf: Shelf, base: State | None) -> Payload:
    digest = "" if base is None else base.digest
    shelf.payload_for(digest, 0.0)
    settle(shelf)
    made = shelf.payload_for(digest, 0.0)
    assert made is not None
    return made


def carry(source: Payload, base: State | None) -> State:
    check(source.manifest, limits=Limits())
    assembly = Assembly(source.manifest, base)
    for index in range(source.manifest.num_chunks):
        assert not assembly.complete
        assembly.feed(source.chunk(index).data)
    assert assembly.complete
    return assembly.state()


# Chunks of a few bytes, smaller and larger than segments, and everything in one.
@pytest.mark.parametrize("chunk_bytes", [97, 4096, 50_000, 1 << 20])
def test_a_full_payload_makes_the_same_bits(chunk_bytes: int) -> None:
    named = model()
    state = carry(payload(shelf_of(named, chunk_bytes=chunk_bytes), None), None)
    assert_same_bits(state.tensors, named)
    assert state.digest == capture(0, named.items()).digest


def test_a_delta_makes_the_same_bits_from_few_bytes() -> None:
    old, new = model(), changed(model(), 1)
    base = capture(0, old.items())
    source = payload(shelf_of(old, new), base)
    assert source.manifest.base_digest == base.digest
    assert source.manifest.payload_bytes < 0.15 * base.num_bytes
    before = {name: tensor.clone() for name, tensor in base.tensors.items()}
    state = carry(source, base)
    assert_same_bits(state.tensors, new)
    assert_same_bits(base.tensors, before)  # it is still being served
    assert state.tensors["steps"] is base.tensors["steps"]  # unchanged: shared, not copied
    assert {block.form for entry in source.manifest.entries for block in entry.blocks} == {"same", "delta"}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_change_of_any_bits_arrives(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]))
    count = draw(st.sampled_from([1, 7, 2048, 2049, 5000]))
    seed = draw(st.integers(0, 1 << 16))
    size = torch.empty((), dtype=dtype).element_size()
    rng = np.random.default_rng(seed)
    versions = [rng.integers(0, 256, count * size, np.uint8)]
    for fraction in draw(st.lists(st.sampled_from([0.0, 0.001, 0.2, 1.0]), min_size=1, max_size=4)):
        where = rng.random(count * size) < fraction
        versions.append(np.where(where, rng.integers(0, 256, count * size, np.uint8), versions[-1]))
    named = [{"w": torch.from_numpy(v).view(dtype), "fixed": torch.ones(3)} for v in versions]
    shelf = shelf_of(*named, chunk_bytes=draw(st.sampled_from([5, 777, 1 << 20])))
    base = capture(0, named[0].items())
    source = payload(shelf, base)
    assert source.manifest.payload_bytes <= base.num_bytes
    assert_same_bits(carry(source, base).tensors, named[-1])


def test_a_laggard_gets_one_merged_delta() -> None:
    versions = [model()]
    for seed in range(4):
        versions.append(changed(versions[-1], seed))
    shelf = shelf_of(*versions)
    single = payload(shelf, capture(3, versions[3].items())).manifest.payload_bytes
    for lag in (2, 4):
        base = capture(4 - lag, versions[4 - lag].items())
        source = payload(shelf, base)
        assert source.manifest.base_version == 4 - lag
        assert single < source.manifest.payload_bytes < lag * single
        assert_same_bits(carry(source, base).tensors, versions[4])


def test_a_word_that_came_back_does_not_travel() -> None:
    first, second = model(), changed(model(), 1)
    shelf = shelf_of(first, second, first)
    base = capture(0, first.items())
    source = payload(shelf, base)
    assert source.manifest.payload_bytes == 0
    assert carry(source, base).version == 2


def test_an_unchanged_version_costs_nothing_but_its_number() -> None:
    shelf = shelf_of(model(), model())
    source = payload(shelf, capture(0, model().items()))
    assert (source.manifest.version, source.manifest.payload_bytes, source.manifest.num_chunks) == (1, 0, 0)
    assert carry(source, capture(0, model().items())).version == 1


def test_where_every_word_changes_nothing_is_coded() -> None:
    old, new = {"w": awkward(torch.float32, 50_000)}, {"w": awkward(torch.float32, 50_000, seed=1)}
    shelf = Shelf(chunk_bytes=1000, history=8, segment_bytes=SEGMENT)
    shelf.put(capture(0, old.items()), 0.0)
    shelf.put(capture(1, new.items()), 0.0)
    assert not shelf.busy
    source = payload(shelf, capture(0, old.items()))
    assert source.manifest.base_digest == ""
    assert source.manifest.payload_bytes == 200_000


def test_each_tensor_travels_in_its_smaller_form() -> None:
    few, all_words = awkward(torch.bfloat16, 100_000), [awkward(torch.float32, 1000, seed) for seed in (0, 1)]
    versions = [{"few": few, "all": all_words[0]}, {**changed({"few": few}, 1), "all": all_words[1]}]
    base = capture(0, versions[0].items())
    source = payload(shelf_of(*versions), base)
    forms = {entry.spec.name: {block.form for block in entry.blocks} for entry in source.manifest.entries}
    assert forms == {"few": {"delta"}, "all": {"full"}}
    assert_same_bits(carry(source, base).tensors, versions[1])


def test_history_is_bounded_in_steps_and_bytes() -> None:
    versions = [{"w": awkward(torch.bfloat16, 20_000)}]
    for seed in range(15):  # a step back takes a tenth of the version, and half of one is what history may hold
        versions.append(changed(versions[-1], seed, fraction=0.05))
    oldest = capture(0, versions[0].items())
    assert payload(shelf_of(*versions[:5], history=4), oldest).manifest.base_digest == oldest.digest
    assert payload(shelf_of(*versions[:5], history=3), oldest).manifest.base_digest == ""
    assert payload(shelf_of(*versions, history=100), oldest).manifest.base_digest == ""


def test_other_tensors_start_a_new_history() -> None:
    old, new = model(), {**model(), "added": torch.ones(5)}
    base = capture(0, old.items())
    assert payload(shelf_of(old, new), base).manifest.base_digest == ""
    assert payload(shelf_of(old, new, changed(new, 1)), base).manifest.base_digest == ""
    again = capture(1, new.items())
    assert payload(shelf_of(old, new, changed(new, 1)), again).manifest.base_digest == again.digest


def test_two_versions_are_held_the_newest_and_the_longest_read() -> None:
    shelf = Shelf(chunk_bytes=1000, history=0, segment_bytes=SEGMENT)
    for version in (0, 1, 2):
        shelf.put(capture(version, model(version).items()), float(version))
        shelf.payload_for("", float(version))
        shelf.retire(float(version))
    held = [version for version in (0, 1, 2) if shelf.find(version, "", 2.0) is not None]
    assert held == [0, 2]
    shelf.payload_for("", HOLD_S + 2.0)
    shelf.retire(HOLD_S + 3.0)  # nobody asked for a chunk of version 0 since
    assert [version for version in (0, 2) if shelf.find(version, "", HOLD_S + 3.0) is not None] == [2]


def test_damage_inside_a_chunk_names_the_tensor() -> None:
    source = payload(shelf_of(model(), chunk_bytes=1 << 20), None)
    data = bytearray(source.chunk(0).data)
    data[512 * 128 * 4 + 5] ^= 1
    assembly = Assembly(source.manifest, None)
    with pytest.raises(DamagedTransfer, match=r"tensor 'layer\.0\.weight' of version 0: expected checksum"):
        assembly.feed(bytes(data))
    with pytest.raises(DamagedTransfer, match=r"expected \d+ bytes in chunk 0, got 3"):
        Assembly(source.manifest, None).feed(b"abc")


def test_damage_inside_a_delta_names_the_tensor_and_spares_the_base() -> None:
    old, new = model(), changed(model(), 1)
    base = capture(0, old.items())
    source = payload(shelf_of(old, new, chunk_bytes=1 << 20), base)
    data = bytearray(source.chunk(0).data)
    data[100] ^= 1
    with pytest.raises(DamagedTransfer, match=r"tensor 'embed\.weight' of version 1"):
        Assembly(source.manifest, base).feed(bytes(data))
    assert_same_bits(base.tensors, old)


def test_a_delta_on_another_base_is_refused() -> None:
    old, new = model(), changed(model(), 1)
    source = payload(shelf_of(old, new), capture(0, old.items()))
    with pytest.raises(DamagedTransfer, match="embed"):
        carry(source, capture(0, changed(old, 9).items()))
    with pytest.raises(DamagedTransfer, match="not held"):
        Assembly(source.manifest, None)
