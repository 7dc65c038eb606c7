"""What steps do to rows: forks, horizons, prefix hits, reuse of slots and blocks, ends, run-ahead."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.batch import Padding
from gpu_worker.staging import StepError
from pagoda.internal.v1 import worker_pb2
from tests.unit.worker.harness import Device, prompt

SEEDED = {"temperature": 1.0, "top_p": 0.9}
STOP, LENGTH, NAN = worker_pb2.ROW_END_STOP, worker_pb2.ROW_END_LENGTH, worker_pb2.ROW_END_NAN


def test_horizon_equals_single_steps(device):
    prompts = {0: prompt(11, 1), 4: prompt(23, 2), 2: prompt(5, 3)}
    expected = {s: device.generate(s, p, 17, seed=s, **SEEDED) for s, p in prompts.items()}
    sequences = {s: device.add(s, p, seed=s, **SEEDED) for s, p in prompts.items()}
    device.step({s: len(p) for s, p in prompts.items()})
    device.decode(list(prompts), 4, m=4)
    assert {s: q.tokens[len(prompts[s]) :] for s, q in sequences.items()} == expected


def test_neighbours_change_nothing(device):
    """In float32 a row's tokens, greedy or seeded, do not depend on the rows beside it."""
    prompts = {s: prompt(6 + 5 * s, s) for s in range(6)}
    alone = {s: device.generate(s, p, 12, seed=s, temperature=float(s % 2)) for s, p in prompts.items()}
    sequences = {}
    for slot, tokens in prompts.items():
        sequences[slot] = device.add(slot, tokens, seed=slot, temperature=float(slot % 2))
        for other in list(sequences)[:-1]:
            device.grow(sequences[other], sequences[other].num_computed + 1)
        device.step({**dict.fromkeys(list(sequences)[:-1], 1), slot: len(tokens)})
    device.decode(list(prompts), 11)
    for slot, tokens in prompts.items():
        assert sequences[slot].tokens[len(tokens) :][:12] == alone[slot]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mistral_window", "qwen3"])
def test_logits_depend_on_tokens_alone(tiny, kind, dtype):
    """The kernels sum in an order that neither the batch nor the cut of a prompt changes: bit for bit."""
    device = Device(tiny(kind)[1], dtype=dtype)
    sequence = device.add(0, prompt(45))
    device.step({0: 45})
    device.decode([0], 9)
    expected = device.logits[-1][0]
    tokens = sequence.tokens[:54]  # what the last decode had seen
    device.add(3, prompt(70, 1))
    device.add(1, tokens, num_prompt=45)
    for chunk in (7, 30):
        device.step({3: 20, 1: chunk})
    device.step({1: 17, 3: 30})
    assert torch.equal(device.logits[-1][0], expected)


def test_resume_draws_what_was_drawn(device):
    """Tokens are the only truth: a row that comes back with its output goes on as it would have."""
    tokens = prompt(20)
    full = device.generate(0, tokens, 16, seed=9, presence_penalty=0.5, **SEEDED)
    back = device.add(3, tokens + full[:7], num_prompt=20, seed=9, presence_penalty=0.5, **SEEDED)
    device.step({3: 27})
    device.decode([3], 8)
    assert back.tokens[20:] == full


def test_forks_sample_from_their_parent(device):
    tokens = prompt(21)
    expected = [device.generate(0, tokens, 9, seed=seed, **SEEDED) for seed in (10, 11, 12)]
    device.add(1, tokens, seed=10, **SEEDED)
    device.fork(5, parent=1, seed=11, **SEEDED)
    device.fork(2, parent=1, seed=12, **SEEDED)
    device.step({1: 21, 5: 0, 2: 0})
    # Copy on write: the prompt's partial block becomes each fork's own.
    for slot in (5, 2):
        sequence, block = device.sequences[slot], device.free.pop()
        device.pending.copy_src_blocks.append(sequence.blocks[1])
        device.pending.copy_dst_blocks.append(block)
        device.pending.replace_slots.append(slot)
        device.pending.replace_indexes.append(1)
        device.pending.replace_blocks.append(block)
        sequence.blocks[1] = block
    device.decode([1, 5, 2], 8)
    assert [device.sequences[s].tokens[21:] for s in (1, 5, 2)] == expected


