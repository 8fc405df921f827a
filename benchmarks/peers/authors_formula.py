"""The gradient-norm step as the authors of arXiv:2211.15853 take it: the penalty as a graph, differentiated through."""

import torch


def step(model, loss_function, images, labels, strength, weight=1):
    """Adds the gradient of weight * (loss + strength * ||grad loss||^2) to .grad; returns the loss."""
    loss = loss_function(model(images), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    norm = 0
    for gradient in gradients:
        norm = norm + (gradient**2).sum()
    ((loss + strength * norm) * weight).backward()
    return loss.detach()
