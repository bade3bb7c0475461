"""The gate's memory in pages, against a loop over single sequences that knows no pages."""

import pytest
import torch

from care_hf.gating import Gate, GateReader, unpack
from care_hf.paged_turns import WIDTH, PagedBatch, advance

D, IMAGE, END = 6, 9, (3, 7)


def gate(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Gate(END, torch.randn(D, 3, generator=draw), torch.zeros(3), required=1, pictured=1)


def told(gate, ids, h):
    """Steps, whether the gate fired, and whether there was an image, of each token of one sequence."""
    steps, held, seen, found = -1, False, False, []
    for place, token in enumerate(ids):
        seen = seen or token == IMAGE
        steps = steps + 1 if steps >= 0 else -1
        if place + 1 >= len(END) and tuple(ids[place + 1 - len(END) : place + 1]) == END:
            scores = h[place] @ gate.readers - gate.thresholds
            steps, held = 0, bool(scores[0] > 0 and scores[2 if seen else 1] > 0)
        found.append((steps, held, seen))
    return found


class Engine:
    """Blocks for requests, in no order; batches of whatever is asked for."""

    def __init__(self, size, blocks, draw):
        self.size, self.draw = size, draw
        self.cache = torch.full((blocks, size, WIDTH), 12345)  # what others left
        self.free = (1 + torch.randperm(blocks - 1, generator=draw)).tolist()
        self.tables, self.done = {}, {}

    def batch(self, wanted, padding=0):
        """Of the next tokens of requests, `wanted` {name: count}; more blocks where they are needed."""
        slots = []
        for name, count in wanted.items():
            table, done = self.tables.setdefault(name, []), self.done.get(name, 0)
            while len(table) * self.size < done + count:
                table.append(self.free.pop())
            slots += [table[p // self.size] * self.size + p % self.size for p in range(done, done + count)]
            self.done[name] = done + count
        width = max(len(table) for table in self.tables.values()) + 1
        rows = [self.tables[name] + [0] * (width - len(self.tables[name])) for name in wanted]
        rows += [[0] * width] * padding
        counts = torch.tensor([0, *wanted.values(), *[0] * padding])
        return PagedBatch(
            counts.cumsum(0).to(torch.int32),
            torch.tensor([self.done[name] for name in wanted] + [0] * padding, dtype=torch.int32),
            torch.tensor(slots + [-1] * padding),
            torch.tensor(rows, dtype=torch.int32),
            self.size,
        )


def texts(draw, count):
    """With ends of prompts, images, and halves of ends at every place."""
    choices = torch.tensor([*END, *END, IMAGE, 1, 2])
    ids = [choices[torch.randint(0, 7, (n,), generator=draw)].tolist() for n in torch.randint(3, 40, (count,)).tolist()]
    return ids, [torch.randn(len(one), D, generator=draw) for one in ids]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [1, 4, 16])
def test_any_chunks_of_any_requests_give_what_whole_sequences_give(seed, size):
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    given, (ids, h) = gate(seed), texts(draw, 5)
    reader, engine, found = GateReader.from_gate(given), Engine(size, 400, draw), [[] for _ in ids]
    while True:
        left = [i for i in torch.randperm(len(ids), generator=draw).tolist() if engine.done.get(i, 0) < len(ids[i])]
        if not left:
            break
        wanted = {}
        for i in left[: int(torch.randint(1, 6, (1,), generator=draw))]:
            most = len(ids[i]) - engine.done.get(i, 0)
            wanted[i] = min(most, int(torch.randint(1, 9, (1,), generator=draw)))
        begun, padding = {i: engine.done.get(i, 0) for i in wanted}, int(torch.randint(0, 3, (1,), generator=draw))
        batch = engine.batch(wanted, padding)
        cut = [slice(begun[i], begun[i] + n) for i, n in wanted.items()]
        tokens = [token for i, part in zip(wanted, cut, strict=True) for token in ids[i][part]] + [7] * padding
        states = torch.cat([h[i][part] for i, part in zip(wanted, cut, strict=True)] + [torch.randn(padding, D)])
        packed = advance(engine.cache, batch, torch.tensor(tokens), states, reader, END, [IMAGE])
        rows = list(zip(*(part.tolist() for part in unpack(packed)), strict=True))
        for i, n in wanted.items():
            found[i] += rows[:n]
            rows = rows[n:]
    for i, one in enumerate(ids):
        expected = told(given, one, h[i])
        assert [row[0] for row in found[i]] == [row[0] for row in expected]
        assert [row[1] for row in found[i]] == [row[1] and row[0] >= 0 for row in expected]
        assert [row[2] for row in found[i]] == [row[2] for row in expected]


def test_a_shared_beginning_is_read_and_never_written():
    draw, given = torch.Generator().manual_seed(0), gate()
    reader, engine = GateReader.from_gate(given), Engine(4, 20, draw)
    ids, h = [1, IMAGE, 3, 7, 1, 3, 7, 2], torch.randn(8, D, generator=draw)
    first = advance(engine.cache, engine.batch({"one": 8}), torch.tensor(ids), h, reader, END, [IMAGE])
    engine.tables["two"], engine.done["two"] = engine.tables["one"][:1], 4
    shared = engine.cache[engine.tables["one"][0]].clone()
    second = advance(engine.cache, engine.batch({"two": 4}), torch.tensor(ids[4:]), h[4:], reader, END, [IMAGE])
    assert torch.equal(first[4:], second) and torch.equal(shared, engine.cache[engine.tables["one"][0]])


def test_what_is_computed_again_is_the_same():
    draw, given = torch.Generator().manual_seed(1), gate(1)
    reader, engine, (ids, h) = GateReader.from_gate(given), Engine(4, 40, draw), texts(draw, 1)
    batch = engine.batch({"one": len(ids[0])})
    first = advance(engine.cache, batch, torch.tensor(ids[0]), h[0], reader, END, [IMAGE])
    engine.tables, engine.done = {}, {}
    again = engine.batch({"one": len(ids[0])})
    assert torch.equal(first, advance(engine.cache, again, torch.tensor(ids[0]), h[0], reader, END, [IMAGE]))


def test_padding_changes_nothing_that_is_anybodys():
    draw = torch.Generator().manual_seed(2)
    engine, reader = Engine(4, 10, draw), GateReader.from_gate(gate())
    batch, before = engine.batch({"one": 3}, padding=4), engine.cache.clone()
    advance(engine.cache, batch, torch.tensor([1, 3, 7, 3, 7, 3, 7]), torch.randn(7, D), reader, END, [IMAGE])
    changed = (engine.cache != before).any(dim=(1, 2)).nonzero()[:, 0].tolist()
    assert set(changed) <= {0, engine.tables["one"][0]}


def test_what_does_not_fit_is_refused():
    numbers = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit"):
        PagedBatch(numbers, numbers, numbers, torch.zeros(2, 1), 4)