def test_fork_beside_other_rows(device):
    """The fork's logits are its parent's, wherever that stands in a ragged batch."""
    tokens, other = prompt(13, 1), prompt(30, 2)
    expected = device.generate(0, tokens, 1, seed=4, **SEEDED)
    device.add(0, other)
    device.add(1, tokens, seed=3, **SEEDED)
    device.fork(2, parent=1, seed=4, **SEEDED)
    device.step({2: 0, 0: 12, 1: 13})
    assert device.sequences[2].tokens[13:] == expected


def test_prefix_hits(device):
    """A row may start behind blocks that another row has filled."""
    shared = prompt(32)
    tokens = shared + prompt(9, 5)
    expected = device.generate(0, tokens, 10)
    first = device.add(6, shared + [7])
    device.step({6: 33})
    sequence = device.add(3, tokens, num_computed=32, blocks=first.blocks[:2])
    device.step({3: 9})
    device.decode([3], 9)
    assert sequence.tokens[41:] == expected


def test_slots_and_blocks_are_reused(device):
    """What a slot or a block held before leaves no trace."""
    expected = [device.generate(0, prompt(9, s), 8, seed=s, **SEEDED) for s in range(3)]
    features = {"bias_token_ids": [5], "bias_values": [50.0], "repetition_penalty": 1.5, "min_tokens": 3}
    device.generate(0, prompt(60, 9), 20, **features)
    assert [device.generate(0, prompt(9, s), 8, seed=s, **SEEDED) for s in range(3)] == expected


def test_stale_bias_of_a_slot_is_cleared(device):
    plain = device.generate(0, prompt(9), 4)
    assert device.generate(0, prompt(9), 4, bias_token_ids=[5], bias_values=[99.0]) == [5] * 4
    # A neighbour with biases makes the kernel read this row's columns too.
    device.add(1, prompt(9), bias_token_ids=[6], bias_values=[99.0])
    sequence = device.add(0, prompt(9))
    device.step({0: 9, 1: 9})
    device.decode([0, 1], 3)
    assert sequence.tokens[9:] == plain
    assert device.sequences[1].tokens[9:] == [6] * 4


def test_stop_id_ends_a_row_and_masks_it(device):
    tokens = prompt(10)
    free = device.generate(0, tokens, 8)
    place = next(i for i in range(2, 8) if free[i] not in free[:i])
    sequence = device.add(2, tokens, stop_token_ids=[free[place]])
    other = device.add(3, prompt(12, 4))
    device.step({2: 10, 3: 12})
    device.grow(sequence, 40)
    device.grow(other, 40)
    before = None
    results = []
    for _ in range(5):
        results.append(device.step({2: 1, 3: 1}, m=2))
        if sequence.ended and before is None:
            before = [c.clone() for c in device.cache.layers[0]]
            written = device.rows.state.num_computed[2].item()
    assert sequence.tokens[10:] == free[: place + 1]
    assert sequence.ended == STOP
    assert [list(r.num_sampled) for r in results][-1] == [0, 2]
    assert device.rows.state.num_computed[2].item() == written
    blocks = torch.tensor(sequence.blocks)
    for now, then in zip(device.cache.layers[0], before, strict=True):
        assert torch.equal(now[blocks], then[blocks])  # a masked row writes no keys and values


def test_last_position_ends_a_row_within_a_horizon(device):
    sequence = device.add(0, prompt(10), last_position=13)
    device.step({0: 10})
    device.grow(sequence, 13)
    result = device.step({0: 1}, m=4)
    assert list(result.num_sampled) == [2]
    assert (list(result.ended_rows), list(result.ended_reasons)) == ([0], [LENGTH])
    assert len(sequence.tokens) == 13
    again = device.step({0: 1}, m=4)
    assert (list(again.num_sampled), list(again.ended_rows)) == ([0], [])


def test_a_row_can_fill_the_longest_length(device):
    sequence = device.add(0, prompt(126))
    device.step({0: 126})
    device.step({0: 1}, m=4)
    assert len(sequence.tokens) == 128
    assert sequence.ended == LENGTH


def test_min_tokens_hold_back_the_stop_id(device):
    tokens = prompt(10)
    first = device.generate(0, tokens, 1)[0]
    sequence = device.add(0, tokens, stop_token_ids=[first], min_tokens=3)
    device.step({0: 10})
    device.decode([0], 2)
    assert first not in sequence.tokens[10:]


