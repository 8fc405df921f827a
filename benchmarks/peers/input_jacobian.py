"""The input-Jacobian penalty by random projections (Hoffman, Roberts, Yaida, arXiv:1908.02729): another penalty than
the four of arXiv:2211.15853, at a similar cost, which is why it is listed beside them."""

import torch


def step(model, loss_function, images, labels, strength, projections=1):
    """Leaves the gradient of loss + strength / 2 * E ||df/dx||_F^2 in .grad; returns the loss."""
    model.zero_grad()
    images = images.detach().requires_grad_()
    output = model(images)
    loss = loss_function(output, labels)
    batch, classes = output.shape
    penalty = 0
    for _ in range(projections):
        direction = torch.randn(batch, classes, device=output.device)
        direction = direction / direction.norm(dim=1, keepdim=True)
        (jacobian,) = torch.autograd.grad(output, images, direction, create_graph=True)
        penalty = penalty + classes * (jacobian**2).sum() / (projections * batch)
    (loss + 0.5 * strength * penalty).backward()
    return loss.detach()
