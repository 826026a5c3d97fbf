"""The loss in chunks and micro-batches is the plain one."""

import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.tiny import tiny_config
from topkapi.model.linear import set_compute_dtype
from topkapi.model.transformer import Decoder, causal_attention
from topkapi.training.data.windows import IGNORED, Batch
from topkapi.training.optimisation import loss as loss_module
from topkapi.training.optimisation import optimisers
from topkapi.training.optimisation.attention import TILE, packed_attention, tiled_attention
from topkapi.training.optimisation.loss import Compiled, backward, evaluate
from topkapi.training.optimisation.optimisers import Optimizers, Schedule, warmup_steps


@pytest.fixture
def model() -> Decoder:
    from topkapi.model.transformer import initialise

    model = Decoder(tiny_config())
    initialise(model, torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def batch(model: Decoder) -> Batch:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, model.config.vocab_size, (8, 13), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, 5:] = IGNORED
    targets[3] = IGNORED
    return Batch(tokens[:, :-1], targets, torch.rand(8, 12, generator=generator))


def plain(model: Decoder, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """The loss and gradients by one full forward pass."""
    positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    logits = model(batch.tokens, positions)
    each = functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    weights = torch.ones_like(each) if batch.weights is None else batch.weights.flatten()
    loss = (each * weights).sum() / (weights * (batch.targets.flatten() != IGNORED)).sum()
    model.zero_grad()
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("logits_at_once", [1 << 24, 7 * 512, 1])
def test_chunks_and_micro_batches_change_nothing(
    weighted: bool, rows: int | None, logits_at_once: int, model: Decoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", logits_at_once)
    if not weighted:
        batch = Batch(batch.tokens, batch.targets)
    expected, gradients = plain(model, batch)
    model.zero_grad()
    loss = backward(model, batch, divisor=batch.weight(), micro_batch_size=rows)
    assert loss == pytest.approx(expected, rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert evaluate(model, [batch], rows) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("size", [None, 1, 2])
def test_texts_side_by_side_train_as_they_do_alone(family: str, size: int | None) -> None:
    from topkapi.model.transformer import initialise

    model = Decoder(tiny_config(family=family))
    initialise(model, torch.Generator().manual_seed(1))
    texts = [torch.randint(0, model.config.vocab_size, (1, length)) for length in (9, 2, 17, 5)]
    alone = 0.0
    for text in texts:
        one = Batch(text[:, :-1], text[:, 1:])
        alone += backward(model, one, divisor=29)
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    packed = Batch(
        torch.cat([text[:, :-1] for text in texts], dim=1),
        torch.cat([text[:, 1:] for text in texts], dim=1),
        # The second and the third belong to one example.
        texts=((8,), (1, 16), (4,)),
    )
    assert (packed.size, packed.weight()) == (3, 29)
    assert backward(model, packed, divisor=29, micro_batch_size=size) == pytest.approx(alone, rel=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    assert evaluate(model, [packed], size) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("lengths", [(3, 70, 200, 65, 64, 1), (5,), (90, 90), (100, 151)])
def test_texts_of_any_lengths_are_attended_one_by_one(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    heads = [torch.randn(1, count, sum(lengths), 8, generator=generator).requires_grad_() for count in (4, 2, 2)]
    results = []
    for together in (True, False):
        if together:
            mixed = packed_attention(0, *heads, lengths=torch.tensor(lengths))
        else:
            parts = (each.split(lengths, dim=2) for each in heads)
            mixed = torch.cat([causal_attention(0, *text) for text in zip(*parts, strict=True)], dim=2)
        mixed.square().sum().backward()
        results.append((mixed, [each.grad for each in heads]))
        for each in heads:
            each.grad = None
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_layers_changes_no_gradient(dropout: float, batch: Batch) -> None:
    from topkapi.model.transformer import initialise

    model = Decoder(tiny_config(dropout=dropout))
    initialise(model, torch.Generator().manual_seed(1))
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(3)
        loss = backward(model, batch, divisor=batch.weight())
        found.append((loss, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(kept, again) for kept, again in zip(found[0][1], found[1][1], strict=True))


def test_z_loss_is_in_the_gradient_and_not_in_the_loss(model: Decoder, batch: Batch) -> None:
    loss, gradients = plain(model, batch)
    positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    trained = batch.targets != IGNORED
    assert batch.weights is not None
    squares = model(batch.tokens, positions).logsumexp(-1).square()
    model.zero_grad()
    (0.01 * (squares * batch.weights)[trained].sum() / batch.weight()).backward()
    penalty = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    assert backward(model, batch, divisor=batch.weight(), z_loss=0.01) == pytest.approx(loss, rel=1e-5)
    for parameter, first, second in zip(model.parameters(), gradients, penalty, strict=True):
        torch.testing.assert_close(parameter.grad, first + second, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(first + second, first, rtol=1e-4, atol=1e-6)


def test_evaluating_leaves_the_random_state_and_the_mode_alone(batch: Batch) -> None:
    from topkapi.model.transformer import initialise

    model = Decoder(tiny_config(dropout=0.5))
    initialise(model, torch.Generator().manual_seed(1))
    model.train()
    state = torch.get_rng_state()
    assert evaluate(model, [batch]) == evaluate(model, [batch])
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_bf16_products_keep_float32_weights_and_gradients(model: Decoder, batch: Batch) -> None:
    exact = backward(model, batch, divisor=batch.weight())
    model.zero_grad()
    set_compute_dtype(model, torch.bfloat16)
    rough = backward(model, batch, divisor=batch.weight())
    assert rough == pytest.approx(exact, rel=0.01) and rough != exact
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimiser_restored_from_its_tensors_goes_on_the_same(name: str, model: Decoder, batch: Batch) -> None:
    def optimizers(of: Decoder) -> Optimizers:
        return Optimizers(
            of,
            name=name,  # type: ignore[arg-type]
            learning_rate=0.01,
            muon_learning_rate=0.02,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            decay="matrices",
        )

    def step(of: Decoder, optimizer: Optimizers) -> None:
        backward(of, batch, divisor=batch.weight())
        optimizer.step(0.5)

    first = optimizers(model)
    step(model, first)
    twin = Decoder(model.config)
    twin.load_state_dict(model.state_dict())
    second = optimizers(twin)
    second.load_state_tensors({key: value.clone() for key, value in first.state_tensors().items()})
    step(model, first)
    step(twin, second)
    assert all(one.equal(other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    assert len(first.all) == (2 if name == "muon" else 1)


@pytest.mark.parametrize("has_products", [True, False])
def test_muon_is_pytorchs_whatever_the_precision_of_its_updates(
    has_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bfloat16 has no products of its own they become orthogonal in float32, which differs by its rounding."""
    monkeypatch.setattr(optimisers, "multiplies_bfloat16", lambda device: has_products)
    generator = torch.Generator().manual_seed(5)
    network = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False)])})
    ours = Optimizers(
        network, name="muon", learning_rate=0.1, muon_learning_rate=0.02, weight_decay=0.1, betas=(0.9, 0.95),
        decay="matrices",
    )  # fmt: skip
    began = [matrix.detach().clone() for matrix in network.parameters()]
    twins = [nn.Parameter(matrix.clone()) for matrix in began]
    theirs = torch.optim.Muon(twins, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for matrix, twin in zip(network.parameters(), twins, strict=True):
            matrix.grad = torch.randn(matrix.shape, generator=generator)
            twin.grad = matrix.grad.clone()
        ours.step(0.5)
        theirs.step()
    for matrix, twin, at_first in zip(network.parameters(), twins, began, strict=True):
        away = (matrix - twin).norm() / (twin - at_first).norm()
        assert (away == 0) == has_products and away < 0.02


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_an_update_becomes_nearly_orthogonal(shape: tuple[int, int]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    muon = torch.optim.Muon([nn.Parameter(update)]).defaults
    how = (muon["ns_coefficients"], muon["ns_steps"], muon["eps"])
    found = optimisers.orthogonal(update, *how)
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    stretched = left.T @ found @ right.T
    assert stretched.sub(stretched.diagonal().diag()).abs().max() < 1e-9, "the singular vectors are what they were"
    # What Muon's coefficients make of values that are not far from the largest.
    assert (stretched.diagonal()[values > 0.1 * values[0]] - 1).abs().max() < 0.5
    assert optimisers.orthogonal(torch.zeros(shape), *how).eq(0).all()


def test_schedules() -> None:
    cosine = Schedule("cosine", 100, warmup=10, final=0.1)
    assert [cosine.factor(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert cosine.factor(55) == pytest.approx(0.55) and cosine.factor(100) == pytest.approx(0.1)
    linear = Schedule("linear", 110, warmup=10, final=0.1)
    assert [linear.factor(step) for step in (9, 10, 60, 110)] == pytest.approx([1.0, 1.0, 0.55, 0.1])
    wsd = Schedule("wsd", 100, warmup=10, final=0.0)
    assert [wsd.factor(step) for step in (10, 60, 80, 99)] == pytest.approx([1.0, 1.0, 0.5, 0.025])
    assert Schedule("constant", 100).factor(99) == 1.0
    assert (warmup_steps(0.02, 1000), warmup_steps(40, 1000), warmup_steps(0, 1000)) == (20, 40, 0)


@pytest.mark.parametrize("length", [1, 5, TILE, TILE + 1, 3 * TILE + 7])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_in_tiles_is_causal_attention(length: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(length)
    heads = [torch.randn(2, length, each, 16, generator=generator).transpose(1, 2) for each in (4, groups, groups)]
    upstream = torch.randn(2, 4, length, 16, generator=generator)
    results = []
    for attention in (causal_attention, tiled_attention):
        inputs = [each.clone().requires_grad_() for each in heads]
        mixed = attention(0, *inputs)
        mixed.backward(upstream)
        results.append([mixed, *(each.grad for each in inputs)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_attention_in_tiles_is_as_close_to_float32_as_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, each, 300, 64, generator=generator).bfloat16() for each in (4, 2, 2)]
    upstream = torch.randn(1, 4, 300, 64, generator=generator).bfloat16()

    def gradients(attention, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [each.to(dtype).requires_grad_() for each in heads]
        attention(0, *inputs).backward(upstream.to(dtype))
        return [each.grad.float() for each in inputs]

    exact = gradients(causal_attention, torch.float32)
    for own, theirs, expected in zip(
        gradients(tiled_attention, torch.bfloat16), gradients(causal_attention, torch.bfloat16), exact, strict=True
    ):
        assert (own - expected).norm() < 2 * (theirs - expected).norm()


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), TILE + 3])
def test_attention_in_tiles_is_an_operator_that_a_compiler_can_trust(length: int) -> None:
    """Its shapes without data, its gradient and its schema are what it does."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    inputs = [torch.randn(size, generator=generator, dtype=torch.bfloat16).requires_grad_() for size in sizes]
    torch.library.opcheck(torch.ops.topkapi.tiled_attention, inputs, atol=2e-2, rtol=2e-2)


def test_the_operator_of_packed_texts_is_a_proper_one() -> None:
    """Shapes, gradients and what a compiler assumes of an operator, as PyTorch checks them; and it gives what the plain
    way gives."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor((70, 3, 100, 9))
    heads = [
        torch.randn(1, count, 182, 8, generator=generator, dtype=torch.bfloat16).requires_grad_() for count in (4, 2, 2)
    ]
    torch.library.opcheck(torch.ops.topkapi.packed_attention, (*heads, lengths), atol=2e-2, rtol=2e-2)
    results = []
    for attend in (torch.ops.topkapi.packed_attention, lambda *inputs: packed_attention(0, *heads, lengths=lengths)):
        mixed = attend(*heads, lengths)
        mixed.float().square().sum().backward()
        results.append([mixed, *(each.grad for each in heads)])
        for each in heads:
            each.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("texts", [None, ((TILE + 3,), (100, 20), (TILE + 14,))])
def test_a_compiled_update_is_the_plain_one(
    precision: torch.dtype | None, texts: tuple[tuple[int, ...], ...] | None
) -> None:
    """In float32 to rounding; in bfloat16, where the compiler keeps intermediate results in float32, no farther from
    float32 than the plain one is."""
    from topkapi.model.transformer import initialise

    tokens = torch.randint(0, tiny_config().vocab_size, (3, TILE + 4), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(3, TILE + 3, generator=torch.Generator().manual_seed(3))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights)
    if texts:
        flat = (each.reshape(1, -1) for each in (batch.tokens, batch.targets, batch.weights))
        batch = Batch(*flat, texts=texts)  # type: ignore[arg-type]  # it has weights

    def update(dtype: torch.dtype | None, compile: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model = Decoder(tiny_config())
        initialise(model, torch.Generator().manual_seed(1))
        set_compute_dtype(model, dtype)
        compiled = Compiled.of(model) if compile else None
        loss = backward(model, batch, divisor=batch.weight(), micro_batch_size=2, z_loss=1e-3, compiled=compiled)
        return loss, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    exact_loss, exact = update(None, False)
    loss, gradients = update(precision, True)
    _, plain = update(precision, False)
    assert loss == pytest.approx(exact_loss, rel=1e-5 if precision is None else 1e-3)
    for name, gradient in gradients.items():
        near = (gradient - exact[name]).norm() / exact[name].norm()
        assert near <= 1e-4 + 1.5 * (plain[name] - exact[name]).norm() / exact[name].norm(), name