def test_nan_ends_its_row_alone(device):
    bad = device.add(0, prompt(10), bias_token_ids=[5], bias_values=[float("nan")])
    good = device.add(1, prompt(10))
    result = device.step({0: 10, 1: 10})
    assert (list(result.num_sampled), list(result.ended_rows)) == ([0, 1], [0])
    assert bad.ended == NAN
    device.decode([1, 0], 2)
    assert len(bad.tokens) == 10
    assert len(good.tokens) == 13


def test_run_ahead(device):
    """Steps are staged and run while nobody has read the ones before; also across an end and a reuse."""
    tokens = prompt(14)
    expected = device.generate(0, tokens, 6)
    other = device.generate(0, prompt(8, 8), 3)
    sequence = device.add(0, tokens, last_position=17)
    device.grow(sequence, 24, append=False)
    launched = [device.launch({0: 14})]
    launched += [device.launch({0: 1}) for _ in range(4)]  # two of them after the row's end
    launched_ids = [device.read(*step) for step in launched]
    assert sequence.tokens[14:] == expected[:3]
    assert [list(r.num_sampled) for r in launched_ids] == [[], [], [], [0], [0]]
    device.release(0)
    again = device.add(0, prompt(8, 8))
    first = device.launch({0: 8})
    device.grow(again, 10)
    rest = [device.launch({0: 1}), device.launch({0: 1})]
    for step in (first, *rest):
        device.read(*step)
    assert again.tokens[8:] == other


def test_block_copies(device):
    """Copied blocks serve as the originals did."""
    tokens = prompt(24)
    sequence = device.add(0, tokens)
    device.step({0: 24})
    device.decode([0], 1)
    expected = list(sequence.tokens)
    copies = [device.free.pop() for _ in range(2)]
    device.pending.copy_src_blocks.extend(sequence.blocks[:2])
    device.pending.copy_dst_blocks.extend(copies)
    copied = device.add(1, expected[:25], num_prompt=24, num_computed=24, blocks=copies)
    device.step({1: 1})
    assert copied.tokens == expected


def test_logprobs(device):
    tokens = prompt(10)
    device.add(0, tokens, num_logprobs=3)
    device.add(1, prompt(6, 1))
    device.add(2, prompt(7, 2), num_logprobs=0, temperature=1.0, seed=1)
    device.step({0: 10, 1: 6, 2: 7})
    for slot in (0, 1, 2):
        device.grow(device.sequences[slot], 16)
    result = device.step({0: 1, 1: 1, 2: 1}, m=2)
    got = result.logprobs
    assert list(got.num_top) == [3, 3, 0, 0]
    assert len(got.token_logprobs) == len(got.ranks) == 4
    assert len(got.top_ids) == len(got.top_logprobs) == 6
    logprobs = [logits.log_softmax(-1) for logits in device.logits[-2:]]
    for iteration in range(2):
        best = logprobs[iteration][0].topk(3)
        assert list(got.top_ids[3 * iteration :][:3]) == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(got.top_logprobs[3 * iteration :][:3]), best.values)
        assert got.ranks[iteration] == 1
        drawn = result.tokens[4 + iteration]
        torch.testing.assert_close(
            torch.tensor(got.token_logprobs[2 + iteration]),
            logprobs[iteration][2, drawn],
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_step_without_rows(device):
    device.add(0, prompt(5))
    device.step({0: 5})
    device.release(0)
    result = device.step({})
    assert not result.tokens and not result.num_sampled


def step(**fields) -> worker_pb2.Step:
    return worker_pb2.Step(**{"epoch": 1, "num_iterations": 1, **fields})


def row(**fields) -> worker_pb2.NewRow:
    values = {"slot": 1, "tokens": [3, 4], "num_prompt_tokens": 2, "blocks": [9], "last_position": 20}
    return worker_pb2.NewRow(**{**values, **fields})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (step(slots=[1]), "holds no row"),
        (step(slots=[99]), "holds no row"),
        (step(released_slots=[2]), "slot 2 holds no row"),
        (step(slots=[0, 0]), "twice"),
        (step(slots=[0], num_iterations=0), "0 iterations"),
        (step(slots=[0], num_iterations=9), "at most 8"),
        (step(slots=[0], num_tokens=[2]), "fewer tokens left"),
        (step(slots=[0], num_tokens=[1, 1]), "do not fit"),
        (step(slots=[0], num_tokens=[600]), "do not fit"),
        (step(slots=[0], num_tokens=[0]), "forks"),
        (step(slots=[0], append_slots=[0], append_blocks=[128]), "block 128 does not exist"),
        (step(slots=[0], append_slots=[0], append_blocks=[]), "to append"),
        (step(slots=[0], append_slots=[0] * 20, append_blocks=[3] * 20), "full"),
        (step(slots=[0], replace_slots=[0], replace_indexes=[5], replace_blocks=[3]), "no entry 5"),
        (step(slots=[0], replace_slots=[0]), "replaced"),
        (step(new_rows=[row()], replace_slots=[1], replace_indexes=[0], replace_blocks=[3]), "no entry 0"),
        (step(slots=[0], copy_src_blocks=[1]), "to copy"),
        (step(slots=[0], copy_src_blocks=[1], copy_dst_blocks=[500]), "block 500"),
        (step(new_rows=[row(slot=0)]), "slot 0 is not free"),
        (step(new_rows=[row(slot=8)]), "slot 8 is not free"),
        (step(new_rows=[row(num_computed=2)]), "2 computed"),
        (step(new_rows=[row(tokens=[3] * 129)]), "129 tokens"),
        (step(new_rows=[row(last_position=129)]), "last position 129"),
        (step(new_rows=[row(blocks=[200])]), "block 200"),
        (step(new_rows=[row(sampling={"stop_token_ids": range(1025)})]), "1025 stop ids"),
        (step(new_rows=[row(sampling={"bias_token_ids": [1]})]), "bias"),
        (step(new_rows=[row(), row(slot=2, parent_slot=1, tokens=[])], slots=[1, 2], num_tokens=[1, 0]),
         "parent"),
    ],
)  # fmt: skip
def test_steps_that_do_not_fit(device, bad, message):
    device.add(0, prompt(5))
    device.step({0: 5})
    with pytest.raises(StepError, match=message):
        device.stager.stage(bad)


