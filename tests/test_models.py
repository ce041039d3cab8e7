"""Unmodified models of Hugging Face and PyTorch: each example's value is that of its own gradient,
by autograd in float64, with every parameter trained."""

import functools

import pytest
import torch
from torch.nn import functional as F

from experiments import models
from shapley import ghost
from shapley.wrap import Net

pytest.importorskip("transformers")

# these compute a part of their forward in float32 whatever their weights are
IN_FLOAT32 = {"Gemma 2": 1e-7, "Mixtral": 1e-6, "T5": 1e-7}
# no fast form: the rest of the model is fast all the same
GENERAL = {
    "Mixtral": "experts",
    "T5": "relative_attention_bias",
    "TransformerEncoder": "self_attn",
    "ResNet": "grouped",
}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def values_and_truth(net, X, Y, K=2):
    """By the ledger, by the tape, and by each example's own gradient in its batch."""
    params = [p for p in net.parameters() if p.requires_grad]
    for p in params:
        p.h = torch.randn(K, *p.shape, dtype=p.dtype)
    truth = models.own_values(net, X, Y, params)
    ledger = torch.zeros(len(Y), K, dtype=truth.dtype, requires_grad=True)
    (values,) = torch.autograd.grad(net(X, Y, ledger)[1], ledger)
    tape = ghost.Tape()
    net(X, Y, tape)[1].backward()
    return values, tape.values(), truth


@pytest.mark.parametrize("name", models.MODELS)
def test_values_are_those_of_the_examples_own_gradients(name):
    made = models.build(name)
    net = Net(made.model.double(), made.loss)
    values, of_tape, truth = values_and_truth(net, made.X, made.Y)
    tolerance = IN_FLOAT32.get(name, 1e-12)
    assert relative(values, truth) < tolerance
    assert relative(of_tape, truth) < tolerance
    assert all(p.grad is not None for p in net.parameters())
    general = {parameter for parameter, _, way in net.ways if way == "general"}
    assert bool(general) == (name in GENERAL)
    assert all(GENERAL[name] in parameter for parameter in general)


@pytest.mark.parametrize("name", models.LORA)
def test_values_of_adapters_are_those_of_the_examples_own_gradients(name):
    pytest.importorskip("peft")
    made = models.build(name, lora=True)
    net = Net(made.model.double(), made.loss)
    names = [parameter for parameter, p in net.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in parameter for parameter in names)
    values, of_tape, truth = values_and_truth(net, made.X, made.Y)
    assert relative(values, truth) < IN_FLOAT32.get(name, 1e-12)
    assert relative(of_tape, truth) < IN_FLOAT32.get(name, 1e-12)


def test_an_operation_without_forward_mode_is_valued_by_a_difference():
    """The experts' grouped matrix product, which knows float32 only."""
    made = models.build("Mixtral", experts_implementation="grouped_mm")
    net = Net(made.model, made.loss)
    values, _, truth = values_and_truth(net, made.X, made.Y)
    assert {f for _, f, way in net.ways if way == "general"} == {"_grouped_mm"}
    assert relative(values, truth) < 1e-2


def test_a_causal_language_model_has_the_loss_that_hugging_face_gives_it():
    """Where examples have as many labels: labels are moved, and -100 is none."""
    made = models.build("Llama")
    Y = made.X["input_ids"].clone()
    Y[:, :3] = -100
    net = Net(made.model, made.loss)
    theirs = made.model(**made.X, labels=Y).loss
    assert net(made.X, Y)[1].item() == pytest.approx(theirs.item(), rel=1e-6)


def test_an_own_loss_may_give_a_number_for_each_example():
    made = models.build("Llama")

    def loss(logits, Y, reduction):
        return F.cross_entropy(logits[:, 0], Y[:, 0], reduction=reduction)

    net = Net(made.model, loss)
    outputs, mean = net(made.X, made.Y.clamp(min=0))
    assert mean.item() == pytest.approx(loss(outputs.logits, made.Y.clamp(min=0), "mean").item())
    with pytest.raises(ValueError, match=r"the loss gives \(\) numbers for labels"):
        Net(made.model, functools.partial(mean_only))(made.X, made.Y)


def mean_only(logits, Y, reduction):
    return logits.mean()
