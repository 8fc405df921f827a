"""The gradient-norm step by torch.func: gradient of gradient, over micro-batches by vmap, and compiled where it can be."""

import torch
from torch.func import functional_call, grad_and_value, vmap


def objective(model, loss_function, strength):
    """parameters, buffers, images, labels -> loss + strength * ||grad loss||^2, loss."""

    def loss(parameters, buffers, images, labels):
        return loss_function(functional_call(model, (parameters, buffers), (images,)), labels)

    def penalised(parameters, buffers, images, labels):
        gradients, value = grad_and_value(loss)(parameters, buffers, images, labels)
        norm = sum((gradient**2).sum() for gradient in gradients.values())
        return value + strength * norm, value

    return penalised


def add_gradients(model, gradients):
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def state_of(model):
    """Parameters, and copies of the buffers, which may move."""
    return ({name: parameter.detach() for name, parameter in model.named_parameters()},
            {name: buffer.clone() for name, buffer in model.named_buffers()})


class Step:
    """Adds weight times the gradient to .grad; returns the loss."""

    def __init__(self, compiled):
        self.compiled = compiled
        self.made_for = None

    def __call__(self, model, loss_function, images, labels, strength, weight=1):
        if self.made_for is not model:
            self.made_for = model
            self.gradient = grad_and_value(objective(model, loss_function, strength), has_aux=True)
            if self.compiled:
                self.gradient = torch.compile(self.gradient)
        gradients, (_, loss) = self.gradient(*state_of(model), images, labels)
        add_gradients(model, {name: gradient * weight for name, gradient in gradients.items()})
        return loss.detach()


class MicroBatchesAtOnce:
    """All micro-batches of a step in one call, one dimension more, as vmap writes them."""

    def __call__(self, model, loss_function, images, labels, strength, micro_batch):
        gradient = grad_and_value(objective(model, loss_function, strength), has_aux=True)
        cut = [tensor.unflatten(0, (-1, micro_batch)) for tensor in (images, labels)]
        gradients, (_, losses) = vmap(gradient, in_dims=(None, None, 0, 0))(*state_of(model), *cut)
        add_gradients(model, {name: gradient.mean(0) for name, gradient in gradients.items()})
        return losses.mean().detach()


class CompiledModel:
    """The authors' formula on a model that torch.compile has compiled."""

    def __init__(self):
        self.made_for = None

    def __call__(self, model, loss_function, images, labels, strength, weight=1):
        import authors_formula

        if self.made_for is not model:
            self.made_for = model
            self.compiled = torch.compile(model)
        return authors_formula.step(self.compiled, loss_function, images, labels, strength, weight)