def test_new_entries_go_behind_the_old_ones(device):
    """Blocks of a row that enters in the step and of one that was there, in turns, and replaced ones."""
    first = device.add(0, prompt(40))
    device.step({0: 40})
    stager, rows = device.stager, device.rows
    diff, _ = stager.stage(
        step(
            slots=[0, 1], num_tokens=[1, 2], new_rows=[row(blocks=[9, 8])],
            append_slots=[0, 1, 1, 0], append_blocks=[20, 21, 22, 23],
            replace_slots=[0, 0], replace_indexes=[1, 2], replace_blocks=[24, 25],
        )
    )  # fmt: skip
    rows.apply(diff, device.cache.tensors)
    assert rows.state.block_tables[0, :5].tolist() == [first.blocks[0], 24, 25, 20, 23]
    assert rows.state.block_tables[1, :4].tolist() == [9, 8, 21, 22]


@pytest.mark.parametrize(
    "padding", [Padding(), Padding.for_graphs(200, 8192), Padding.for_graphs(1024, 8192)]
)
def test_a_buffer_holds_what_a_step_takes(padding):
    """The sizes that the stager asks for hold every batch that it rounds to them."""
    for rows in (1, 5, 16, 17, 64, 65, 130, 200):
        for tokens in (rows, rows + 1, 63, 64, 65, 500, 512, 513, 1025, 4096, 8000):
            asked = padding.largest(-(-rows // 64) * 64, -(-max(rows, tokens) // 64) * 64)
            assert asked >= padding.largest(rows, max(rows, tokens))


def test_clear_forgets_rows(device):
    expected = device.generate(0, prompt(9), 5)
    device.add(0, prompt(30, 3), bias_token_ids=[5], bias_values=[99.0])
    device.step({0: 30})
    device.stager.clear()
    device.sequences.clear()
    assert device.generate(0, prompt(9), 5) == expected


def test_more_slots_than_one(tiny):
    """A batch of every slot, in bfloat16 too, gives each its own tokens."""
    for dtype in (torch.float32, torch.bfloat16):
        device = Device(tiny("qwen2")[1], dtype=dtype, max_slots=33, num_blocks=300)
        for slot in range(33):
            device.add(slot, prompt(5 + slot % 7, slot))
        device.step({slot: 5 + slot % 7 for slot in range(33)})
        device.decode(range(33), 5)
        assert {len(device.sequences[s].tokens) - 5 - s % 7 for s in range(33)} == {6}
