"""The penalty by a forward difference of gradients, as public implementations of gradient-norm penalties take it
(arXiv:2202.03599 and others): a second gradient at weights moved along the first."""

import torch


def step(model, loss_function, images, labels, strength, length=0.01):
    """Leaves grad loss + strength * 2 * H g in .grad, with H g from a difference over `length`; returns the loss.

    On networks with ReLU this is not the gradient of the squared norm: gates flip between the two points.
    """
    model.zero_grad()
    parameters = list(model.parameters())
    loss = loss_function(model(images), labels)
    loss.backward()
    with torch.no_grad():
        first = [parameter.grad.clone() for parameter in parameters]
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in first))
        scale = length / (norm + 1e-12)
        for parameter, gradient in zip(parameters, first):
            parameter.add_(gradient * scale)
    model.zero_grad()
    loss_function(model(images), labels).backward()
    with torch.no_grad():
        factor = 2 * strength / scale
        for parameter, gradient in zip(parameters, first):
            parameter.sub_(gradient * scale)
            parameter.grad = gradient + (parameter.grad - gradient) * factor
    return loss.detach()
