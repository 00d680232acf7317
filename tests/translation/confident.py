"""A tiny model that is sure of what it says: what two ways of decoding find can be compared.

Loaded by the tests of translating with `runpy`; the checkpoint is made once in a session.
"""

import random
from pathlib import Path

UPDATES = 250


def confident(checkpoint: Path, pairs) -> Path:
    """The model of a checkpoint of fairseq-train after more updates without dropout, saved beside it."""
    path = checkpoint.with_name("confident.pt")
    if path.exists():
        return path
    import torch

    from fairseq_ext.translation.decode.checkpoint import build_model, read_state, vocabulary_of

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = read_state(checkpoint)
    vocabulary = vocabulary_of(state, checkpoint)
    model = build_model(state, checkpoint).train().requires_grad_(True)
    for module in model.modules():
        if type(module).__name__ == "FairseqDropout":
            module.p = 0.0
    sources = [vocabulary.encode(source) for source, _ in pairs]
    targets = [[*vocabulary.target.encode(target), 2] for _, target in pairs]

    def pad(rows, left=False):
        longest = max(map(len, rows))
        padding = [[1] * (longest - len(row)) for row in rows]
        both = zip(rows, padding, strict=True)
        return torch.tensor([p + row if left else row + p for row, p in both])

    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3, betas=(0.9, 0.98))
    draw = random.Random(1)
    torch.manual_seed(1)
    for _ in range(UPDATES):
        rows = draw.sample(range(len(pairs)), 64)
        target = pad([targets[row] for row in rows])
        previous = pad([[2, *targets[row][:-1]] for row in rows])
        logits, _ = model(pad([sources[row] for row in rows], left=True), None, previous)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, ignore_index=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    state["model"] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    torch.save(state, path)
    return path
